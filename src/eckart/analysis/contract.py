"""What an analysis is: from a model, and what else it asks for, to named figures.

A method file holds a frozen dataclass derived from `AnalysisMethod`. The runner does the rest: it checks the inputs
before anything is computed, keeps the model as it was, and takes the time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..models.select import Where
from ..options import Options

__all__ = ["Analysis", "AnalysisMethod", "Subject"]


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        model: In eval mode while it is analysed; a method leaves weights, hooks and gradients as it found them.
        base: The model that it is compared with, of the same shape.
        batches: Inputs, as dictionaries of tensors on the model's device. A row is one text; padding is masked.
        where: Which linears, as in `eckart.models.linears`.
        progress: Show bars with the time left.
    """

    model: nn.Module
    base: nn.Module | None = None
    batches: Sequence[Mapping[str, Tensor]] = ()
    where: Where | None = None
    progress: bool = False


@dataclass
class Analysis:
    """What was found.

    Attributes:
        figures: What it comes to, by name: plain numbers, texts, or lists of them.
        rows: One entry a layer, head, text or token, with the same plain figures in each; the first names it.
        tensors: What can be worked on further; not part of :meth:`to_dict`.
        warnings: What the reader has to know to read the figures.
        method: Catalog name; with its options in ``settings``.
        settings: The options that it was made with.
        seconds: Wall time.
    """

    figures: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    warnings: list[str] = field(default_factory=list)
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        return {key: value for key, value in vars(self).items() if key != "tensors"}


@dataclass(frozen=True)
class AnalysisMethod(Options, ABC):
    """A published analysis with its options.

    A subclass is a frozen dataclass whose fields are the options of the paper. The mathematics is a function of tensors
    beside it.

    Attributes:
        needs: "base" for a second model, "data" for batches of inputs, "labels" for batches that say which tokens are
            the answer.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def analyze(self, subject: Subject) -> Analysis:
        """The figures; deterministic, without printing."""
