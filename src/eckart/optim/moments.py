"""Moments of a gradient as plain tensors, in 32 bits or in 8.

    8 bits:   c = round(levels (|x| / s)^(1/p)),   x ≈ sign(x) s (c / levels)^p,   s the largest |x| of its block

A block is up to 256 neighbours in a row, so rows may be spread over devices and spread anew. The power p makes the
steps finer towards 0, as the codebook of "8-bit Optimizers via Block-wise Quantization" (Dettmers, Lewis, Shleifer and
Zettlemoyer, 2021, arXiv:2110.02861) does: with p = 4 a first moment 1e-4 of the largest is kept to 16 %, with p = 8 a
second moment 1e-8 of the largest too, and none is rounded to 0, which would make its update explode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sharding import from_local, local

__all__ = ["State", "allocate", "load", "reindexed", "store"]

State = dict[str, Tensor]

_BLOCK = 256
_LEVELS = {torch.int8: 127, torch.uint8: 255}
_ROOTS = {torch.int8: 2, torch.uint8: 3}  # how many square roots make up the power 1/p


def allocate(name: str, like: Tensor, *, bits: int = 32, signed: bool = True) -> State:
    """The tensors that hold a moment, as zeros.

    Args:
        name: Of the moment.
        like: Its shape, device and placement, in the dtype of the arithmetic.
        bits: 32 for ``like``'s dtype, or 8. A vector or a scalar keeps its dtype, as its share is small.
        signed: Whether it may be negative.

    Example:
        >>> {key: tuple(value.shape) for key, value in allocate("first", torch.empty(3, 300), bits=8).items()}
        {'first': (3, 300), 'first_scale': (3, 2)}
    """
    if bits == 32 or like.ndim < 2:
        return {name: torch.zeros_like(like)}
    own = local(like)
    codes = torch.zeros(own.shape, dtype=torch.int8 if signed else torch.uint8, device=own.device)
    blocks = -(-own.shape[1:].numel() // _BLOCK)
    scale = torch.zeros(own.shape[0], blocks, dtype=torch.float32, device=own.device)
    return {
        name: from_local(codes, like),
        f"{name}_scale": from_local(scale, like, shape=(like.shape[0], blocks)),
    }


def load(state: State, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A moment for arithmetic; of 32 bits the stored tensor itself."""
    if f"{name}_scale" not in state:
        return state[name]
    codes, scale = local(state[name]), local(state[f"{name}_scale"])
    values = codes.to(dtype).flatten(1) / _LEVELS[codes.dtype]
    sign = values.sign()
    for _ in range(_ROOTS[codes.dtype]):
        values = values.square()
    values = sign * values * _spread(scale, values.shape[1]).to(dtype)
    return from_local(values.reshape(codes.shape), state[name])


def store(state: State, name: str, value: Tensor) -> None:
    """Keep a moment."""
    if f"{name}_scale" not in state:
        if value is not state[name]:
            state[name].copy_(value)
        return
    codes, scale, own = local(state[name]), local(state[f"{name}_scale"]), local(value).flatten(1)
    pieces = own.abs().split(_BLOCK, dim=1)
    largest = torch.stack([piece.amax(dim=1) for piece in pieces], dim=1) if own.numel() else scale
    relative = own.abs() / _spread(largest, own.shape[1]).clamp(min=torch.finfo(own.dtype).tiny)
    for _ in range(_ROOTS[codes.dtype]):
        relative = relative.sqrt()
    rounded = (relative * _LEVELS[codes.dtype]).round()
    codes.copy_((rounded * own.sign() if codes.dtype == torch.int8 else rounded).reshape(codes.shape))
    scale.copy_(largest)


def reindexed(value: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """What is kept for a selection, for another one: of indices that are in both as it was, of new ones 0.

    Args:
        value: (..., k), k numbers for k indices; its last axis is not sharded.
        old: (k,) sorted.
        new: (l,).

    Example:
        >>> reindexed(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 4, 7]), torch.tensor([4, 5, 7]))
        tensor([2., 0., 3.])
    """
    place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    own = local(value).index_select(-1, place)
    own.masked_fill_(old[place] != new, 0)
    return from_local(own, value, shape=(*value.shape[:-1], len(new)))


def _spread(scale: Tensor, columns: int) -> Tensor:
    """(rows, blocks) to (rows, columns)."""
    return scale.repeat_interleave(_BLOCK, dim=1)[:, :columns]
