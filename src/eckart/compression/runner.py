"""Walk over a model's blocks: gather statistics, factorise, replace. The same walk in memory and from disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..linalg.rank import Form
from ..models.calibrate import Statistics, collect, members_of
from ..models.memory import release_memory
from ..models.parallel import parallel_map
from ..models.progress import track
from ..models.replace import replace
from ..models.replay import Batch, Hidden, Replay
from ..models.result import LayerResult
from ..models.select import LinearRef, Skipped
from ..models.topology import Block
from ..structures import Structure
from .budget import Budget, kinds_of
from .contract import LayerMethod, WeightMethod
from .layer import compressed, left_dense
from .pair import Pair
from .policies import Policy, loss_spectrum

__all__ = ["Plan", "Walk", "Weights"]


class Weights(Protocol):
    """Where the blocks' weights live while they are not worked on."""

    def visiting(self, index: int, *, changed: bool) -> AbstractContextManager[None]:
        """Have the weights of a block in memory for a while; they have ``changed`` when it ends."""
        ...


class InMemory:
    """The weights of a model that is loaded as a whole."""

    def visiting(self, index: int, *, changed: bool) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()


@dataclass(frozen=True)
class Plan:
    """What to do with which layers.

    Attributes:
        method: how to factorise.
        budget: how far.
        policy: how the budget is shared.
        form: how factors are stored.
        members: the selected linears.
        model_bytes: size of the whole model now.
        shares: fraction of each linear to remove, under a policy that looks at no spectrum.
        information: sum of the Fisher information over each linear's weight, for "fisher"; 0 for one that is not there.
    """

    method: LayerMethod
    budget: Budget
    policy: Policy
    form: Form
    members: Sequence[LinearRef]
    model_bytes: int
    shares: Mapping[str, float] | None = None
    information: Mapping[str, float] | None = None


@dataclass
class Walk:
    """One compression of one model.

    Attributes:
        plan: what to do.
        model: the model, changed in place.
        blocks: its blocks.
        batches: calibration data; empty for a method without needs.
        weights: where the weights live.
        given: statistics gathered beforehand for the whole model (gradients), by linear.
        progress: show bars.
        workers: threads that factorise side by side; default torch's.
        layers: what was done, in the model's order at the end.
        unreached: selected linears that saw no calibration token.
        skipped: linears that are left alone, with the reason.
        notes: what a policy found out, for the settings of the result.
    """

    plan: Plan
    model: torch.nn.Module
    blocks: Sequence[Block]
    batches: Sequence[Batch]
    weights: Weights = field(default_factory=InMemory)
    given: dict[str, Statistics] = field(default_factory=dict)
    progress: bool = True
    workers: int | None = None
    layers: dict[str, LayerResult] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    biases: int = 0  # they stay
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def selected(self) -> int:
        """Numbers in the selected weights before."""
        return sum(ref.in_features * ref.out_features for ref in self.plan.members)

    def run(self) -> None:
        """Choose the ranks, then factorise and replace every selected linear."""
        plan = self.plan
        survey = self.survey() if plan.budget.needs_spectra(plan.policy) else None
        ranks = plan.budget.ranks(
            {ref.name: ref.shape for ref in plan.members},
            policy=plan.policy,
            form=plan.form,
            spectra=survey,
            kinds=kinds_of([ref.name for ref in plan.members]),
            shares=plan.shares,
            limits=plan.method.limits,
            model_bytes=plan.model_bytes,
            bytes_per_parameter=plan.members[0].dtype.itemsize,
        )
        if plan.method.sequential:
            self._compensating(ranks)
        else:
            self._independent(ranks)
        missing = [ref.name for ref in plan.members if ref.name not in self.layers]
        if missing:
            raise RuntimeError(f"{len(missing)} selected layers were not visited, such as {missing[0]}")
        self.layers = {ref.name: self.layers[ref.name] for ref in plan.members}

    def survey(self) -> dict[str, torch.Tensor]:
        """Spectra of all selected weights under the method's own measure, from the dense model.

        In units of the loss, where the plan has the Fisher information.
        """
        method, information, spectra = self.plan.method, self.plan.information, {}
        for members, statistics in self._dense_pass(method.surveys, "survey", changed=False):

            def spectrum(ref: LinearRef, statistics: Mapping[str, Statistics] = statistics) -> torch.Tensor:
                known = statistics.get(ref.name)
                if known is None:
                    return torch.ones(min(ref.shape))
                s = method.spectrum(ref.weight.detach(), known).cpu()
                if information is None:
                    return s
                return loss_spectrum(s, method.weight_of_inputs(known), information.get(ref.name, 0.0), ref.shape)

            found = parallel_map(spectrum, members, cost=_cost, workers=self.workers)
            spectra.update({ref.name: s for ref, s in zip(members, found, strict=True)})
        return spectra

    def _independent(self, ranks: Mapping[str, int]) -> None:
        """Every layer on the dense model's inputs."""
        for members, statistics in self._dense_pass(self.plan.method.gathers, "compress", changed=True):
            for group in [members] if self.workers != 1 else _by_input(members, statistics):
                self._fit(group, statistics, ranks)
                if statistics is not self.given:
                    for ref in group:  # a Gram matrix may be larger than the block itself
                        statistics.pop(ref.name, None)
                if self.workers == 1:
                    release_memory()

    def _dense_pass(
        self, needs: frozenset[str], title: str, *, changed: bool
    ) -> Iterator[tuple[list[LinearRef], dict[str, Statistics]]]:
        """Yield the linears of each block and their statistics in the dense model."""
        hidden: Hidden | None = None
        replay = Replay(self.model, self.blocks, self.batches)
        forward = bool(needs) and not self.given
        for index, block in enumerate(track(self.blocks, title, enabled=self.progress)):
            members = members_of(block, self.plan.members)
            with self.weights.visiting(index, changed=changed):
                statistics = self.given
                if forward:
                    statistics, hidden = collect(replay, index, replay.enter(index, hidden), members, needs)
                elif not needs:
                    statistics = {ref.name: Statistics() for ref in members}
                yield members, statistics

    def _compensating(self, ranks: Mapping[str, int]) -> None:
        """Every layer on the inputs that reach it once those before it are compressed."""
        pair = Pair(self.model, self.blocks, self.batches)
        for index, block in enumerate(track(self.blocks, "compress", enabled=self.progress)):
            with self.weights.visiting(index, changed=True), pair.at(index):
                members = members_of(block, self.plan.members)
                groups = pair.groups(members)
                for group in groups:
                    statistics = pair.statistics(group[0], self.plan.method.gathers)
                    self._fit(group, {ref.name: statistics for ref in group}, ranks)
                reached = {ref.name for group in groups for ref in group}
                self._fit([ref for ref in members if ref.name not in reached], {}, ranks)

    def _fit(
        self, members: Sequence[LinearRef], statistics: Mapping[str, Statistics], ranks: Mapping[str, int]
    ) -> None:
        """Factorise these linears side by side and put the factors in their places."""

        def fit(ref: LinearRef) -> tuple[Structure | None, LayerResult]:
            known = statistics.get(ref.name)
            rank = ranks[ref.name]
            if known is None or rank >= min(ref.shape):
                return None, left_dense(ref)
            return compressed(ref, self.plan.method, known, rank, self.plan.form)

        for ref, (structure, layer) in zip(
            members, parallel_map(fit, members, cost=_cost, workers=self.workers), strict=True
        ):
            if ref.name not in statistics:
                self.unreached.append(ref.name)
            if structure is not None:
                replace(self.model, ref.name, structure)
            self.layers[ref.name] = layer

    def messages(self) -> list[str]:
        """What the user did not ask for: layers that stay dense, saw no data, or are stored in the other form."""
        layers = self.layers.values()
        dense = [layer.name for layer in layers if layer.form == "dense" and layer.name not in self.unreached]
        factored = isinstance(self.plan.method, WeightMethod)
        other = [layer.name for layer in layers if factored and layer.form not in ("dense", self.plan.form)]
        found = []
        for names, reason in (
            (self.unreached, "saw no calibration token and stay dense"),
            (dense, "stay dense: the chosen rank would not make them smaller"),
            (other, "are stored as plain factors of a lower rank: rounding would cost the pivoted form more"),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                found.append(f"{', '.join(names[:3])}{more} {reason}")
        return found


def _by_input(members: Sequence[LinearRef], statistics: Mapping[str, Statistics]) -> list[list[LinearRef]]:
    groups: dict[int, list[LinearRef]] = {}
    for ref in members:
        groups.setdefault(id(statistics.get(ref.name)), []).append(ref)
    return list(groups.values())


def _cost(ref: LinearRef) -> float:
    return float(ref.out_features * ref.in_features * min(ref.shape))
