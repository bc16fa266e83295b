"""Q-GaLore: GaLore with its basis in four bits and its moments in eight, refreshed less often where it has settled.

    R = A Q̂ (a, r),   W ← W - lr · scale · N(R) Q̂ᵀ,   Q̂ = s (code - z), code from 0 to 15,   A = G or Gᵀ, Q (b, r)
    interval ← 2 interval   once |cos| of the leading vectors of old and new Q is 0.4 in the mean of five refreshes

Z. Zhang, A. Jaiswal, L. Yin, S. Liu, J. Zhao, Y. Tian, Z. Wang, "Q-GaLore: Quantized GaLore with INT4 Projection and
Layer-Adaptive Low-Rank Gradients", 2024, arXiv:2407.08296. Code: github.com/VITA-Group/Q-GaLore.

The paper's weights of eight bits, rounded at random, are independent of the optimizer: `eckart.optim.int8_weights`
makes them, and every optimizer here writes back to them at random.

What differs. The codes are packed two to a byte, where the official code stores one, and s and z are part of the state.
A group is up to 256 neighbours in a column of Q instead of in all of it, so that every shape works, and its range
always contains 0, without which a group of one sign is stored wrongly. The cosine is taken without its sign, which
singular vectors do not have. Refreshes are counted from the last one, so that a longer interval never makes one come
early. As in `eckart.optim.galore` one step of orthogonal iteration stands for a decomposition, which makes the old and
the new basis somewhat more alike, and the matrices take turns. INT8 weights follow torchao: scales per row instead of
per 256 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .contract import Step
from .galore import GaLore
from .moments import State
from .optimizer import ProjectedOptimizer
from .projection import carry_moments
from .sharding import lift_product, right_product

__all__ = ["QGaLore", "QGaLoreAdamW", "QGaLoreAdamW32bit", "packed", "unpacked"]

Similarity = Literal["leading", "subspace"]

_GROUP = 256  # numbers that share a scale, in the paper


@dataclass(frozen=True)
class QGaLore(GaLore):
    """The options of Q-GaLore, after those of `GaLore`.

    Args:
        bits: Of each stored moment, 8 or 32.
        update_interval: Updates between the first refreshes; 200 in the paper, 500 at 7B.
        basis_bits: 4, or 32 for a basis as it is found.
        similarity: Of an old and a new basis: |cos| of their "leading" vectors, or the "subspace" overlap
            ‖Qᵀ Q'‖² / r, which all vectors count for; ours.
        threshold: Mean similarity from which the interval grows.
        queue_size: Refreshes that the mean is taken over.
        growth: By which the interval is multiplied, at each refresh at which the mean is that high.
    """

    bits: int = 8
    basis_bits: int = 4
    similarity: Similarity = "leading"
    threshold: float = 0.4
    queue_size: int = 5
    growth: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(similarity=Similarity)
        self.check_positive(queue_size=self.queue_size, growth=self.growth)
        if self.basis_bits not in (4, 32):
            raise ValueError(f"basis_bits must be 4 or 32, not {self.basis_bits}")

    def allocate_basis(self, basis: Tensor) -> State:
        """The basis and when it is refreshed. What is read before each update is on the CPU, to wait for no device."""
        counts = {name: torch.zeros((), dtype=torch.int64) for name in ("due", "interval", "refreshes")}
        similar = torch.zeros(self.queue_size, dtype=torch.float32, device=basis.device)
        return {**({"basis": basis} if self.basis_bits == 32 else packed(basis)), **counts, "similar": similar}

    def basis(self, state: State, like: Tensor) -> Tensor:
        """Q̂ (b, r) in the dtype of ``like``, whose second axis is projected."""
        if self.basis_bits == 32:
            return state["basis"]
        return unpacked(state, like.shape[1], like.dtype)

    def project(self, a: Tensor, state: State, step: Step) -> Tensor:
        """Refreshes Q when it is due."""
        if step.number < int(state["due"]):
            return right_product(a, self.basis(state, a))
        old = None if step.number == 1 else self.basis(state, a)
        fresh, low = self.fresh_basis(a, old, step)
        if old is not None and self.carry:
            carry_moments(state, old, fresh)
        self.schedule(old, fresh, state, step)
        if self.basis_bits == 32:
            state["basis"].copy_(fresh)
            return low
        for name, value in packed(fresh).items():
            state[name].copy_(value)
        return right_product(a, self.basis(state, a))

    def lift(self, n: Tensor, a: Tensor, state: State) -> Tensor:
        """n Q̂ᵀ (a, b)."""
        return lift_product(n, self.basis(state, a), a)

    def schedule(self, old: Tensor | None, fresh: Tensor, state: State, step: Step) -> None:
        """When the next refresh is due, by how much this one changed the basis."""
        queue, interval = state["similar"], state["interval"]
        if old is None:
            interval.fill_(self.update_interval)
            early = step.phase(self.update_interval) if self.stagger else 0
        else:
            early = 0
            queue.copy_(torch.cat([queue[1:], similarity(old, fresh, self.similarity)[None].to(queue.dtype)]))
        state["refreshes"] += 1
        if int(state["refreshes"]) > self.queue_size and float(queue.mean()) >= self.threshold:
            interval *= self.growth
        state["due"].copy_(step.number + interval - early)


def similarity(old: Tensor, new: Tensor, kind: Similarity = "leading") -> Tensor:
    """How alike two bases are, a scalar from 0 to 1.

    Args:
        old: Q (b, r), nearly orthonormal.
        new: Q' (b, r), orthonormal.
        kind: See `QGaLore`.
    """
    if kind == "subspace":
        return (old.mT @ new).square().sum() / new.shape[1]
    return torch.nn.functional.cosine_similarity(old[:, 0], new[:, 0], dim=0).abs()


def packed(q: Tensor) -> State:
    """Q (b, r) in four bits, as tensors for a state.

    Returns:
        "basis" uint8 (r, ⌈b/2⌉), two codes to a byte, "basis_scale" float32 (r, ⌈b/256⌉) and "basis_zero" uint8.

    Example:
        >>> {name: tuple(value.shape) for name, value in packed(torch.zeros(301, 4)).items()}
        {'basis': (4, 151), 'basis_scale': (4, 2), 'basis_zero': (4, 2)}
    """
    columns = q.mT
    groups = columns.split(_GROUP, dim=1)
    low = torch.stack([group.amin(dim=1) for group in groups], dim=1).clamp(max=0)
    high = torch.stack([group.amax(dim=1) for group in groups], dim=1).clamp(min=0)
    scale = ((high - low) / 15).to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round()
    codes = (columns / _spread(scale, columns) + _spread(zero, columns)).round().clamp(0, 15).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return {"basis": codes[:, ::2] | codes[:, 1::2] << 4, "basis_scale": scale, "basis_zero": zero.to(torch.uint8)}


def unpacked(state: State, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Q̂ (b, r) that `packed` stored.

    Args:
        state: With its three tensors.
        rows: b.
        dtype: Of the result.
    """
    pairs = state["basis"]
    codes = torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1)[:, :rows].to(dtype)
    return (_spread(state["basis_scale"], codes) * (codes - _spread(state["basis_zero"], codes))).mT


def _spread(groups: Tensor, like: Tensor) -> Tensor:
    """(r, groups) to (r, b)."""
    return groups.to(like.dtype).repeat_interleave(_GROUP, dim=1)[:, : like.shape[1]]


class QGaLoreAdamW(ProjectedOptimizer):
    """AdamW on gradients projected by a basis of four bits, moments of eight. Options as `QGaLore`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(8, 6))
        >>> optimizer = QGaLoreAdamW([weight], lr=0.1, rank=2)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[weight]["basis"].dtype, optimizer.state[weight]["basis"].shape
        (torch.uint8, torch.Size([2, 3]))
    """

    method: ClassVar[type[QGaLore]] = QGaLore
    options: ClassVar[dict[str, Any]] = {}


class QGaLoreAdamW32bit(QGaLoreAdamW):
    """`QGaLoreAdamW` with moments of 32 bits."""

    options: ClassVar[dict[str, Any]] = {"bits": 32}
