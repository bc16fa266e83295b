"""The linear maps of a checkpoint on disk: a selection as of a loaded model, each weight read when asked for.

The model's modules are built on the meta device, so that names, shapes and kinds are known and nothing is in memory but
the weights that a caller holds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..structures import Structure
from .quantizer import METHOD, EckartConfig, EckartQuantizer
from .reader import CheckpointReader
from .select import LinearRef, Selection, Where, linears

__all__ = ["LayoutError", "StoredRef", "has_safetensors", "stored_linears", "stored_modules"]


class LayoutError(ValueError):
    """The tensors of a checkpoint are not those of its model one by one: it has to be loaded as a whole."""


@dataclass(frozen=True)
class StoredRef(LinearRef):
    """A linear map of a checkpoint.

    Attributes:
        reader: reads the tensors.
        keys: name of each of the module's tensors in the checkpoint, by its name in the module.
    """

    reader: CheckpointReader = field(repr=False)
    keys: dict[str, str] = field(repr=False)

    @property
    def weight(self) -> Tensor:
        """W (out, in), read anew each time; of a structure, its product."""
        if isinstance(self.module, Structure):
            made = copy.deepcopy(self.module)
            made.load_state_dict({name: self.reader.read(key) for name, key in self.keys.items()}, assign=True)
            return made.dense().detach()
        weight = self.reader.read(self.keys["weight"])
        return weight.mT if self.kind == "conv1d" else weight


def has_safetensors(path: Path) -> bool:
    """Whether a directory has weights that can be read one by one.

    Example:
        >>> has_safetensors(Path("no-such-directory"))
        False
    """
    return any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def stored_linears(path: Path, where: Where | None = None) -> Selection:
    """Select weight matrices of a checkpoint as `linears` does of a model.

    Args:
        path: directory with ``config.json`` and safetensors, dense or written by `eckart.models.save`.
        where: which linear maps, as in `linears`.

    Returns:
        The linear maps, as `StoredRef`, and what is left alone.

    Raises:
        FileNotFoundError: no safetensors, or a shard that the index lists is missing.
        LayoutError: tensors are stored under other names than the model's (transformers converts them on loading).
        ValueError: quantized by another tool, or as for `linears`.
    """
    reader = CheckpointReader(path)
    model = stored_modules(path)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    chosen = linears(model, where)
    refs: list[LinearRef] = []
    for ref in chosen.linears:
        tensors = list(ref.module.state_dict()) if ref.kind == "structure" else ["weight"]
        keys = {name: _key(f"{ref.name}.{name}", prefix, reader) for name in tensors}
        refs.append(StoredRef(ref.name, ref.module, ref.kind, reader, keys))
    return Selection(refs, chosen.skipped)


def _key(name: str, prefix: str, reader: CheckpointReader) -> str:
    """A tensor's name in the checkpoint, which may carry the base model's prefix or lack it."""
    for choice in (name, name.removeprefix(prefix), prefix + name):
        if choice in reader.files:
            return choice
    raise LayoutError(f"the checkpoint has no tensor {name}")


def stored_modules(path: Path) -> nn.Module:
    """The model of a checkpoint with all its tensors on the meta device, structures in their places."""
    import transformers
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(path)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        if not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        if quantization.get("quant_method") != METHOD:
            raise ValueError(f"{path} is quantized with {quantization.get('quant_method')}; give the dense checkpoint")
        del config.quantization_config
    names = getattr(config, "architectures", None) or []
    kind: Any = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise LayoutError(f"{path / 'config.json'} names no architecture that transformers has")
    with torch.device("meta"):
        model: Any = kind._from_config(config)
    if quantization is not None:
        described = EckartConfig.from_dict(quantization)
        EckartQuantizer(described, pre_quantized=True)._process_model_before_weight_loading(model)
    return model.eval()
