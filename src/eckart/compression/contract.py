"""What a compression method is, at four scopes: two factors, another structure, a part of a block, a whole model.

A method file holds a frozen dataclass derived from one of `WeightMethod` (a weight becomes two factors),
`StructureMethod` (a weight becomes another structure), `ModuleMethod` (attention or an MLP as one piece, which may
change its inner widths) and `ModelMethod` (everything at once). The runner does the rest: sharing the budget,
gathering statistics, replacing layers, checking and saving.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from ..linalg.rank import Form
from ..linalg.weighted import weighted_svd
from ..models.calibrate import SEQUENTIAL, Statistics
from ..models.experts import ExpertBank, expert_banks
from ..models.geometry import Geometry
from ..models.parts import AttentionPart, MLPPart, parts
from ..models.result import LayerResult
from ..models.select import LinearRef
from ..options import Options
from ..structures import Structure
from .policies import Policy

__all__ = [
    "Change",
    "Factors",
    "Job",
    "LayerMethod",
    "ModelMethod",
    "ModuleMethod",
    "StructureMethod",
    "WeightMethod",
]


@dataclass(frozen=True)
class Factors:
    """W (m, n) is about up @ down, most important direction first.

    Attributes:
        up: (m, k).
        down: (k, n). Dropping the last columns of ``up`` and rows of ``down`` gives a smaller rank.
    """

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        """Inner dimension k."""
        return self.up.shape[-1]

    def truncate(self, rank: int) -> Factors:
        """The ``rank`` most important directions."""
        return self if rank >= self.rank else Factors(self.up[:, :rank], self.down[:rank])


@dataclass(frozen=True)
class LayerMethod(Options, ABC):
    """A method that compresses one weight matrix at a time.

    Attributes:
        needs: statistics from `eckart.models.calibrate.NEEDS` that must be gathered; none if data-free.
        allocation: how it shares a budget unless told otherwise.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    allocation: ClassVar[Policy] = "uniform"

    @property
    def gathers(self) -> frozenset[str]:
        """What this instance needs: `needs`, and more where an option asks for it."""
        return self.needs

    @property
    def limits(self) -> Mapping[str, Any]:
        """What the method allows of ranks, as keywords of `eckart.linalg.allocate`."""
        return {}

    @property
    def surveys(self) -> frozenset[str]:
        """What `spectrum` needs from the dense model, when a budget is shared by value."""
        return self.gathers

    @property
    def sequential(self) -> bool:
        """Whether a layer's statistics depend on the layers before it being compressed already."""
        return bool(self.gathers & SEQUENTIAL)

    @abstractmethod
    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """G (n, n), or its diagonal (n,), in the objective tr((W - B) G (W - B)^T); None for the identity."""

    def spectrum(self, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """(min(m, n),) what each further rank is worth to this method, for budgets shared by layers."""
        # In float64: what is below 1e-3 of the largest value would be noise in float32, and the budget is shared by it.
        return weighted_svd(weight, self.weight_of_inputs(statistics), rank=1, double=True).s


@dataclass(frozen=True)
class WeightMethod(LayerMethod):
    """A method that makes two factors of a weight.

    A subclass says in `weight_of_inputs` which inputs matter to it, and inherits the best low-rank
    approximation under that weight; one with another objective overrides `factorize`.
    """

    def factorize(self, weight: torch.Tensor, statistics: Statistics, rank: int) -> Factors:
        """Factors of ``weight`` (m, n) of the given rank."""
        best = weighted_svd(weight, self.weight_of_inputs(statistics), rank)
        return Factors(best.basis, best.basis.mT @ weight.to(best.basis.dtype))


@dataclass(frozen=True)
class StructureMethod(LayerMethod):
    """A method that makes another structure of a weight than two factors."""

    @abstractmethod
    def build(self, weight: torch.Tensor, statistics: Statistics, parameters: int) -> Structure | None:
        """The structure that takes the place of a weight.

        Args:
            weight: (m, n).
            statistics: what `gathers` names, of this layer's input.
            parameters: how much it may store at most, in numbers of the weight's type; indices and masks count by
                their bytes.

        Returns:
            A structure of shape (m, n) without bias (the runner adds it), or None to leave the layer dense.
        """


@dataclass(frozen=True)
class Change:
    """What becomes of a part of a block.

    Attributes:
        structures: full name of a linear -> what takes its place; its shape may be another one.
        geometry: what the module itself must know about its new shape, if its configuration says otherwise.
        errors: full name -> relative error, where the method knows it.
    """

    structures: Mapping[str, Structure]
    geometry: Geometry | None = None
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleMethod(Options, ABC):
    """A method that compresses attention, or an MLP, as one piece.

    Attributes:
        needs: statistics of the inputs of the part's linears, from `eckart.models.calibrate.NEEDS`.
        sequential: whether a block is calibrated with the blocks before it compressed already.
        allocation: how blocks share a budget unless told otherwise: "uniform" or "block-influence".
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    sequential: ClassVar[bool] = False
    allocation: ClassVar[Policy] = "uniform"

    def refuses(self, part: AttentionPart | MLPPart) -> str | None:
        """Why this part is left alone, or None."""
        return None

    @abstractmethod
    def compress(
        self, part: AttentionPart | MLPPart, statistics: Mapping[str, Statistics], parameters: int, form: Form
    ) -> Change | None:
        """The part with at most so many numbers in the weights of its linears; None to leave it as it is.

        Args:
            part: attention or an MLP; not to be changed.
            statistics: of each linear of the part, by full name.
            parameters: how many numbers its weights may hold together, biases not counted.
            form: how to store factors, if the method makes some.
        """


@dataclass(frozen=True)
class Job:
    """What a method of a whole model works on.

    Attributes:
        model: changed in place, or left alone if another one is returned.
        ratio: fraction of the selected weights' parameters to remove.
        members: the selected linears.
        batches: calibration data as keyword arguments of the model's forward.
        progress: show bars.
    """

    model: nn.Module
    ratio: float
    members: Sequence[LinearRef]
    batches: Sequence[Mapping[str, Any]]
    progress: bool = True

    @cached_property
    def banks(self) -> list[ExpertBank]:
        """The banks of experts of the model, looked for once: before it is changed."""
        return expert_banks(self.model)

    @cached_property
    def parts(self) -> list[AttentionPart | MLPPart]:
        """Attention and MLPs that the selected linears make up, looked for once: before they are changed."""
        found, _ = parts(self.model, self.members)
        return found


@dataclass(frozen=True)
class ModelMethod(Options, ABC):
    """A method that needs the whole model: gradients, training, a search, or other layers than linears.

    Attributes:
        needs: what it gathers from calibration data itself, in words; for the catalog only.
        data: whether it needs calibration batches.
        on_linears: whether it works on the selected linears; if not, `Job.members` is empty.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    data: ClassVar[bool] = True
    on_linears: ClassVar[bool] = True

    @abstractmethod
    def check(self, job: Job) -> None:
        """Refuse what the method does not understand, before anything is touched.

        Raises:
            ValueError: naming the layer or argument, and the remedy.
        """

    @abstractmethod
    def compress(self, job: Job) -> tuple[nn.Module, list[LayerResult]]:
        """The compressed model (the same one, or a new one) and what became of each layer it worked on."""
