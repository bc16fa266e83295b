"""From a checked request to the walk that will do it, for each scope of method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import nn

from ..linalg.rank import Form
from ..models.batches import as_batches, text_batches
from ..models.calibrate import SEQUENTIAL, Statistics, calibrate
from ..models.evaluate import model_bytes
from ..models.finite import check_finite
from ..models.heads import head_axes
from ..models.influence import block_influence
from ..models.replay import Batch
from ..models.result import LayerResult
from ..models.select import Selection, Skipped, Where, linears
from ..models.topology import Block, blocks
from .budget import Budget
from .checks import check_statistics, inside_blocks
from .contract import Job, LayerMethod, ModelMethod, ModuleMethod
from .engine import Engine
from .finished import Finished
from .modules import ModuleWalk, choose_parts
from .policies import Policy, SharedPolicy, is_spectral, shares_of
from .runner import Plan, Walk, Weights

__all__ = ["AnyMethod", "Request", "Streaming", "Work", "needs_data", "policy_of", "prepare"]

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


def policy_of(method: AnyMethod, allocation: Policy | None) -> Policy:
    """How the budget is shared: as asked for, or as the method does unless told otherwise."""
    return allocation or ("uniform" if isinstance(method, ModelMethod) else method.allocation)


def needs_data(method: AnyMethod, budget: Budget, allocation: Policy | None = None) -> bool:
    """Whether calibration data is needed, by the method itself or by how its budget is shared."""
    if isinstance(method, ModelMethod):
        return method.data
    policy = policy_of(method, allocation)
    if budget.is_shared and policy == "block-influence":
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
    """

    model: nn.Module
    layers: dict[str, LayerResult]
    skipped: list[Skipped]
    biases: int

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
    if given:
        check_statistics(given, members, (method.gathers | surveys) - SEQUENTIAL)
    sharing = None if is_spectral(policy) or not budget.is_shared else cast(SharedPolicy, policy)
    forward = (bool(method.gathers | surveys) and not given) or method.sequential
    batches = request.batches() if forward or sharing == "block-influence" else []
    if "fisher" in method.gathers:
        request.in_memory("needs gradients of the whole model")
        if not given:
            given = calibrate(model, batches, method.gathers, where=request.where, progress=request.progress)
    size = model_bytes(model)
    shares = None
    if sharing:
        request.in_memory(f"with allocation={sharing!r} looks at the whole model first")
        ratio = request.ratio({r.name: r.shape for r in members}, size, members[0].dtype.itemsize, request.form)
        influence = roles = None
        if sharing == "block-influence":
            influence = block_influence(model, repeated, batches, progress=request.progress)
        else:
            roles = {axis.name: axis.role for axis in head_axes(model)}
        shares = shares_of(sharing, members, repeated, ratio, influence=influence, roles=roles)
    plan = Plan(method, budget, policy, request.form, members, size, shares)
    walk = Walk(plan, model, repeated, batches, given=given, progress=request.progress)
    walk.skipped = selection.skipped
    if request.streaming is not None:
        streaming = request.streaming
        walk.weights, walk.engine, walk.finished = streaming.weights, streaming.engine, streaming.finished
    return walk


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
