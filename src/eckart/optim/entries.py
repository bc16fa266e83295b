"""Single entries and whole rows of a matrix whose rows, or columns, are spread over processes.

An entry is named by its place in the whole matrix, counted row by row: the same number in every process and in every
number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from .sharding import from_local, local, whole

__all__ = ["add_entries", "entries", "gathered_rows", "set_entries", "top_entries"]


def entries(a: Tensor, index: Tensor) -> Tensor:
    """The entries (k,), plain and the same in every process; k numbers are exchanged.

    Args:
        a: (m, n).
        index: (k,) places.

    Example:
        >>> entries(torch.arange(6.0).reshape(2, 3), torch.tensor([4, 0]))
        tensor([4., 0.])
    """
    held, rows, columns = _held(a, index)
    own = local(a)
    found = own.new_zeros(index.shape)
    found[held] = own[rows, columns]
    return _summed(found, a)


def set_entries(a: Tensor, index: Tensor, values: Tensor) -> None:
    """Write entries (k,) in place; each process writes those that it holds.

    Args:
        a: (m, n).
        index: (k,) places, none twice.
        values: (k,), the same in every process.
    """
    held, rows, columns = _held(a, index)
    local(a)[rows, columns] = values[held]


def add_entries(a: Tensor, index: Tensor, values: Tensor) -> None:
    """As `set_entries`, but adds."""
    held, rows, columns = _held(a, index)
    local(a)[rows, columns] += values[held]


def top_entries(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest entries and their places, (count,) each, plain and the same in every process.

    Every process offers its own largest ones: ``count`` numbers each are exchanged, never the matrix.

    Args:
        a: (m, n).
        count: At most m n.

    Example:
        >>> top_entries(torch.tensor([[1.0, 5.0], [3.0, 2.0]]), 2)
        (tensor([5., 3.]), tensor([1, 2]))
    """
    (top, _), (left, right) = _bounds(a)
    own = local(a)
    values, places = own.flatten().topk(min(count, own.numel()))
    width = max(right - left, 1)  # no column, no entry
    index = (places // width + top) * a.shape[1] + places % width + left
    if not isinstance(a, DTensor):
        return values, index
    offered = own.new_full((1, count), -torch.inf)
    where = index.new_zeros(1, count)
    offered[0, : values.numel()], where[0, : values.numel()] = values, index
    rows = [placement if placement.is_replicate() else Shard(0) for placement in a.placements]
    (values, index) = (
        DTensor.from_local(part, a.device_mesh, rows, run_check=False).full_tensor().flatten()
        for part in (offered, where)
    )
    values, order = values.topk(count)
    return values, index[order]


def gathered_rows(a: Tensor, rows: Tensor) -> Tensor:
    """Some rows (k, n), plain and the same in every process; only they are exchanged.

    Args:
        a: (m, n).
        rows: (k,) numbers.
    """
    (top, bottom), _ = _bounds(a)
    own = local(a)
    if own.shape[0] == a.shape[0]:
        return whole(from_local(own[rows], a, shape=(len(rows), a.shape[1])))
    held = (rows >= top) & (rows < bottom)
    found = own.new_zeros(len(rows), own.shape[1])
    found[held] = own[rows[held] - top]
    return _summed(found, a)


def _bounds(a: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """The ranges [start, stop) of rows and of columns that this process holds."""
    spans = [(0, size) for size in a.shape]
    if isinstance(a, DTensor):
        for axis, placement in enumerate(a.placements):
            if isinstance(placement, Shard):
                size = a.shape[placement.dim]
                part = -(-size // a.device_mesh.size(axis))
                start = min(a.device_mesh.get_local_rank(axis) * part, size)
                spans[placement.dim] = (start, min(start + part, size))
    return spans[0], spans[1]


def _held(a: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries (k,) this process holds, and their rows and columns here."""
    (top, bottom), (left, right) = _bounds(a)
    rows, columns = index // a.shape[1], index % a.shape[1]
    held = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return held, rows[held] - top, columns[held] - left


def _summed(own: Tensor, like: Tensor) -> Tensor:
    """The sum over the processes that share a matrix of what each holds of it."""
    if not isinstance(like, DTensor):
        return own
    parts = [placement if placement.is_replicate() else Partial() for placement in like.placements]
    return DTensor.from_local(own, like.device_mesh, parts, run_check=False).full_tensor()
