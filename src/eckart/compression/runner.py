"""Walk over a model's blocks: gather statistics, factorise, replace. The same walk in memory and from disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from ..linalg.rank import Form
from ..models.calibrate import Statistics, collect, members_of
from ..models.progress import track
from ..models.replace import replace
from ..models.replay import Batch, Hidden, Replay
from ..models.result import LayerResult
from ..models.select import LinearRef, Skipped
from ..models.topology import Block
from ..structures import Structure
from .budget import Budget, kinds_of
from .contract import LayerMethod, WeightMethod
from .engine import Engine, Local, Task
from .finished import Finished
from .layer import Fit, Measure
from .pair import Pair
from .policies import Policy

__all__ = ["Plan", "Walk", "Weights"]

R = TypeVar("R")


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
        engine: who factorises; default torch's number of threads.
        finished: what an earlier run has done of it, and where this one says what it has done.
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
    engine: Engine = field(default_factory=Local)
    finished: Finished | None = None
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
        task = Fit(self.plan.method, self._ranks(), self.plan.form)
        if self.plan.method.sequential:
            self._compensating(task)
        else:
            self._independent(task)
        missing = [ref.name for ref in self.plan.members if ref.name not in self.layers]
        if missing:
            raise RuntimeError(f"{len(missing)} selected layers were not visited, such as {missing[0]}")
        self.layers = {ref.name: self.layers[ref.name] for ref in self.plan.members}

    def _ranks(self) -> Mapping[str, int]:
        plan = self.plan
        surveyed = plan.budget.needs_spectra(plan.policy)
        if self.finished is not None and self.finished.ranks is not None:
            return self.finished.ranks
        ranks = plan.budget.ranks(
            {ref.name: ref.shape for ref in plan.members},
            policy=plan.policy,
            form=plan.form,
            spectra=self.survey() if surveyed else None,
            kinds=kinds_of([ref.name for ref in plan.members]),
            shares=plan.shares,
            limits=plan.method.limits,
            model_bytes=plan.model_bytes,
            bytes_per_parameter=plan.members[0].dtype.itemsize,
        )
        if self.finished is not None and surveyed:
            self.finished.keep_ranks(ranks)
        return ranks

    def survey(self) -> dict[str, torch.Tensor]:
        """Spectra of all selected weights under the method's own measure, from the dense model.

        In units of the loss, where the plan has the Fisher information.
        """
        method, spectra = self.plan.method, {}
        task = Measure(method, self.plan.information)
        for members, _, found in self._dense_pass(task, method.surveys, "survey", changed=False):
            spectra.update({ref.name: s for ref, s in zip(members, found, strict=True)})
        return spectra

    def _independent(self, task: Fit) -> None:
        """Every layer on the dense model's inputs."""
        for members, statistics, found in self._dense_pass(task, task.method.gathers, "compress", changed=True):
            self._put(members, statistics, found)

    def _dense_pass(
        self, task: Task[R], needs: frozenset[str], title: str, *, changed: bool
    ) -> Iterator[tuple[list[LinearRef], dict[str, Statistics], Iterator[R]]]:
        """Yield the linears of each block, their statistics in the dense model, and what a task makes of them."""
        hidden: Hidden | None = None
        replay = Replay(self.model, self.blocks, self.batches)
        forward = bool(needs) and not self.given
        groups = [members_of(block, self.plan.members) for block in self.blocks]
        done = self._done if changed else 0
        ahead = self.engine.imap(task, groups[done:])
        for index, members in enumerate(track(groups, title, enabled=self.progress)):
            with self.weights.visiting(index, changed=changed and index >= done):
                if index < done:
                    if forward:
                        hidden = replay.advance(index, replay.enter(index, hidden))
                    self._restore(index)
                    continue
                statistics = self.given
                if forward:
                    statistics, hidden = collect(replay, index, replay.enter(index, hidden), members, needs)
                elif not needs:
                    statistics = {ref.name: Statistics() for ref in members}
                yield members, statistics, self.engine.map(task, members, statistics) if needs else next(ahead)
            if changed:
                self._finish(members)

    def _compensating(self, task: Fit) -> None:
        """Every layer on the inputs that reach it once those before it are compressed."""
        pair = Pair(self.model, self.blocks, self.batches)
        done = self._done
        for index, block in enumerate(track(self.blocks, "compress", enabled=self.progress)):
            members = members_of(block, self.plan.members)
            with self.weights.visiting(index, changed=index >= done), pair.at(index):
                if index < done:
                    self._restore(index)
                    continue
                groups = pair.groups(members)
                for group in groups:
                    shared = pair.statistics(group[0], task.method.gathers)
                    statistics = {ref.name: shared for ref in group}
                    self._put(group, statistics, self.engine.map(task, group, statistics))
                reached = {ref.name for group in groups for ref in group}
                rest = [ref for ref in members if ref.name not in reached]
                self._put(rest, {}, self.engine.map(task, rest, {}))
            self._finish(members)

    def _put(
        self,
        members: Sequence[LinearRef],
        statistics: dict[str, Statistics],
        found: Iterable[tuple[Structure | None, LayerResult]],
    ) -> None:
        """Put factors in the places of these linears, one after the other."""
        for ref, (structure, layer) in zip(members, found, strict=True):
            if ref.name not in statistics:
                self.unreached.append(ref.name)
            elif statistics is not self.given:
                del statistics[ref.name]  # a Gram matrix may be larger than the block itself
            if structure is not None:
                replace(self.model, ref.name, structure)
            self.layers[ref.name] = layer

    @property
    def _done(self) -> int:
        """How many blocks an earlier run has finished."""
        return 0 if self.finished is None else self.finished.blocks

    def _restore(self, index: int) -> None:
        """Have a block as an earlier run left it."""
        assert self.finished is not None
        layers, unreached = self.finished.restore(index)
        self.layers.update({layer.name: layer for layer in layers})
        self.unreached += unreached

    def _finish(self, members: Sequence[LinearRef]) -> None:
        """Say that a block is written."""
        if self.finished is not None:
            names = [ref.name for ref in members]
            unreached = [name for name in self.unreached if name in names]
            self.finished.add([self.layers[name] for name in names], unreached)

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
