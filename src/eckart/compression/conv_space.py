"""What may become of each convolution of a model: schemes and ranks, and which of them a model bears alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from torch import nn

from ..linalg import LinalgError
from ..models.convolutions import ConvRef, placed
from ..models.progress import track
from ..structures.conv_chain import ConvChain
from .conv_schemes import Kind, Scheme, factored, max_rank, schemes, steps_of
from .evolution import Choice

__all__ = ["Candidate", "Score", "Space", "candidates"]

Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Candidate:
    """What may become of a layer: a scheme and a rank, or None to keep it; multiply-adds on one picture."""

    scheme: Scheme | None
    rank: int
    macs: int


def candidates(
    ref: ConvRef,
    mac_ratios: Sequence[float],
    *,
    kinds: Sequence[Kind] = get_args(Kind),
    groups: Sequence[int] | None = None,
    divisible: bool = True,
) -> list[Candidate]:
    """The candidates of a layer: each scheme at ranks that reach these shares of its multiply-adds, and keeping it.

        R = max(1, floor(share * macs / macs at rank one)),  at most the scheme's largest rank

    Args:
        ref: the layer.
        mac_ratios: shares in (0, 1).
        kinds: of schemes.
        groups: numbers of groups to try; None for all that divide.
        divisible: take the rank with the most divisors between one and the next, which unrolls best in hardware.

    Returns:
        By scheme and rank; the dense layer at the end.
    """
    found = []
    for scheme in schemes(ref.module, kinds, groups):
        one = ref.macs_of(ConvChain(steps_of(ref.module, scheme, 1), device="meta"))
        limit = max_rank(ref.module, scheme)
        ranks = sorted({min(limit, max(1, int(ref.macs * share / one))) for share in mac_ratios})
        if divisible:
            before = [rank - 1 for rank in ranks[:1]] + ranks[:-1]
            ranks = [_most_divisors(range(low + 1, high + 1)) for low, high in zip(before, ranks, strict=True)]
        found += [Candidate(scheme, rank, rank * one) for rank in ranks if rank * one < ref.macs]
    return [*found, Candidate(None, min(ref.shape), ref.macs)]


def _most_divisors(numbers: range) -> int:
    """The number with the most divisors, the larger one of two."""
    return max(numbers, key=lambda n: (sum(n % d == 0 for d in range(1, n + 1)), n))


@dataclass
class Space:
    """The layers, what may become of each, and the chains that were made so far.

    Attributes:
        refs: the layers.
        options: candidates of each, the dense layer last.
        budget: multiply-adds on one picture that all may cost together.
        made: every chain that was asked for, kept in memory until `filter` leaves its candidate out.
    """

    refs: list[ConvRef]
    options: list[list[Candidate]]
    budget: float
    made: dict[tuple[str, Candidate], ConvChain] = field(default_factory=dict)

    def chain(self, ref: ConvRef, candidate: Candidate) -> ConvChain | None:
        """The chain of a candidate; None for the dense layer."""
        if candidate.scheme is None:
            return None
        if (ref.name, candidate) not in self.made:
            try:
                self.made[ref.name, candidate] = factored(ref.module, candidate.scheme, candidate.rank)
            except LinalgError as failure:
                raise LinalgError(f"{ref.name}: {failure}") from failure
        return self.made[ref.name, candidate]

    def chains(self, choice: Choice) -> dict[str, ConvChain]:
        """What a choice puts in the place of layers, by name."""
        chosen = ((ref, self.chain(ref, o[g])) for ref, o, g in zip(self.refs, self.options, choice, strict=True))
        return {ref.name: chain for ref, chain in chosen if chain is not None}

    def costs(self) -> list[list[int]]:
        """Multiply-adds of every candidate of every layer."""
        return [[candidate.macs for candidate in options] for options in self.options]

    def feasible(self) -> bool:
        """Whether the cheapest candidates are within the budget."""
        return sum(map(min, self.costs())) <= self.budget

    def uniform(self, share: float) -> list[Choice]:
        """For every scheme, the choice that uses it in all layers, at the largest ranks below a share of the cost."""
        found = []
        for scheme in dict.fromkeys(c.scheme for options in self.options for c in options if c.scheme):
            choice = []
            for ref, options in zip(self.refs, self.options, strict=True):
                fit = [i for i, c in enumerate(options) if c.scheme == scheme and c.macs <= share * ref.macs]
                choice.append(max(fit, key=lambda i, o=options: o[i].macs, default=len(options) - 1))  # type: ignore[misc]
            found.append(tuple(choice))
        return found

    def filter(
        self, model: nn.Module, measure: Score, tolerance: float, slack: float = 0.0, *, progress: bool = False
    ) -> float:
        """Leave out, scheme by scheme from the largest rank down, what alone costs more than the tolerance.

        Once a rank is too small, all smaller ones of its scheme go with it. If the rest cannot meet the budget, the
        tolerance is doubled until it can.

        Args:
            model: the dense model; candidates take their places in it for a while.
            measure: its score.
            tolerance: how much of the score a layer may cost.
            slack: allowed besides, for a score that is not only the accuracy.
            progress: show a bar.

        Returns:
            The tolerance that was used.
        """
        least, everything = measure(model) - slack, self.options
        scores: dict[tuple[str, Candidate], float] = {}

        def good(ref: ConvRef, candidate: Candidate) -> bool:
            key = (ref.name, candidate)
            if key not in scores:
                chain = self.chain(ref, candidate)
                assert chain is not None
                with placed(model, {ref.name: chain}):
                    scores[key] = measure(model)
            return scores[key] >= least - tolerance

        def kept(ref: ConvRef, options: list[Candidate]) -> list[Candidate]:
            found = []
            for scheme in dict.fromkeys(candidate.scheme for candidate in options[:-1]):
                for candidate in reversed([c for c in options if c.scheme == scheme]):
                    if not good(ref, candidate):
                        break
                    found.append(candidate)
            return [*found, options[-1]]

        pairs = list(zip(self.refs, everything, strict=True))
        while True:
            self.options = [kept(*pair) for pair in track(pairs, "filter", enabled=progress)]
            if self.feasible():
                break
            tolerance = max(2 * tolerance, 0.01) if tolerance < 1 else math.inf
        alive = {(ref.name, c) for ref, options in zip(self.refs, self.options, strict=True) for c in options}
        self.made = {key: chain for key, chain in self.made.items() if key in alive}
        return tolerance
