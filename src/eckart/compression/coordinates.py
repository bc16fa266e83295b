"""Coordinate search over the fractions of matrices that are kept, all of them together a fixed number of parameters.

    min loss(kept),   sum_l kept_l size_l = total,   0 < kept_l <= 1

Of the starts the best is taken. Then one group of matrices after the other keeps ``step`` times more, or less, and all
others give or take alike; what lowers the loss stays. After a round over the groups that did not help the step becomes
its root. Nothing is random.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence

from ..models.progress import track

__all__ = ["Kept", "coordinate_search", "moved"]

#: Fraction of each matrix that is kept, by name.
Kept = Mapping[str, float]

_SMALLEST = 1.01  # a step below this moves no rank of a small matrix, and little of a large one


def moved(kept: Kept, group: Sequence[str], factor: float, sizes: Mapping[str, int], total: float) -> Kept | None:
    """One group keeps ``factor`` times as much, at most all, and the others are scaled alike to meet the total.

        kept'_l = min(1, factor kept_l) in the group, min(1, t kept_l) elsewhere,   sum_l kept'_l size_l = total

    Args:
        kept: fraction of each matrix, above 0.
        group: names of some of them.
        factor: above 0.
        sizes: numbers in each matrix.
        total: numbers to keep of all.

    Returns:
        The new fractions, or None where the others cannot make up for the group.

    Example:
        >>> moved({"a": 0.5, "b": 0.5}, ["a"], 1.2, {"a": 100, "b": 100}, 100)
        {'a': 0.6, 'b': 0.4}
    """
    inside = {name: min(1.0, factor * kept[name]) for name in group}
    others = [name for name in kept if name not in inside]
    left = total - sum(fraction * sizes[name] for name, fraction in inside.items())
    free, whole = set(others), 0.0  # those below 1, and what the rest of them hold
    while free:
        t = (left - whole) / sum(kept[name] * sizes[name] for name in free)
        full = {name for name in free if t * kept[name] > 1}
        if t <= 0:
            return None
        if not full:
            scaled = {name: t * kept[name] if name in free else 1.0 for name in others}
            return {name: inside[name] if name in inside else scaled[name] for name in kept}
        free, whole = free - full, whole + sum(sizes[name] for name in full)
    return None


def coordinate_search(
    starts: Sequence[Kept],
    groups: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    total: float,
    loss: Callable[[Kept], float],
    evaluations: int,
    *,
    key: Callable[[Kept], Hashable] = lambda kept: tuple(kept.values()),
    step: float = 1.25,
    progress: bool = False,
) -> tuple[Kept, list[float]]:
    """The shares of the least loss that a number of evaluations finds; never worse than the best start.

    Args:
        starts: where to begin, all of them tried.
        groups: names of matrices that are moved together.
        sizes: numbers in each matrix.
        total: numbers to keep of all.
        loss: what a trial gives; infinite if it cannot be done.
        evaluations: how many trials at most.
        key: what two shares with the same outcome have in common; only one of them is tried.
        step: factor of the first round, 1.25.
        progress: show a bar.

    Returns:
        The best shares, and the losses in the order of the trials.

    Example:
        >>> wanted = {"a": 0.8, "b": 0.2}
        >>> miss = lambda kept: sum((kept[name] - wanted[name]) ** 2 for name in kept)
        >>> found, losses = coordinate_search([{"a": 0.5, "b": 0.5}], [["a"], ["b"]], {"a": 9, "b": 9}, 9, miss, 20)
        >>> len(losses), max(abs(found[name] - wanted[name]) for name in wanted) < 0.05
        (20, True)
    """
    best, least = starts[0], math.inf
    losses: list[float] = []
    seen: set[Hashable] = set()

    def better(candidate: Kept | None) -> bool:
        """Whether it is new and the best so far."""
        nonlocal best, least
        if candidate is None or len(losses) >= evaluations or key(candidate) in seen:
            return False
        seen.add(key(candidate))
        next(bar)
        losses.append(loss(candidate))
        if not losses[-1] < least:
            return False
        best, least = candidate, losses[-1]
        return True

    with contextlib.closing(track(range(evaluations), "search", enabled=progress)) as bar:
        for start in starts:
            better(start)
        while step > _SMALLEST and len(losses) < evaluations:
            before = least
            for group in groups:
                for factor in (step, 1 / step):
                    if better(moved(best, group, factor, sizes, total)):
                        break
            if least == before:
                step = math.sqrt(step)
    return best, losses
