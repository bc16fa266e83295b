"""The gradient of one attention head through polynomial features: every step linear in the number of tokens.

The mathematics of `eckart.analysis.lora_limits`, which says where it comes from.

    loss = ||F X W_V - Y||_F^2 / 2,   F = softmax(beta X W_Q W_K^T X^T) by rows,   X (L, D), W (D, d), Y (L, d)

    F ~ U V^T:  phi(q)^T phi(k) = sum_{j <= g} (q^T k)^j / j!,   k1 = C(d + g, g) features, U divided by its row sums
    C = F X W_V - Y,   P = F o (C (X W_V)^T),   rho = rows sums of P = rows sums of C o (F X W_V)
    dW_Q = beta X^T (P - diag(rho) F) X W_K,   dW_K = beta X^T (P - diag(rho) F)^T X W_Q,   dW_V = X^T F^T C

P K = sum_a C_a o F (V_a o K), a over the d columns of C and of V = X W_V: so all products are with F or F^T, and no
matrix (L, L), nor one (L, k1 d), is made. O(L k1 d^2) time and O(L (k1 + d^2)) memory; with a causal mask F is the
lower triangle of U V^T, whose products are sums over earlier tokens, kept up chunk by chunk.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "HeadGradients",
    "chained_gradients",
    "dense_gradients",
    "lora_gradients",
    "masked_product",
    "num_features",
    "taylor_degree",
    "taylor_features",
]


class HeadGradients(NamedTuple):
    """The loss of a head, a scalar, and its gradients by W_Q, W_K and W_V (D, d) each."""

    loss: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def num_features(width: int, degree: int) -> int:
    """How many monomials of ``width`` variables have at most this degree.

    Example:
        >>> num_features(4, 4), num_features(64, 2)
        (70, 2145)
    """
    return math.comb(width + degree, degree)


def taylor_degree(bound: float, eps: float = 1e-3) -> int:
    """The smallest even degree whose Taylor remainder is below eps times the exponential on [-bound, bound].

        bound^(g + 1) / (g + 1)! <= eps e^-bound

    Args:
        bound: Largest absolute value of the exponent, at least 0.
        eps: Relative error.

    Returns:
        g, even: truncated at an odd degree, the series can be negative.

    Example:
        >>> taylor_degree(0.0), taylor_degree(1.0), taylor_degree(20.0)
        (0, 6, 74)
    """
    degree = 0
    limit = math.log(eps) - bound
    while bound > 0 and (degree + 1) * math.log(bound) - math.lgamma(degree + 2) > limit:
        degree += 2
    return degree


def taylor_features(x: Tensor, degree: int) -> Tensor:
    """Monomial features whose inner product is the exponential's Taylor polynomial.

        phi(q)^T phi(k) = sum_{j <= degree} (q^T k)^j / j!,   phi_alpha(x) = x^alpha / sqrt(alpha!)

    Args:
        x: (..., d).
        degree: at least 0.

    Returns:
        (..., C(d + degree, degree)).

    Example:
        >>> taylor_features(torch.tensor([2.0]), 2)  # 1, x, x^2 / sqrt 2
        tensor([1.0000, 2.0000, 2.8284])
    """
    width = x.shape[-1]
    columns = [torch.ones_like(x[..., 0])]
    for size in range(1, degree + 1):
        for chosen in itertools.combinations_with_replacement(range(width), size):
            factorials = math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
            columns.append(x[..., list(chosen)].prod(dim=-1) / math.sqrt(factorials))
    return torch.stack(columns, dim=-1)


def masked_product(left: Tensor, right: Tensor, z: Tensor, *, causal: bool = False, chunk: int = 64) -> Tensor:
    """left right^T z, with the lower triangle of left right^T only if causal.

    Args:
        left: (L, k).
        right: (L, k).
        z: (L, c).
        causal: token t takes from tokens s <= t.
        chunk: tokens for which the triangle is made.

    Returns:
        (L, c), in O(L k c), and O(L chunk (k + c)) more if causal.

    Example:
        >>> ones = torch.ones(3, 1)
        >>> masked_product(ones, ones, ones).flatten().tolist()
        [3.0, 3.0, 3.0]
        >>> masked_product(ones, ones, ones, causal=True, chunk=2).flatten().tolist()
        [1.0, 2.0, 3.0]
    """
    if not causal:
        return left @ (right.T @ z)
    earlier = left.new_zeros(left.shape[1], z.shape[1])
    parts = []
    for a, b, c in zip(left.split(chunk), right.split(chunk), z.split(chunk), strict=True):
        parts.append(a @ earlier + (a @ b.T).tril() @ c)
        earlier = earlier + b.T @ c
    return torch.cat(parts)


def chained_gradients(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    degree: int,
    *,
    beta: float = 1.0,
    causal: bool = False,
    chunk: int = 64,
) -> HeadGradients:
    """Loss and gradients of a head with softmax replaced by its polynomial; exact in the limit of the degree.

    Args:
        x: X (L, D), tokens.
        query: W_Q (D, d), what an adapter adds included.
        key: W_K (D, d).
        value: W_V (D, e).
        target: Y (L, e).
        degree: g, even.
        beta: scale of the exponents, positive; 1 / sqrt(d) in a model.
        causal: token t sees tokens s <= t only.
        chunk: as in :func:`masked_product`.

    Raises:
        ValueError: an odd degree, or beta not positive.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> zero = torch.zeros(2, 1, dtype=torch.float64)
        >>> found = chained_gradients(x, zero, zero, x[:, :1], x[:, 1:], degree=2)  # F = 1/2 everywhere
        >>> float(found.loss), found.value.flatten().tolist()
        (0.25, [0.0, 0.0])
    """
    if degree < 0 or degree % 2:
        raise ValueError(f"degree must be even and at least 0, not {degree}: an odd one can make weights negative")
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    q, k, v = x @ query, x @ key, x @ value
    right = taylor_features(beta**0.5 * k, degree)
    left = taylor_features(beta**0.5 * q, degree)
    left = left / masked_product(left, right, torch.ones_like(left[:, :1]), causal=causal, chunk=chunk)

    def forward(z: Tensor) -> Tensor:  # F z
        return masked_product(left, right, z, causal=causal, chunk=chunk)

    def backward(z: Tensor) -> Tensor:  # F^T z: sums over later tokens
        if not causal:
            return right @ (left.T @ z)
        return masked_product(right.flip(0), left.flip(0), z.flip(0), causal=True, chunk=chunk).flip(0)

    out = forward(v)
    rest = out - target
    rho = (rest * out).sum(dim=1, keepdim=True)
    from_keys = _contract(rest, forward(_outer(v, k))) - rho * forward(k)
    from_queries = _contract(v, backward(_outer(rest, q))) - backward(rho * q)
    return HeadGradients(
        rest.square().sum() / 2, beta * x.T @ from_keys, beta * x.T @ from_queries, x.T @ backward(rest)
    )


def dense_gradients(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    causal: bool = False,
) -> HeadGradients:
    """The same with the softmax itself and matrices (L, L): the twin of :func:`chained_gradients`, O(L^2 d).

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> zero = torch.zeros(2, 1, dtype=torch.float64)
        >>> float(dense_gradients(x, zero, zero, x[:, :1], x[:, 1:]).loss)
        0.25
    """
    q, k, v = x @ query, x @ key, x @ value
    scores = beta * q @ k.T
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    f = scores.softmax(dim=1)
    rest = f @ v - target
    ds = rest @ v.T
    ds = f * (ds - (f * ds).sum(dim=1, keepdim=True))
    return HeadGradients(rest.square().sum() / 2, beta * x.T @ (ds @ k), beta * x.T @ (ds.T @ q), x.T @ (f.T @ rest))


def lora_gradients(gradient: Tensor, up: Tensor, down: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of the factors of an adapter W = W* + scale up down, from that of W.

    Args:
        gradient: dW (m, n).
        up: B (m, r).
        down: A (r, n).
        scale: alpha / r.

    Returns:
        dB = scale dW A^T (m, r) and dA = scale B^T dW (r, n).

    Example:
        >>> lora_gradients(torch.ones(1, 1), torch.tensor([[2.0]]), torch.tensor([[3.0]]), 0.5)
        (tensor([[1.5000]]), tensor([[1.]]))
    """
    return scale * gradient @ down.T, scale * up.T @ gradient


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """(L, m), (L, n) to the products of all pairs of columns (L, m n)."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def _contract(a: Tensor, pairs: Tensor) -> Tensor:
    """sum_i a_i pairs_ij by tokens: (L, m), (L, m n) to (L, n)."""
    return (a[:, None, :] @ pairs.unflatten(1, (a.shape[1], -1)))[:, 0]
