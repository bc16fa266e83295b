"""Walk over a model's blocks for methods that change attention or an MLP as one piece, inner widths included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..linalg import LinalgError, all_finite
from ..linalg.rank import Form
from ..models.calibrate import Statistics, collect
from ..models.geometry import set_geometry
from ..models.influence import block_influence
from ..models.interrupts import uninterrupted
from ..models.memory import release_memory
from ..models.parts import AttentionPart, MLPPart, parts
from ..models.progress import track
from ..models.replace import replace
from ..models.replay import Batch, Hidden, Replay
from ..models.result import LayerResult
from ..models.select import LinearRef, Skipped
from ..models.topology import Block, block_of
from ..structures import Dense, LowRank, Structure
from .contract import Change, ModuleMethod
from .layer import left_dense
from .policies import block_shares

__all__ = ["ModuleWalk", "choose_parts"]

Part = AttentionPart | MLPPart


def choose_parts(
    model: torch.nn.Module, method: ModuleMethod, members: Sequence[LinearRef]
) -> tuple[list[Part], list[Skipped]]:
    """The parts a method will work on, and the linears it leaves alone, each with the reason.

    Raises:
        ValueError: nothing is left to work on.
    """
    found, left = parts(model, members)
    taken: list[Part] = []
    for part in found:
        reason = method.refuses(part)
        if reason is None:
            taken.append(part)
        else:
            left += [Skipped(ref.name, reason, ref.in_features * ref.out_features) for ref in part.linears]
    if not taken:
        reasons = "; ".join(dict.fromkeys(entry.reason for entry in left))
        raise ValueError(f"{type(method).__name__} finds no attention and no MLP that it can change here: {reasons}")
    return taken, left


@dataclass
class ModuleWalk:
    """One compression of one model, part by part.

    Attributes:
        method: how.
        ratio: fraction of the parts' weights to remove.
        by_influence: whether blocks share the ratio by their influence, or each the same.
        form: how factors are stored.
        parts: what to work on, in the model's order.
        model: the model, changed in place.
        blocks: its blocks.
        batches: calibration data.
        given: statistics gathered beforehand, by linear.
        progress: show bars.
        layers: what was done, by linear.
        biases: how many numbers went with biases that became shorter.
        dense: names of parts that stay as they are.
        skipped: linears that are left alone, with the reason.
        notes: what a policy found out; nothing.
        selected: numbers in the parts' weights before.
    """

    method: ModuleMethod
    ratio: float
    by_influence: bool
    form: Form
    parts: Sequence[Part]
    model: torch.nn.Module
    blocks: Sequence[Block]
    batches: Sequence[Batch]
    given: dict[str, Statistics] = field(default_factory=dict)
    progress: bool = True
    layers: dict[str, LayerResult] = field(default_factory=dict)
    biases: int = 0
    dense: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    selected: int = field(init=False)

    def __post_init__(self) -> None:
        self.selected = sum(ref.in_features * ref.out_features for part in self.parts for ref in part.linears)

    def run(self) -> None:
        """Share the ratio over blocks, then calibrate and change each part."""
        removed = torch.full((len(self.blocks),), self.ratio, dtype=torch.float64)
        if self.by_influence:
            influence = block_influence(self.model, self.blocks, self.batches, progress=self.progress)
            removed = self._only_where_parts_are(influence)
        replay = Replay(self.model, self.blocks, self.batches)
        hidden: Hidden | None = None
        for index, block in enumerate(track(self.blocks, "compress", enabled=self.progress)):
            mine = [part for part in self.parts if block_of(part.linears[0].name, [block]) is not None]
            statistics, entering, leaving = self.given, None, hidden
            if not self.given and self.method.needs:
                members = [ref for part in mine for ref in part.linears]
                entering = replay.enter(index, hidden)
                statistics, leaving = collect(replay, index, entering, members, self.method.needs)
            self._change(mine, statistics, 1 - float(removed[index]))
            if entering is not None:
                hidden = replay.advance(index, entering) if self.method.sequential else leaving
            if statistics is not self.given:
                statistics.clear()
                release_memory()

    def _only_where_parts_are(self, influence: torch.Tensor) -> torch.Tensor:
        """Shares over the blocks that have parts, weighted so that all parts together meet the ratio."""
        sizes = torch.zeros(len(self.blocks), dtype=torch.float64)
        for part in self.parts:
            for index, block in enumerate(self.blocks):
                if block_of(part.linears[0].name, [block]) is not None:
                    sizes[index] += sum(ref.in_features * ref.out_features for ref in part.linears)
        at = sizes > 0
        removed = torch.zeros_like(sizes)
        removed[at] = block_shares(influence[at], self.ratio)
        kept = (1 - removed) * (1 - self.ratio) * sizes.sum() / ((1 - removed) * sizes).sum()
        return 1 - kept.clamp(max=1)

    def _change(self, mine: Sequence[Part], statistics: Mapping[str, Statistics], kept: float) -> None:
        """Each part of a block in turn; what an earlier one saved too much by rounding, the next ones may keep."""
        spent, whole = 0, 0
        for part in mine:
            size = sum(ref.in_features * ref.out_features for ref in part.linears)
            whole += size
            reached = all(ref.name in statistics for ref in part.linears) or not self.method.needs
            change, budget = None, int(kept * whole - spent)
            # Where an earlier part could not shrink, this one makes up for it, or if it cannot, does its own share.
            for limit in sorted({budget, max(budget, int(kept * size))}) if reached and kept < 1 else ():
                try:
                    change = self.method.compress(part, statistics, limit, self.form)
                except LinalgError as failure:
                    raise LinalgError(f"{part.name}: {failure}") from failure
                if change is not None:
                    spent += self._put(part, change, limit)
                    break
            if change is None:
                self.dense.append(part.name)
                self.layers.update({ref.name: left_dense(ref) for ref in part.linears})
                spent += size

    def _put(self, part: Part, change: Change, budget: int) -> int:
        """Put the new linears in their places; how many numbers their weights hold."""
        refs = {ref.name: ref for ref in part.linears}
        records: dict[str, LayerResult] = {}
        for name, structure in change.structures.items():
            structure.to(refs[name].dtype)
            if not all(all_finite(p) for p in structure.parameters()):
                raise LinalgError(f"{name}: the new weights do not fit in {refs[name].dtype}; compress in float32")
            records[name] = _record(refs[name], structure, change.errors.get(name, 0.0))
        for name in refs.keys() - change.structures.keys():
            records[name] = left_dense(refs[name])
        stored = sum(record.parameters for record in records.values())
        if stored > budget:
            raise RuntimeError(
                f"{part.name}: {type(self.method).__name__} kept {stored:,} numbers of at most {budget:,}"
            )
        for name, structure in change.structures.items():
            old = refs[name].bias
            if old is not None and structure.bias is not None:
                self.biases += old.numel() - structure.bias.numel()
        with uninterrupted():  # heads of two widths would be no model
            for name, structure in change.structures.items():
                replace(self.model, name, structure, resize=True)
            if change.geometry is not None:
                set_geometry(part.module, change.geometry)
        self.layers.update({ref.name: records[ref.name] for ref in part.linears})
        return stored

    def messages(self) -> list[str]:
        """What the user did not ask for: parts that stay dense."""
        if not self.dense:
            return []
        more = f" and {len(self.dense) - 3} more" if len(self.dense) > 3 else ""
        return [f"{', '.join(self.dense[:3])}{more} stay as they are: no smaller width fits, or no token came there"]


def _record(ref: LinearRef, structure: Structure, error: float) -> LayerResult:
    bias = 0 if structure.bias is None else structure.bias.numel()
    parameters = structure.num_parameters() - bias
    if isinstance(structure, LowRank):
        return LayerResult(ref.name, ref.shape, structure.rank, structure.form, parameters, error)
    smallest = min(structure.out_features, structure.in_features)
    form = "pruned" if isinstance(structure, Dense) else structure.type_name
    return LayerResult(ref.name, ref.shape, smallest, form, parameters, error)
