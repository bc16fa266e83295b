"""Gradients whose rows are spread over processes, as FSDP2 leaves them.

A parameter of FSDP2 is a `DTensor` whose first axis is sharded over one axis of the mesh (and copied over the others).
A projected gradient G Q keeps that sharding, and products over the sharded axis, such as Gᵀ Y, are summed over the
processes: what is exchanged has rank r in one direction, never the whole matrix. The basis Q is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = [
    "any_process",
    "by_rows",
    "check_placement",
    "from_local",
    "left_product",
    "lift_product",
    "local",
    "placed_as",
    "right_product",
    "whole",
    "whole_norm",
]


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds; of a plain tensor, the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The same tensor on every process, plain; for what is small."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_norm(x: Tensor) -> Tensor:
    """The Frobenius norm of all of a tensor, a plain scalar that is the same in every process."""
    return whole(torch.linalg.vector_norm(x))


def from_local(own: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """What `local` is the inverse of: this process's part of a tensor placed like another one.

    Args:
        own: The part here.
        like: Where the placement is taken from; a plain tensor gives ``own`` back.
        shape: Of the whole, where it is not ``like``'s.
    """
    if not isinstance(like, DTensor):
        return own
    whole = torch.Size(like.shape if shape is None else shape)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, shape=whole, stride=stride)


def check_placement(tensor: Tensor, name: str) -> None:
    """Refuse a parameter that is sharded in another way.

    Raises:
        ValueError: With its name and placements.
    """
    if isinstance(tensor, DTensor):
        axes = [placement for placement in tensor.placements if not placement.is_replicate()]
        if len(axes) > 1 or any(type(axis) is not Shard or axis.dim != 0 for axis in axes):
            raise ValueError(
                f"{name} is placed as {tensor.placements}; only rows sharded over one axis of the mesh (FSDP2) are "
                "supported"
            )


def _copies(own: Tensor, like: DTensor) -> DTensor:
    placements = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(own, like.device_mesh, placements, run_check=False)


def right_product(a: Tensor, q: Tensor) -> Tensor:
    """a q, (m, r), for a (m, n) and a plain q (n, r): rows stay where they are.

    Where a is a transposed gradient, its columns are what is sharded; the sum over them is taken and each process
    keeps its part of the rows.
    """
    if not isinstance(a, DTensor):
        return a @ q
    product: Any = a @ _copies(q, a)
    rows = [Shard(0) if not placement.is_replicate() else placement for placement in a.placements]
    return product.redistribute(placements=rows)


def left_product(a: Tensor, y: Tensor) -> Tensor:
    """aᵀ y, (n, r), plain and the same in every process, for a (m, n) and y (m, r) as `right_product` gives it."""
    return whole(a.mT @ y)


def lift_product(n: Tensor, q: Tensor, like: Tensor) -> Tensor:
    """n qᵀ, (m, b), placed as ``like`` for n (m, r) and a plain q (b, r)."""
    if not isinstance(like, DTensor):
        return n @ q.mT
    if any(placement == Shard(1) for placement in like.placements):
        sharded: Any = n
        everywhere = sharded.redistribute(placements=[Replicate()] * like.device_mesh.ndim)
        rows: Any = _copies(q, like).redistribute(
            placements=[Shard(0) if placement == Shard(1) else placement for placement in like.placements]
        )
        return (rows @ everywhere.mT).mT
    return n @ _copies(q, like).mT


def by_rows(a: Tensor) -> Tensor:
    """a (m, n) with its rows sharded where its columns were, so that every row is in one process.

    The processes exchange the matrix for it once; none holds it whole, unless the backend (gloo) can only gather.
    """
    if not isinstance(a, DTensor):
        return a
    sharded: Any = a
    rows = [Shard(0) if placement == Shard(1) else placement for placement in a.placements]
    return sharded.redistribute(placements=rows)


def placed_as(a: Tensor, like: Tensor) -> Tensor:
    """a, placed as another matrix of its shape; undoes `by_rows`."""
    if not isinstance(like, DTensor):
        return a
    sharded: Any = a
    return sharded.redistribute(placements=like.placements)


def any_process(flag: bool, tensors: Sequence[Tensor]) -> bool:
    """Whether ``flag`` is set in any of the processes that share these tensors."""
    mesh = next((tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)), None)
    if mesh is None:
        return flag
    shared = torch.tensor(float(flag), device=mesh.device_type)
    for axis in range(mesh.ndim):
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=mesh.get_group(axis))
    return bool(shared > 0)
