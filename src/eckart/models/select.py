"""Which weight matrices of a model are meant: by default all linear maps of its repeated blocks.

Nothing is left out in silence. A weight of the selected part that cannot be treated, such as a 3-D bank of
experts or a tied embedding, is listed in :attr:`Selection.skipped` with the reason.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..structures import Structure
from ..structures.shared_factor import SharedFactor
from .kinds import Kind, is_norm, linear_kind, owners, untreatable
from .topology import block_of, blocks

__all__ = ["LinearRef", "Selection", "Skipped", "Where", "linears", "matching", "nearest"]

Where = str | Callable[[str, nn.Module], bool] | Sequence["str | Callable[[str, nn.Module], bool]"]


@dataclass(frozen=True)
class LinearRef:
    """A linear map y = x W^T + b inside a model, with W of shape (out, in) however it is stored.

    Attributes:
        name: full name of the module.
        module: the module.
        kind: ``"linear"``, ``"conv1d"`` (transformers' Conv1D, which stores W^T) or ``"structure"``.
    """

    name: str
    module: nn.Module = field(repr=False)
    kind: Kind

    @property
    def weight(self) -> Tensor:
        """W (out, in): a view that shares memory with the parameter; of a structure, a dense copy."""
        if isinstance(self.module, Structure):
            return self.module.dense()
        weight = self.module.get_parameter("weight")
        return weight.mT if self.kind == "conv1d" else weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (out,), or None."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), known without touching the weight."""
        if isinstance(self.module, Structure):
            return self.module.out_features, self.module.in_features
        rows, columns = self.module.get_parameter("weight").shape
        return (columns, rows) if self.kind == "conv1d" else (rows, columns)

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the stored floating-point parameters."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())


@dataclass(frozen=True)
class Skipped:
    """A weight of the selected part of the model that is left alone.

    Attributes:
        name: full name of the module, or of the parameter if it is not a linear module's.
        reason: why, for people to read.
        parameters: how many numbers it holds.
    """

    name: str
    reason: str
    parameters: int


@dataclass(frozen=True)
class Selection:
    """The result of :func:`linears`.

    Attributes:
        linears: the weight matrices to treat, in the model's order.
        skipped: what was meant too but cannot be treated.
    """

    linears: list[LinearRef]
    skipped: list[Skipped]


def linears(model: nn.Module, where: Where | None = None, *, quantized: bool = False) -> Selection:
    """Select weight matrices of a model.

    Args:
        model: any module; one on the meta device too.
        where: None for every linear map inside the repeated blocks (embeddings and output heads are outside).
            A string is a glob over full names or their last parts (``"*.q_proj"``, ``"q_proj"``,
            ``"layers.0.*"``), or after ``re:`` a regular expression to be found in the full name. A function
            of (name, module) is asked about every linear map. A list takes what any of its items takes.
        quantized: whether to take weights stored in few bits too, for what leaves them as they are.

    Returns:
        The linear maps and, separately, everything in the same range that cannot be treated: tied weights,
        3-D expert banks, bare matrices, embeddings, convolutions and quantized weights.

    Raises:
        ValueError: the model has no linear maps, or no repeated blocks and ``where`` is None, or an item of
            ``where`` matches nothing (the message gives the nearest names).

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(3, 4)) for _ in range(2))})
        >>> [ref.name for ref in linears(model).linears]
        ['layers.0.0', 'layers.1.0']
        >>> linears(model, "layers.1.*").linears[0].shape
        (4, 3)
    """
    every = {name: module for name, module in _outermost(model) if linear_kind(module)}
    if not every:
        raise ValueError(f"{type(model).__name__} has no linear layers (nn.Linear or Conv1D) to work on")
    bare = {name: owner for name, owner in _bare_matrices(model, every).items() if not is_norm(owner)}
    chosen = _in_blocks(model, [*every, *bare]) if where is None else matching(where, every, bare)

    names_of = owners(model)
    taken: list[LinearRef] = []
    skipped: list[Skipped] = []
    for name, module in every.items():
        if name not in chosen:
            continue
        kind = linear_kind(module)
        assert kind is not None
        reason = untreatable(module, quantized=quantized) or _tied(name, module, names_of)
        if reason is None:
            taken.append(LinearRef(name, module, kind))
        else:
            skipped.append(Skipped(name, reason, sum(p.numel() for p in module.parameters())))
    for name, module in bare.items():
        if name in chosen:
            parameter = module.get_parameter(name.rpartition(".")[2])
            skipped.append(Skipped(name, _why_bare(module, parameter), parameter.numel()))
    return Selection(taken, skipped)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the names of ``known`` that are nearest to ``name``, to end an error message with."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    return f"; nearest: {', '.join(close)}" if close else ""


def matching(where: Where, every: Mapping[str, nn.Module], others: Iterable[str] = ()) -> set[str]:
    """Return the names that ``where`` takes.

    Args:
        where: as in :func:`linears`.
        every: modules by name; a function is asked about each of them.
        others: further names, which a string may match too.

    Raises:
        ValueError: an item matches nothing; with the nearest names.

    Example:
        >>> sorted(matching("conv*", {"conv1": nn.Identity(), "conv2": nn.Identity(), "head": nn.Identity()}))
        ['conv1', 'conv2']
    """
    items = [where] if isinstance(where, str) or callable(where) else list(where)
    chosen: set[str] = set()
    for item in items:
        if callable(item):
            matched = {name for name, module in every.items() if item(name, module)}
        else:
            matched = {name for name in (*every, *others) if _matches(item, name)}
        if not matched:
            hint = nearest(item, (*every, *others)) if isinstance(item, str) else ""
            raise ValueError(f"where={item!r} matches no layer{hint}")
        chosen |= matched
    return chosen


def _outermost(model: nn.Module, prefix: str = "") -> Iterable[tuple[str, nn.Module]]:
    """Walk over all modules, but not into linear maps: a structure's parts are not layers of the model."""
    yield prefix, model
    if linear_kind(model) is None:
        for key, child in model.named_children():
            yield from _outermost(child, f"{prefix}.{key}".lstrip("."))


def _bare_matrices(model: nn.Module, every: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Find the parameters with two or more axes that belong to no linear map: full name to owning module."""
    return {
        f"{name}.{key}".lstrip("."): module
        for name, module in _outermost(model)
        if name not in every
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }


def _in_blocks(model: nn.Module, names: list[str]) -> set[str]:
    found = blocks(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks (an nn.ModuleList of layers); "
            "say which layers with where='NAME' or where='*'"
        )
    return {name for name in names if block_of(name, found) is not None}


def _matches(item: str, name: str) -> bool:
    if item.startswith("re:"):
        return re.search(item.removeprefix("re:"), name) is not None
    return fnmatch.fnmatchcase(name, item) or fnmatch.fnmatchcase(name, f"*.{item}")


def _tied(name: str, module: nn.Module, names_of: dict[int, list[str]]) -> str | None:
    for key, parameter in module.named_parameters():
        others = [other for other in names_of[id(parameter)] if other != f"{name}.{key}"]
        if others and parameter.ndim >= 2:
            return f"tied with {others[0]}"
    return None


def _why_bare(module: nn.Module, parameter: Tensor) -> str:
    shape = " x ".join(str(size) for size in parameter.shape)
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return f"embedding table ({shape}), read by index"
    if isinstance(module, SharedFactor):
        return f"factor ({shape}) of experts that are factored already"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"convolution kernel ({shape}) of {kind}"
    if parameter.ndim == 2:
        return f"bare matrix ({shape}) of {kind}, not a linear module"
    return f"{parameter.ndim}-D parameter ({shape}) of {kind}: a bank of matrices, not treated yet"
