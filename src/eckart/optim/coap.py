"""COAP: the subspace of GaLore moved by gradient steps that keep it near the momentum, and recalibrated now and then.

    R = A Q (a, r),   W ← W - lr · scale · N(R) Qᵀ,   A = G or Gᵀ (a, b), Q (b, r)
    f(Q) = ε (1 - c),   ε = ‖A - A Q Qᵀ‖² / ‖A‖²,   c the mean over the rows of G of their cosine with those of M Qᵀ
    every T updates   Q ← Q - η ∇f / max(1, ‖∇f‖),   every λ T   Q ← leading right singular vectors of A, from Q on

M (a, r) is the first moment that is there before the update. For G (m, n) with m < n, A is Gᵀ, and what is compared
are the columns of A.

J. Xiao, S. Sang, T. Zhi, J. Liu, Q. Yan, Y. Zhang, L. Luo, B. Yuan, "COAP: Memory-Efficient Training with
Correlation-Aware Gradient Projection", 2024, arXiv:2412.00071. Code: github.com/bytedance/coap.

What differs. The official code takes the mean of squares of A - A Q Qᵀ and not its share of ‖A‖²: at the size of the
gradients of a language model its step then is lost in rounding, and only the recalibrations are left
(``normalize=False`` is that form). ∇f is in closed form instead of by automatic differentiation. The recalibration
adds 16 random directions to Q, so that what Q has not seen can enter, and the first basis takes a second pass; the
matrices take turns (``stagger``). Convolutions, for which the paper has a Tucker decomposition, are left out and take
the dense rule. Decay comes first and ε is added to the corrected root, as in torch's AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..linalg import qr
from .contract import ProjectedMethod, Step, turned
from .moments import State, load
from .optimizer import ProjectedOptimizer
from .projection import carry_moments, improved_basis, inverse_norm, reconstruction_error
from .sharding import left_product, lift_product, right_product, whole

__all__ = ["COAP", "COAPAdamW", "COAPAdamW8bit"]

_LONGEST = 1.0  # norm that a gradient of the basis is clipped to
_NEGLIGIBLE = 1e-12  # norm of a row, as a share of the matrix, from which it has a direction


@dataclass(frozen=True)
class COAP(ProjectedMethod):
    """The options of COAP.

    Args:
        scale: Multiplies the lifted update; 1 in the code, 0.25 for its language models.
        update_interval: T, updates between two changes of the basis; 32 in the code, 40 to 128 in its examples.
        reproject_factor: λ, every how manieth of them is a recalibration; 5 in the code, 10 for images.
        basis_lr: η, of the gradient step on the basis; 0.1 in the code. 1 follows a rotating gradient more closely.
        normalize: Whether the error is a share of the gradient's size; False for the code's mean of squares.
        orthonormalize: Whether a QR decomposition follows each gradient step; ours.
        restore_state: Whether the moments are expressed in the new basis after each change.
        stagger: Whether the matrices change their bases in different steps; ours.
    """

    scale: float = 1.0
    update_interval: int = 32
    reproject_factor: int = 5
    basis_lr: float = 0.1
    normalize: bool = True
    orthonormalize: bool = False
    restore_state: bool = False
    stagger: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            update_interval=self.update_interval, reproject_factor=self.reproject_factor, basis_lr=self.basis_lr
        )
        if self.rule == "sgd" and self.betas[0] == 0:
            raise ValueError("COAP compares the gradient with its first moment; give rule 'sgd' a betas[0] above 0")

    def direction(self, gradient: Tensor, state: State, step: Step, weight: Tensor) -> Tensor:
        """Changes Q when it is due; then as every projected method."""
        if step.due(self.update_interval, stagger=self.stagger):
            a = turned(gradient, self.side)
            basis = state["basis"]
            fresh = self._changed(a, 1 if a is gradient else 0, state, step)
            if self.restore_state and step.number > 1:
                carry_moments(state, basis, fresh)
            basis.copy_(fresh)
        return super().direction(gradient, state, step, weight)

    def project(self, a: Tensor, state: State, step: Step) -> Tensor:
        """R for the Q that is there."""
        return right_product(a, state["basis"])

    def _changed(self, a: Tensor, axis: int, state: State, step: Step) -> Tensor:
        """Q (b, r) recalibrated, or after a gradient step."""
        assert self.rank is not None
        basis = state["basis"]
        change = -(-(step.number - 1) // self.update_interval)  # 0 for the first; a staggered one comes early
        if change % self.reproject_factor == 0:
            start = None if step.number == 1 else basis
            return improved_basis(a, start, self.rank, step.generator(a.device))[0]
        slope = correlation_loss(a, load(state, "first", a.dtype), basis, axis)[1]
        if not self.normalize:
            slope = slope * whole(a.square().mean())
        norm = torch.linalg.vector_norm(slope)
        moved = basis - self.basis_lr * slope / (norm / _LONGEST).clamp(min=1)
        return qr(moved).q if self.orthonormalize else moved


def correlation_loss(a: Tensor, first: Tensor, basis: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """f(Q) = ε (1 - c), and its gradient (b, r).

    Args:
        a: A (a, b).
        first: M (a, r).
        basis: Q (b, r).
        axis: Of A, along which vectors are compared: 1 for A's rows, 0 for its columns.
    """
    error, slope = reconstruction_error(a, basis)
    cosine, rise = mean_cosine(a, first, basis, axis)
    return error * (1 - cosine), slope * (1 - cosine) - error * rise


def mean_cosine(a: Tensor, first: Tensor, basis: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """c(Q), the mean cosine of the vectors of A (a, b) with those of L = M Qᵀ, and its gradient (b, r).

        ∇c = Eᵀ M / count,   E = A / (|A_i| |L_i|) - cos_i L / |L_i|²   for each vector i along ``axis``

    A vector of zeros has cosine 0. Besides two products, a few matrices of A's size are formed.
    """
    a, first = a * inverse_norm(a), first * inverse_norm(first)
    lifted = lift_product(first, basis, a)
    by_a, by_lifted = _inverse_norms(a, axis), _inverse_norms(lifted, axis)
    cosines = (a * lifted).sum(axis, keepdim=True) * by_a * by_lifted
    across = a * (by_a * by_lifted) - lifted * (cosines * by_lifted.square())
    return whole(cosines.sum()) / cosines.numel(), left_product(across, first) / cosines.numel()


def _inverse_norms(a: Tensor, axis: int) -> Tensor:
    norms = torch.linalg.vector_norm(a, dim=axis, keepdim=True)
    return (norms > _NEGLIGIBLE) / norms.clamp(min=_NEGLIGIBLE)


class COAPAdamW(ProjectedOptimizer):
    """AdamW on gradients projected by COAP. Options as `COAP` and `ProjectedOptimizer`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(8, 6))
        >>> optimizer = COAPAdamW([weight], lr=0.1, rank=2)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['basis', 'first', 'second', 'step']
    """

    method: ClassVar[type[COAP]] = COAP
    options: ClassVar[dict[str, Any]] = {}


class COAPAdamW8bit(COAPAdamW):
    """`COAPAdamW` with moments of eight bits."""

    options: ClassVar[dict[str, Any]] = {"bits": 8}
