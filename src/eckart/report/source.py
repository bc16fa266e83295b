"""A model that a report is about: in memory, or a checkpoint that stays on disk and is read weight by weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..analysis import LayerSpectrum
from ..models import Selection, Where, model_bytes, num_parameters, specs
from ..models.adapted import inside_peft, is_adapted
from ..models.evaluate import is_causal
from ..models.stored import stored_linears, stored_modules
from ..models.weights import weights_of

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """A model, what the user calls it, and which of its weights are looked at.

    Attributes:
        name: what the user calls it.
        root: the model; of a checkpoint, its modules without weights.
        selection: the weights.
    """

    name: str
    root: nn.Module = field(repr=False)
    selection: Selection = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, name: str, where: Where | None = None) -> Source:
        """A model in memory, with adapters of PEFT on it or without.

        Raises:
            ValueError: no linears, as in `eckart.models.linears`.
        """
        return cls(name, model, weights_of(model, where))

    @classmethod
    def stored(cls, path: Path, name: str, where: Where | None = None) -> Source:
        """A safetensors checkpoint.

        Raises:
            FileNotFoundError: no such checkpoint, or a shard is missing.
            LayoutError: the checkpoint has to be loaded as a whole.
            ValueError: no linears, as in `eckart.models.linears`.
        """
        return cls(name, stored_modules(path), stored_linears(path, where))

    @property
    def compressed(self) -> bool:
        """Whether there are structures in it already."""
        return bool(specs(self.root))

    @property
    def causal(self) -> bool:
        """Whether it is a language model that predicts each token from those before it."""
        return is_causal(self.root)

    def about(self, layers: Sequence[LayerSpectrum]) -> dict[str, Any]:
        """Plain figures of the whole model, for JSON."""
        types = Counter(str(p.dtype).removeprefix("torch.") for p in self.root.parameters())
        return {
            "name": self.name,
            "architecture": type(inside_peft(self.root)).__name__ + (" with adapters" if is_adapted(self.root) else ""),
            "dtype": types.most_common(1)[0][0],
            "parameters": num_parameters(self.root),
            "bytes": model_bytes(self.root),
            "selected": len(layers),
            "selected_parameters": sum(layer.parameters for layer in layers),
            "compressed": self.compressed,
        }
