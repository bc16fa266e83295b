"""The weights that two models have in the same places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from .finite import check_weight
from .select import LinearRef, Selection
from .weights import MEMORY, map_weights

__all__ = ["Pair", "map_pairs", "pair"]

R = TypeVar("R")


@dataclass(frozen=True)
class Pair:
    """A linear map of two models.

    Attributes:
        name: of the module, the same in both.
        first: in the first model.
        second: in the second.
    """

    name: str
    first: LinearRef = field(repr=False)
    second: LinearRef = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.first.shape

    def read(self) -> tuple[Tensor, Tensor]:
        """Both weights (out, in), detached and on one device.

        Raises:
            ValueError: NaN or Inf in one, named by layer.
        """
        first, second = (ref.weight.detach() for ref in (self.first, self.second))
        for weight in (first, second):
            check_weight(self.name, weight)
        return first, second.to(first.device)


def pair(first: Selection, second: Selection) -> list[Pair]:
    """Put the same selection of two models side by side.

    Args:
        first: of the first model.
        second: of the second.

    Returns:
        One entry a linear map that both have, in the first model's order.

    Raises:
        ValueError: one lacks a weight of the other, two differ in shape, or there are none.
    """
    others = {ref.name: ref for ref in second.linears}
    for ref in first.linears:
        other = others.get(ref.name)
        if other is None:
            raise ValueError(f"{ref.name} is in one of the models only; compare a model with what it was made from")
        if other.shape != ref.shape:
            raise ValueError(
                f"{ref.name} is {ref.shape[0]} x {ref.shape[1]} in the first model and {other.shape[0]} x "
                f"{other.shape[1]} in the second; compare a model with what it was made from"
            )
    names = {ref.name for ref in first.linears}
    extra = next((name for name in others if name not in names), None)
    if extra is not None:
        raise ValueError(f"{extra} is in one of the models only; compare a model with what it was made from")
    if not names:
        raise ValueError("no weight to compare: all that were asked for are left alone (tied, quantized or not linear)")
    return [Pair(ref.name, ref, others[ref.name]) for ref in first.linears]


def map_pairs(
    function: Callable[[Pair], R],
    pairs: Sequence[Pair],
    description: str,
    *,
    memory: float = MEMORY,
    progress: bool = True,
) -> list[R]:
    """Results of ``function`` for every pair, in order; several at a time as far as memory allows.

    Args:
        function: called with a pair; reads it, and lets go of it.
        pairs: what `pair` returned.
        description: of the bar.
        memory: bytes that the weights at work may take with what is computed from them, see `map_weights`.
        progress: show a bar with the time left.
    """
    by_name = {one.name: one for one in pairs}
    firsts = [one.first for one in pairs]
    # Two weights at a time, of which `map_weights` counts one.
    memory = memory / 2
    return map_weights(lambda ref: function(by_name[ref.name]), firsts, description, memory=memory, progress=progress)
