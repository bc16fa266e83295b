"""From a checked request to the walk that will do it, for each scope of method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import nn

from ..models.calibrate import SEQUENTIAL, calibrate
from ..models.evaluate import model_bytes
from ..models.finite import check_finite
from ..models.fisher import fisher
from ..models.heads import head_axes
from ..models.influence import block_influence
from ..models.result import LayerResult
from ..models.select import Selection, Skipped, linears
from ..models.topology import Block, blocks
from .budget import Budget
from .checks import check_statistics, inside_blocks
from .contract import Job, LayerMethod, ModelMethod, ModuleMethod
from .modules import ModuleWalk, choose_parts
from .policies import Policy, SharedPolicy, is_spectral, needs_text, shares_of
from .request import AnyMethod, Request
from .runner import Plan, Walk
from .search import search

__all__ = ["Work", "needs_data", "policy_of", "prepare"]


def policy_of(method: AnyMethod, allocation: Policy | None) -> Policy:
    """How the budget is shared: as asked for, or as the method does unless told otherwise."""
    return allocation or ("uniform" if isinstance(method, ModelMethod) else method.allocation)


def needs_data(method: AnyMethod, budget: Budget, allocation: Policy | None = None) -> bool:
    """Whether calibration data is needed, by the method itself or by how its budget is shared."""
    if isinstance(method, ModelMethod):
        return method.data
    policy = policy_of(method, allocation)
    if budget.is_shared and needs_text(policy):
        return True
    if isinstance(method, ModuleMethod):
        return bool(method.needs)
    return bool(method.gathers) or (budget.needs_spectra(policy) and bool(method.surveys))


class Work(Protocol):
    """What a scope does once everything is checked.

    Attributes:
        model: the model, another one afterwards if the method makes a new one.
        layers: what was done so far, by layer.
        skipped: what was left alone, with the reason.
        biases: numbers that went with biases, which are not selected.
        notes: what a policy found out, for the settings of the result.
    """

    model: nn.Module
    layers: dict[str, LayerResult]
    skipped: list[Skipped]
    biases: int
    notes: dict[str, Any]

    @property
    def selected(self) -> int:
        """Numbers in the selected weights before."""
        ...

    def run(self) -> None:
        """Do it, in place."""

    def messages(self) -> list[str]:
        """What the user did not ask for and should know."""
        ...


def prepare(model: nn.Module, request: Request) -> Work:
    """Check the rest of the request and gather what is needed before the first layer is touched.

    Raises:
        ValueError: naming what is wrong; the model is unchanged.
    """
    method = request.method
    if request.streaming is not None:
        request.streaming.engine.check(method, request.name)
    if isinstance(method, ModelMethod):
        return _Whole.of(model, method, request)
    repeated = blocks(model)
    selection = inside_blocks(linears(model, request.where), repeated)
    check_finite(model)
    if isinstance(method, ModuleMethod):
        return _modules(model, method, request, repeated, selection)
    return _layers(model, method, request, repeated, selection)


def _layers(
    model: nn.Module, method: LayerMethod, request: Request, repeated: list[Block], selection: Selection
) -> Work:
    members, budget, policy, given = selection.linears, request.budget, request.policy, request.given
    surveys = method.surveys if budget.needs_spectra(policy) else frozenset()
    by_fisher = policy == "fisher" and budget.is_shared
    if given:
        wanted = method.gathers | surveys | (frozenset({"fisher"}) if by_fisher else frozenset())
        check_statistics(given, members, wanted - SEQUENTIAL)
    sharing = None if is_spectral(policy) or not budget.is_shared else policy
    forward = (bool(method.gathers | surveys) and not given) or method.sequential
    reads = needs_text(policy) and budget.is_shared and not (by_fisher and given)
    batches = request.batches() if forward or reads else []
    if "fisher" in method.gathers:
        request.in_memory("needs gradients of the whole model")
    if by_fisher:
        request.in_memory("with allocation='fisher' needs gradients of the whole model")
    size = model_bytes(model)
    plan = Plan(method, budget, policy, request.form, members, size)
    walk = Walk(plan, model, repeated, batches, given=given, progress=request.progress)
    walk.skipped = selection.skipped
    if request.streaming is not None:
        streaming = request.streaming
        walk.weights, walk.engine, walk.finished = streaming.weights, streaming.engine, streaming.finished
    if sharing:
        request.in_memory(f"with allocation={sharing!r} looks at the whole model first")
        ratio = request.ratio({r.name: r.shape for r in members}, size, members[0].dtype.itemsize, request.form)
        walk.plan = replace(plan, shares=_shares(walk, request, sharing, ratio))
    if "fisher" in method.gathers and not given:
        walk.given = calibrate(model, batches, method.gathers, where=request.where, progress=request.progress)
    if by_fisher:
        known = walk.given or fisher(model, batches, members, progress=request.progress)
        sums = {name: float(entry.require("fisher").sum()) for name, entry in known.items()}
        walk.plan = replace(walk.plan, information=sums)
    return walk


def _shares(walk: Walk, request: Request, policy: Policy, ratio: float) -> dict[str, float]:
    """The fraction of each linear to remove, by a policy that looks at no spectrum."""
    if policy == "search":
        found = search(walk, ratio, request.where, request.evaluations)
        walk.notes = {"search": found.to_dict()}
        return found.shares
    influence = roles = None
    if policy == "block-influence":
        influence = block_influence(walk.model, walk.blocks, walk.batches, progress=request.progress)
    else:
        roles = {axis.name: axis.role for axis in head_axes(walk.model)}
    return shares_of(
        cast(SharedPolicy, policy), walk.plan.members, walk.blocks, ratio, influence=influence, roles=roles
    )


def _modules(
    model: nn.Module, method: ModuleMethod, request: Request, repeated: list[Block], selection: Selection
) -> Work:
    request.in_memory("changes attention and MLPs as wholes")
    if request.policy not in ("uniform", "block-influence"):
        raise ValueError(
            f"{request.name} shares a budget over blocks: allocation must be uniform or block-influence, "
            f"not {request.policy}"
        )
    chosen, left = choose_parts(model, method, selection.linears)
    refs = [ref for part in chosen for ref in part.linears]
    ratio = request.ratio({r.name: r.shape for r in refs}, model_bytes(model), refs[0].dtype.itemsize, "plain")
    if request.given:
        if method.sequential:
            raise ValueError(f"{request.name} calibrates on what it has compressed already; statistics= is no use")
        check_statistics(request.given, refs, method.needs)
    by_influence = request.policy == "block-influence"
    batches = request.batches() if by_influence or (method.needs and not request.given) else []
    walk = ModuleWalk(
        method, ratio, by_influence, request.form, chosen, model, repeated, batches, request.given, request.progress
    )
    walk.skipped = [*selection.skipped, *left]
    return walk


@dataclass
class _Whole:
    """A method of the whole model."""

    model: nn.Module
    method: ModelMethod
    job: Job
    layers: dict[str, LayerResult] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    biases: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, method: ModelMethod, request: Request) -> _Whole:
        """After the method's own check."""
        request.in_memory("needs the whole model")
        if request.policy != "uniform":
            raise ValueError(f"{request.name} shares its budget itself; leave out allocation")
        if request.budget.unit != "ratio":
            raise ValueError(f"{request.name} takes a ratio, not {request.budget.unit}")
        members: Sequence[Any] = []
        skipped: list[Skipped] = []
        if method.on_linears:
            selection = inside_blocks(linears(model, request.where), blocks(model))
            members, skipped = selection.linears, selection.skipped
        check_finite(model)
        batches = request.batches() if method.data else []
        job = Job(model, request.budget.value, members, batches, request.progress)
        method.check(job)
        return cls(model, method, job, skipped=skipped)

    @property
    def selected(self) -> int:
        """Numbers of the layers that it worked on, before."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    def run(self) -> None:
        """Let the method do it."""
        with torch.enable_grad():
            self.model, layers = self.method.compress(self.job)
        self.layers = {layer.name: layer for layer in layers}

    def messages(self) -> list[str]:
        """Methods warn themselves."""
        return []
