"""Mixed-TD: every convolution is factored in the way that suits it, found by search under a budget of multiply-adds.

    T (F, C, kh, kw)  ->  two to four smaller convolutions: one of three foldings with any number of groups, or CP
    max over one candidate a layer of the accuracy,   sum of multiply-adds <= (1 - ratio) * those of the dense layers

Unlike for the other methods, ``ratio`` is the fraction of MULTIPLY-ADDS removed from the factored convolutions: it is
what a picture costs, and with a stride it is not the fraction of the numbers. The schemes are in `conv_schemes`.

Z. Yu and C.-S. Bouganis, Mixed-TD: Efficient Neural Network Accelerator with Layer-Specific Tensor Decomposition, FPL
2023, arXiv 2306.05021; code: Yu-Zhewen/Mixed-TD. What differs: the cost is multiply-adds instead of the throughput that
a model of an FPGA predicts; choices over the budget are repaired by making layers cheaper instead of thrown away; every
scheme used everywhere, as far as the filter leaves it, is among the first individuals, so on the batches the mixture is
never worse than the best of them that fits; all are scored on the same batches, not on a new one each generation; where
the filter leaves too little to reach the budget, its tolerance is doubled until it does; batch normalisations are
estimated again at the end, if that does not lower the score.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import nn

from ..models.batch_norm import batch_norms, reestimate, statistics_kept
from ..models.calling import AnyBatch, split_labels
from ..models.convolutions import ConvRef, convolutions, placed
from ..models.replace import swap
from ..models.result import LayerResult
from ..models.select import Where
from ..structures import EckartWarning
from ..structures.conv_chain import ConvChain
from .contract import Job, ModelMethod
from .conv_schemes import Kind, why_not
from .conv_space import Candidate, Score, Space, candidates
from .evolution import Choice, Search, evolve
from .proxy import Proxy

__all__ = ["MixedTD", "decompose"]

_COLOURS = 3  # convolutions of so few channels read the picture, and are left alone


@dataclass(frozen=True)
class MixedTD(ModelMethod):
    """A mixture of tensor decompositions for convolutional networks; the ratio is of multiply-adds.

    Calibration batches are pictures, best with "labels"; without them, the dense model's own classes are right. The
    filter scores every candidate of every layer once, and the search up to population x (generations + 1) choices; for
    a large model give few ``groups`` and ``mac_ratios``.

    Attributes:
        kinds: schemes to choose from.
        groups: numbers of groups to try, where they divide the channels; None for every divisor, as in the paper.
        mac_ratios: shares of a layer's multiply-adds that candidates may cost; 0.30 to 0.70.
        divisible: prefer ranks with many divisors.
        tolerance: accuracy, in (0, 1), that a single layer may cost before a rank and all smaller ones are left out.
        population: children of a generation, 100.
        parents: survivors, 25.
        generations: 20; 500 in the paper, on GPUs.
        mutation: probability that a mutant's layer is drawn again.
        recalibrate: estimate batch normalisations again at the end.
        seed: of the search.

    Example:
        >>> MixedTD(generations=5).kinds
        ('separable', 'grouped-pointwise', 'pointwise-grouped', 'cp')
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    on_linears: ClassVar[bool] = False

    kinds: tuple[Kind, ...] = get_args(Kind)
    groups: tuple[int, ...] | None = None
    mac_ratios: tuple[float, ...] = (0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70)
    divisible: bool = True
    tolerance: float = 0.01
    population: int = 100
    parents: int = 25
    generations: int = 20
    mutation: float = 0.2
    recalibrate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("kinds", "groups", "mac_ratios"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if not self.kinds or set(self.kinds) - set(get_args(Kind)):
            raise ValueError(f"kinds must be some of {', '.join(get_args(Kind))}, not {self.kinds}")
        if not self.mac_ratios or not all(0 < share < 1 for share in self.mac_ratios):
            raise ValueError(f"mac_ratios must lie between 0 and 1, not {self.mac_ratios}")
        if self.groups is not None and (not self.groups or min(self.groups) < 1):
            raise ValueError(f"groups must be numbers of at least 1, not {self.groups}; None takes every divisor")
        if not 0 <= self.tolerance <= 1 or not 0 <= self.mutation <= 1:
            raise ValueError(f"tolerance and mutation must lie in [0, 1], not {self.tolerance} and {self.mutation}")
        for name, least in (("population", 1), ("parents", 1), ("generations", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def check(self, job: Job) -> None:
        """Refuse a model without such convolutions, and a ratio out of reach."""
        self.space(job.model, job.batches, job.ratio)

    def compress(self, job: Job) -> tuple[nn.Module, list[LayerResult]]:
        """Search on the batches, and factor the model in place."""
        return job.model, self.decompose(job.model, job.batches, job.ratio, progress=job.progress)

    def space(self, model: nn.Module, batches: Sequence[AnyBatch], ratio: float, where: Where | None = None) -> Space:
        """All candidates of all layers.

        Raises:
            ValueError: no convolution can be factored, or the ratio is out of reach.
        """
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1 (the fraction of multiply-adds to remove), not {ratio}")
        if not batches:
            raise ValueError("mixed-td needs pictures to search on: give data=batches")
        refs = convolutions(model, split_labels(batches[0])[0], where)
        reasons = {ref.name: why_not(ref.module) for ref in refs}
        if where is None:
            small = f"has {_COLOURS} channels or fewer"
            reasons |= {ref.name: reasons[ref.name] or small for ref in refs if ref.module.in_channels <= _COLOURS}
        left = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        refs = [ref for ref in refs if reasons[ref.name] is None]
        if not refs:
            raise ValueError(f"{type(model).__name__} has no convolution that can be factored ({left or 'none runs'})")
        options = [
            candidates(ref, self.mac_ratios, kinds=self.kinds, groups=self.groups, divisible=self.divisible)
            for ref in refs
        ]
        dense = sum(ref.macs for ref in refs)
        space = Space(refs, options, (1 - ratio) * dense)
        if not space.feasible():
            most = 1 - sum(map(min, space.costs())) / dense
            raise ValueError(f"ratio {ratio} is out of reach: the candidates remove {most:.3f}; add smaller mac_ratios")
        return space

    def decompose(
        self,
        model: nn.Module,
        batches: Sequence[AnyBatch],
        ratio: float,
        *,
        where: Where | None = None,
        score: Score | None = None,
        progress: bool = True,
    ) -> list[LayerResult]:
        """See the function `decompose`."""
        space = self.space(model, batches, ratio, where)
        measure = score or Proxy(model, batches)
        slack = 1 / (2 * measure.count) if isinstance(measure, Proxy) else 0.0
        tolerance = space.filter(model, measure, self.tolerance, slack, progress=progress)
        if tolerance > self.tolerance:
            warnings.warn(
                f"no mixture within a tolerance of {self.tolerance} a layer reaches the ratio: {tolerance} was used",
                EckartWarning,
                stacklevel=2,
            )

        def fitness(choice: Choice) -> float:
            with placed(model, space.chains(choice)):
                return measure(model)

        search = Search(self.population, self.parents, self.generations, self.mutation, self.seed)
        found = evolve(space.costs(), space.budget, fitness, search, space.uniform(1 - ratio), progress=progress)
        if not math.isfinite(found.score):
            raise ValueError("every choice of layers makes the model answer with NaN or Inf; look at its batches")
        chains = space.chains(found.choice)
        for name, chain in chains.items():
            swap(model, name, chain)
        if self.recalibrate and batch_norms(model):
            with statistics_kept(model) as keep:
                reestimate(model, [split_labels(batch)[0] for batch in batches])
                if measure(model) >= found.score:
                    keep.append(True)
        chosen = (options[gene] for options, gene in zip(space.options, found.choice, strict=True))
        return [
            _result(ref, candidate, chains.get(ref.name)) for ref, candidate in zip(space.refs, chosen, strict=True)
        ]


def _result(ref: ConvRef, candidate: Candidate, chain: ConvChain | None) -> LayerResult:
    m, n = ref.shape
    if chain is None:
        return LayerResult(ref.name, ref.shape, candidate.rank, "dense", m * n, 0.0)
    weight = ref.module.weight.detach().double()
    error = float((weight - chain.dense().detach().double()).norm() / (weight.norm() or 1.0))
    parameters = chain.num_parameters() - (0 if chain.bias is None else m)
    return LayerResult(ref.name, ref.shape, candidate.rank, str(candidate.scheme), parameters, error)


def decompose(
    model: nn.Module,
    images: Iterable[AnyBatch],
    ratio: float,
    *,
    where: Where | None = None,
    score: Score | None = None,
    progress: bool = True,
    **options: Any,
) -> list[LayerResult]:
    """Factor the convolutions of any torch model in place.

    Args:
        model: any model whose convolutions are ``nn.Conv2d``.
        images: batches: tensors (N, C, H, W), pairs of pictures and labels, or keyword arguments with "labels".
        ratio: fraction of the factored convolutions' multiply-adds to remove.
        where: which convolutions; None for all with a kernel beyond 1 x 1 and more than three input channels.
        score: of a model, larger is better; None for its accuracy on ``images``.
        progress: show bars.
        options: of `MixedTD`.

    Returns:
        What became of each convolution; shapes and ranks are those of the kernel as a matrix (F, C kh kw).

    Raises:
        ValueError: an option makes no sense, no convolution can be factored, or the ratio is out of reach.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)).eval()
        >>> found = decompose(model, [torch.randn(4, 4, 8, 8)], 0.5, generations=2, population=8, progress=False)
        >>> type(model[0]).__name__, model[0].macs(8, 8) <= 0.5 * 8 * 8 * 8 * 4 * 9
        ('ConvChain', True)

    Reference:
        Yu and Bouganis, FPL 2023, arXiv 2306.05021.
    """
    return MixedTD(**options).decompose(model, list(images), ratio, where=where, score=score, progress=progress)
