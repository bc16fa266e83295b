"""What `eckart.compress` was asked for, once its words are understood."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..linalg.rank import Form
from ..models.batches import as_batches, text_batches
from ..models.calibrate import Statistics
from ..models.replay import Batch
from ..models.select import Where
from .budget import Budget
from .contract import LayerMethod, ModelMethod, ModuleMethod
from .engine import Engine
from .finished import Finished
from .policies import Policy
from .runner import Weights

__all__ = ["AnyMethod", "Request", "Streaming"]

AnyMethod = LayerMethod | ModuleMethod | ModelMethod


@dataclass(frozen=True)
class Streaming:
    """How a model is compressed whose weights stay on disk.

    Attributes:
        weights: where the blocks' weights are.
        engine: who factorises.
        finished: what an earlier run has done, and where this one says what it has done.
    """

    weights: Weights
    engine: Engine
    finished: Finished


@dataclass(frozen=True)
class Request:
    """What `compress` was asked for.

    Attributes:
        name: what messages call the method.
        method: how.
        budget: how far.
        policy: how the budget is shared.
        evaluations: trials of a policy that searches.
        form: how factors are stored.
        where: which linears.
        data: calibration batches, if given.
        tokenizer: for a default text.
        given: statistics gathered beforehand.
        streaming: how, if the weights are not in memory.
        progress: show bars.
    """

    name: str
    method: AnyMethod
    budget: Budget
    policy: Policy
    evaluations: int
    form: Form
    where: Where | None
    data: Iterable[Any] | None
    tokenizer: Any
    given: dict[str, Statistics]
    streaming: Streaming | None
    progress: bool

    def batches(self) -> list[Batch]:
        """The calibration batches.

        Raises:
            ValueError: there are none.
        """
        if self.data is not None:
            return as_batches(self.data)
        if self.tokenizer is None:
            raise ValueError(f"{self.name} needs calibration data: give data=batches, or tokenizer= for a default text")
        return text_batches(self.tokenizer)

    def in_memory(self, why: str) -> None:
        """Refuse a model whose weights are on disk."""
        if self.streaming is not None:
            raise ValueError(f"{self.name} {why}; it cannot be streamed")

    def ratio(self, shapes: Mapping[str, tuple[int, int]], size: int, itemsize: int, form: Form) -> float:
        """The budget as a fraction of these matrices.

        Raises:
            ValueError: it is a rank or an energy, or bytes out of reach.
        """
        try:
            return self.budget.as_ratio(shapes, form, size, itemsize)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
