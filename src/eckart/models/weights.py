"""Work on every selected weight of a model, in memory or on disk, without more memory than a few weights take."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from .adapted import adapted_linears
from .checkpoint import resolve
from .memory import release_memory
from .parallel import parallel_map
from .progress import track
from .select import LinearRef, Selection, Where
from .stored import StoredRef, stored_linears

__all__ = ["MEMORY", "decomposition_cost", "map_weights", "weights_of"]

R = TypeVar("R")

#: Bytes that weights at work take at most by default, with what is computed from them.
MEMORY = 640e6
# Work at a time, as m n min(m, n): enough for every core to have some to the end, little enough for the bar to move.
_GROUP = 1e10


def weights_of(model: nn.Module | str | os.PathLike[str], where: Where | None = None) -> Selection:
    """Select the weight matrices of a model, or of a checkpoint that stays on disk.

    Args:
        model: a model, with adapters on it or without; or what `eckart.models.load` takes, of which each weight is
            read when asked for.
        where: which linear maps, as in `linears`.

    Raises:
        FileNotFoundError: no such model, no safetensors in it, or a shard is missing.
        LayoutError: the checkpoint has to be loaded as a whole.
        ValueError: as for `linears`.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 3))])})
        >>> [ref.name for ref in weights_of(model).linears]
        ['layers.0.0']
    """
    return adapted_linears(model, where) if isinstance(model, nn.Module) else stored_linears(resolve(model), where)


def map_weights(
    function: Callable[[LinearRef], R],
    refs: Sequence[LinearRef],
    description: str,
    *,
    memory: float = MEMORY,
    progress: bool = True,
) -> list[R]:
    """Results of ``function`` for every weight, in order; several at a time as far as memory allows.

    Args:
        function: called with a weight; decomposes it and lets go of it.
        refs: the weights.
        description: of the bar.
        memory: bytes that the weights at work may take with what is computed from them. One weight is always worked
            on, whatever it takes.
        progress: show a bar with the time left.

    Raises:
        ValueError: memory not positive.
    """
    if not memory > 0:
        raise ValueError(f"memory must be a positive number of bytes, not {memory}")
    stored = any(isinstance(ref, StoredRef) for ref in refs)
    found: list[R] = []
    for group in track(_groups(refs), description, enabled=progress):
        workers = max(1, min(torch.get_num_threads(), int(memory // max(map(_bytes, group)))))
        found += parallel_map(function, group, cost=decomposition_cost, workers=workers)
        if stored:
            release_memory()
    return found


def _groups(refs: Sequence[LinearRef]) -> list[list[LinearRef]]:
    """Neighbours that are about as much work together as `_GROUP`, or eight."""
    groups: list[list[LinearRef]] = []
    for ref in refs:
        if not groups or (len(groups[-1]) >= 8 and sum(map(decomposition_cost, groups[-1])) >= _GROUP):
            groups.append([])
        groups[-1].append(ref)
    return groups


def decomposition_cost(ref: LinearRef) -> float:
    """m n min(m, n), what decomposing a weight takes beside another."""
    m, n = ref.shape
    return m * n * min(m, n)


def _bytes(ref: LinearRef) -> int:
    """Bytes at work: the weight as it is mapped and read, a float32 copy, and four float64 squares."""
    m, n = ref.shape
    return m * n * (2 * ref.dtype.itemsize + 4) + 32 * min(m, n) ** 2
