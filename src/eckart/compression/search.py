"""Share a budget by trying: compress a copy, measure the loss of held-out text, move the budget to where that falls.

    min over kept of loss(model with the fraction kept_l of matrix l),  sum_l kept_l m_l n_l = (1 - ratio) sum_l m_l n_l

Coordinate search (`eckart.compression.coordinates`) from the best of three starts: uniform, threshold and block
influence. Groups are the first and the last third of the blocks and the kinds of matrix (all query projections, say),
the largest first. E. Sieberling et al., EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search,
ICML 2025, arXiv 2410.14649, search shares by thousands of cheaper trials; here it is a few of the real method.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..linalg.errors import LinalgError
from ..linalg.rank import Form, num_parameters
from ..models.batches import calibrating_and_judging
from ..models.calibrate import calibrate
from ..models.evaluate import is_causal, perplexity
from ..models.groups import evaluating
from ..models.influence import block_influence
from ..models.select import Where
from ..models.topology import block_of, blocks, kinds_of
from ..structures import EckartWarning
from .budget import Budget
from .coordinates import Kept, coordinate_search
from .policies import Policy, shares_of
from .runner import Walk

__all__ = ["Searched", "search"]


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        shares: fraction of each linear to remove.
        losses: held-out loss of every trial in nats a token, that of the uniform shares first.
        dense: that of the model as it was.
    """

    shares: dict[str, float]
    losses: list[float]
    dense: float

    def to_dict(self) -> dict[str, float]:
        """The losses that matter, as plain data."""
        found = {"dense": self.dense, "uniform": self.losses[0], "found": min(self.losses)}
        return {"trials": len(self.losses), **{name: loss for name, loss in found.items() if math.isfinite(loss)}}


def search(walk: Walk, ratio: float, where: Where | None, evaluations: int) -> Searched:
    """Search the shares of one compression; the model is not changed.

    Statistics are gathered once, unless they depend on the layers before. Memory holds one more copy of the model at a
    time, and those statistics.

    Args:
        walk: what is to be done, on a causal language model.
        ratio: fraction of all selected parameters to remove.
        where: which linears, as `eckart.compress` was told.
        evaluations: trials at most.

    Returns:
        The shares of the least loss on a slice of the calibration text that the trials were not calibrated on. Their
        loss there is at most that of the uniform shares.

    Raises:
        ValueError: the model is no causal language model, there is too little text, or no trial succeeds.
    """
    plan, model = walk.plan, walk.model
    if not is_causal(model):
        raise ValueError(
            "allocation='search' judges by held-out loss, which only causal language models have; choose another"
        )
    rows, judged = calibrating_and_judging(walk.batches)
    if not rows:
        raise ValueError("allocation='search' needs two sequences or more: to calibrate on, and to judge by")
    dense = perplexity(model, judged, progress=False).loss
    given = walk.given
    if not given and plan.method.gathers and not plan.method.sequential:
        given = calibrate(model, rows, plan.method.gathers, where=where, progress=walk.progress)
    dry = replace(walk, batches=rows, given=given, plan=replace(plan, budget=Budget.of(ratio=ratio)))
    sizes = {ref.name: ref.in_features * ref.out_features for ref in plan.members}
    total = (1 - ratio) * sum(sizes.values())
    failures: list[str] = []
    stored: list[int] = []

    def loss(kept: Kept) -> float:
        try:
            made, numbers = _compressed(dry, kept)
            stored.append(numbers)
            # A method may leave a matrix dense whose share is too small for it: no other trial may gain by that.
            if numbers > max(total, stored[0]):
                raise ValueError(f"{numbers:,} numbers are stored in place of {total:,.0f}; lower the ratio")
            return perplexity(made, judged, progress=False).loss
        except (ValueError, LinalgError) as failure:
            failures.append(str(failure))
            return math.inf

    with evaluating(model), torch.no_grad():
        starts = _starts(dry, ratio)
    best, losses = coordinate_search(
        starts,
        _groups(dry),
        sizes,
        total,
        loss,
        evaluations,
        key=lambda kept: tuple(_ranks(dry, kept).values()),
        progress=walk.progress,
    )
    if not math.isfinite(min(losses)):
        raise ValueError(f"allocation='search' found no shares that work: {failures[0]}")
    return Searched({name: 1 - fraction for name, fraction in best.items()}, losses, dense)


def _ranks(walk: Walk, kept: Kept) -> dict[str, int]:
    plan = walk.plan
    shapes = {ref.name: ref.shape for ref in plan.members}
    shares = {name: 1 - fraction for name, fraction in kept.items()}
    return plan.budget.ranks(shapes, policy="search", form=plan.form, shares=shares)


def _compressed(walk: Walk, kept: Kept) -> tuple[nn.Module, int]:
    """A copy of the model, compressed by these shares, and how many numbers it stores for what was selected."""
    made = copy.deepcopy(walk.model)
    members = [replace(ref, module=made.get_submodule(ref.name)) for ref in walk.plan.members]
    plan = replace(walk.plan, members=members, shares={name: 1 - fraction for name, fraction in kept.items()})
    trial = Walk(plan, made, blocks(made), walk.batches, given=walk.given, progress=False)
    with warnings.catch_warnings(), evaluating(made), torch.no_grad():
        warnings.simplefilter("ignore", EckartWarning)
        trial.run()
    return made, sum(layer.parameters for layer in trial.layers.values())


def _starts(walk: Walk, ratio: float) -> list[Kept]:
    """Uniform shares first, then those of the threshold and of the blocks' influence."""
    plan, members = walk.plan, walk.plan.members
    found: list[Kept] = []
    policies: tuple[Policy, ...] = ("uniform", "threshold")
    for policy in policies:
        shared = replace(walk, plan=replace(plan, policy=policy), progress=False)
        ranks = plan.budget.ranks(
            {ref.name: ref.shape for ref in members},
            policy=policy,
            form=plan.form,
            spectra=shared.survey() if plan.budget.needs_spectra(policy) else None,
            limits=plan.method.limits,
        )
        found.append({ref.name: _fraction(ref.shape, ranks[ref.name], plan.form) for ref in members})
    influence = block_influence(walk.model, walk.blocks, walk.batches, progress=False)
    shares = shares_of("block-influence", members, walk.blocks, ratio, influence=influence)
    return [*found, {name: 1 - fraction for name, fraction in shares.items()}]


def _fraction(shape: tuple[int, int], rank: int, form: Form) -> float:
    """The fraction of a matrix that a rank keeps, half a number more, so that rounding gives the rank back."""
    m, n = shape
    return 1.0 if rank >= min(m, n) else (num_parameters(m, n, rank, form) + 0.5) / (m * n)


def _groups(walk: Walk) -> list[list[str]]:
    """The first and the last third of the blocks, then the kinds of matrix, those with most numbers first."""
    place = {block.name: index for index, block in enumerate(walk.blocks)}
    by_kind: dict[str, list[str]] = {}
    thirds: tuple[list[str], list[str]] = ([], [])
    size = {ref.name: ref.in_features * ref.out_features for ref in walk.plan.members}
    for name, kind in kinds_of(list(size)).items():
        by_kind.setdefault(kind, []).append(name)
        found = block_of(name, list(walk.blocks))
        assert found is not None  # the selection has only such
        if place[found.name] < len(place) / 3:
            thirds[0].append(name)
        elif place[found.name] >= len(place) * 2 / 3:
            thirds[1].append(name)
    return [*thirds, *sorted(by_kind.values(), key=lambda names: -sum(size[name] for name in names))]
