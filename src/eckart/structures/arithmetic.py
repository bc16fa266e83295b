"""Arithmetic of structures, each result with its error: sum, rounding to a rank, LoRA factors of a difference."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..linalg import SVD, Form, qr, svd
from .base import Structure
from .dense import Dense
from .low_rank import LowRank
from .sum import Sum

__all__ = ["add", "round_rank", "to_lora"]


def add(a: Structure, b: Structure) -> Structure:
    """The structure of W_a + W_b, without approximation.

        low rank + low rank -> low rank:  [up_a, up_b] [down_a; down_b],  rank k_a + k_b, at most min(m, n)
        dense + dense -> dense;  anything else -> a ``Sum`` of copies

    Biases are added. Rounding is that of one cast from float64 to the common dtype. Two pivoted matrices give a
    pivoted one; if either is plain, so is the result.

    Args:
        a: First term.
        b: Second term, of the same shape (out, in), dtype and device.

    Returns:
        A new structure that shares no tensor with its terms.

    Raises:
        ValueError: Shapes, dtypes or devices differ.

    Example:
        >>> one = LowRank.from_factors(torch.ones(4, 1), torch.ones(1, 3))
        >>> add(one, one).dense().unique().tolist()
        [2.0]
    """
    mine, other = ((s.out_features, s.in_features, s.dtype, s.device) for s in (a, b))
    if mine != other:
        raise ValueError(f"add needs equal (out, in, dtype, device), got {mine} and {other}")
    biases = [s.bias.detach().to(torch.float64) for s in (a, b) if s.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        (up_a, down_a), (up_b, down_b) = _exact(a), _exact(b)
        form: Form = "pivoted" if a.form == b.form == "pivoted" else "plain"
        up, down = torch.cat([up_a, up_b], 1), torch.cat([down_a, down_b])
        return LowRank.from_factors(up, down, bias=bias, form=form, dtype=a.dtype)
    if isinstance(a, Dense) and isinstance(b, Dense):
        weight = a.weight.detach().to(torch.float64) + b.weight.detach().to(torch.float64)
        return Dense.from_weight(weight, bias=bias, dtype=a.dtype)
    terms = [copy.deepcopy(term) for s in (a, b) for term in (s.parts() if isinstance(s, Sum) else [s])]
    for term in terms:
        term.bias = None
    total = Sum(terms, bias=bias is not None)
    if total.bias is not None and bias is not None:
        with torch.no_grad():
            total.bias.copy_(bias)
    return total


def round_rank(structure: Structure, rank: int | None = None, *, tol: float | None = None) -> tuple[LowRank, float]:
    """The best approximation of W of a smaller rank, and its error.

        up = Q_u R_u,  down^T = Q_d R_d,  R_u R_d^T = U S V^T   ->   (Q_u U_k S_k^1/2) (S_k^1/2 V_k^T Q_d^T)

    For a low-rank W this costs (m + n) k^2, not an SVD of W; other structures go through their dense matrix.

    Args:
        structure: The structure to round; its bias, dtype and, if low rank, form are kept.
        rank: Largest rank of the result. Exactly one of ``rank`` and ``tol`` is given.
        tol: Largest relative error |W - W_k|_F / |W|_F; the smallest rank that meets it is taken.

    Returns:
        The low-rank layer and |W - W_k|_F in float64, before rounding to the dtype: exact for a low-rank
        ``structure`` and with ``tol``, otherwise as good as the driver that ``linalg.svd`` picks.

    Raises:
        ValueError: Not exactly one of ``rank`` and ``tol``, or one out of range.

    Example:
        >>> up, down = torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2, 5)
        >>> layer, error = round_rank(LowRank.from_factors(up, down), 1)
        >>> layer.rank, round(error, 6)
        (1, 3.0)
    """
    if (rank is None) == (tol is None):
        raise ValueError(f"give exactly one of rank and tol, got rank={rank}, tol={tol}")
    if (rank is not None and rank < 1) or (tol is not None and not 0 <= tol < 1):
        raise ValueError(f"rank must be at least 1 and tol in [0, 1), got rank={rank}, tol={tol}")
    factors = _spectrum(structure, rank)
    tails = _tails(factors)
    wanted = int((tails > (tol or 0.0) * tails[0]).sum()) if rank is None else rank
    k = max(1, min(wanted, factors.s.numel()))
    u, s, vh = factors.u[:, :k], factors.s[:k], factors.vh[:k]
    error = float(tails[k])
    layer = LowRank.from_factors(
        u * s.sqrt(),
        s.sqrt()[:, None] * vh,
        bias=None if structure.bias is None else structure.bias.detach(),
        form=structure.form if isinstance(structure, LowRank) else "pivoted",
        dtype=structure.dtype,
        truncation_error=error,
    )
    return layer, error


def to_lora(structure: Structure, base_weight: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """LoRA factors that turn a base weight into the structure's: W ~ base_weight + B @ A.

    B = U_r S_r^1/2 and A = S_r^1/2 V_r^T from the SVD of the difference, the best of rank r (Eckart-Young). They
    include LoRA's scale: use ``lora_alpha = r``. The bias is not looked at.

    Args:
        structure: The structure to express.
        base_weight: Weight (out, in) that the adapter will be added to.
        rank: r. None keeps every singular value above the rounding of the difference, eps |base_weight|_F with
            the eps of the coarser of the two dtypes.

    Returns:
        A (r, in), B (out, r), in float32 (float64 for a float64 structure) as adapters are trained, and the error
        |W - base_weight - B A|_F in float64, as good as the driver that ``linalg.svd`` picks.

    Raises:
        ValueError: The shapes differ or the rank is not positive.

    Example:
        >>> layer = Dense.from_weight(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> A, B, error = to_lora(layer, torch.zeros(2, 2), rank=2)
        >>> bool(torch.allclose(B @ A, layer.weight)), error < 1e-6
        (True, True)
    """
    if base_weight.shape != (structure.out_features, structure.in_features):
        wanted = (structure.out_features, structure.in_features)
        raise ValueError(f"base_weight must be (out, in) = {wanted}, got {tuple(base_weight.shape)}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    base = base_weight.detach().to(torch.float64)
    factors = svd(_exact_dense(structure) - base, rank)
    if rank is None:
        eps = max(torch.finfo(structure.dtype).eps, torch.finfo(base_weight.dtype).eps)
        rank = int((factors.s > eps * base.norm()).sum())
    r = max(1, min(rank, factors.s.numel()))
    root = factors.s[:r].sqrt()
    dtype = torch.promote_types(structure.dtype, torch.float32)
    return (root[:, None] * factors.vh[:r]).to(dtype), (factors.u[:, :r] * root).to(dtype), float(_tails(factors)[r])


def _exact(layer: LowRank) -> tuple[Tensor, Tensor]:
    """The factors of the stored matrix in float64, where nothing is rounded again."""
    up, down = layer.factors()
    return up.detach().to(torch.float64), down.detach().to(torch.float64)


def _exact_dense(structure: Structure) -> Tensor:
    """The stored matrix in float64."""
    return copy.deepcopy(structure).to(torch.float64).dense().detach()


def _spectrum(structure: Structure, rank: int | None) -> SVD:
    """SVD in float64, of the small core where the structure is low rank, of the dense matrix elsewhere."""
    if not isinstance(structure, LowRank):
        return svd(_exact_dense(structure), rank)
    up, down = _exact(structure)
    (q_up, r_up), (q_down, r_down) = qr(up), qr(down.T)
    core = svd(r_up @ r_down.T)
    return SVD(q_up @ core.u, core.s, core.vh @ q_down.T, core.error)


def _tails(factors: SVD) -> Tensor:
    """Frobenius error of each rank 0, 1, ..., len(s): the dropped singular values and the error of the SVD."""
    squares = torch.cat([factors.s.to(torch.float64).square(), factors.error.to(torch.float64).square().reshape(1)])
    return squares.flip(0).cumsum(0).flip(0).sqrt()
