"""The nearest sum of Kronecker products.

    a ≈ sum over i <= k of s_i U_i ⊗ V_i,     a (m, n), U_i (m_1, n_1), V_i (m_2, n_2), m = m_1 m_2, n = n_1 n_2

Rearranged so that every block of a becomes a row, the matrix R(a) (m_1 n_1, m_2 n_2) turns Kronecker products into
outer products, R(U ⊗ V) = vec(U) vec(V)ᵀ, and keeps the Frobenius norm: the SVD of R(a) is the answer.

Reference: C. F. Van Loan and N. Pitsianis, "Approximation with Kronecker products", in Linear Algebra for Large Scale
and Real-Time Applications, Kluwer, 1993.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LinalgError
from ..svd import Driver, svd
from ._tensor import check_finite
from .shapes import kronecker_shape, kronecker_shapes

__all__ = ["KroneckerChoice", "KroneckerSVD", "choose_kronecker_shape", "kronecker_svd", "rearrange"]


class KroneckerSVD(NamedTuple):
    """A sum of k Kronecker products; for a batch of matrices every field has the batch dimensions first.

    Attributes:
        left: (..., k, m_1, n_1), the U_i, orthonormal in the Frobenius inner product.
        s: (..., k) weights, descending: the singular values of the rearrangement.
        right: (..., k, m_2, n_2), the V_i, orthonormal too.
        error: (...,) float64, Frobenius norm of a minus the sum.
    """

    left: Tensor
    s: Tensor
    right: Tensor
    error: Tensor

    @property
    def rank(self) -> int:
        """Number k of terms."""
        return self.s.shape[-1]

    @property
    def parameters(self) -> int:
        """Numbers in left and right for one matrix, k (m_1 n_1 + m_2 n_2); s can be absorbed in either."""
        return self.rank * (self.left.shape[-2:].numel() + self.right.shape[-2:].numel())

    def reconstruct(self) -> Tensor:
        """The sum of the Kronecker products, (..., m, n)."""
        rows = (self.left * self.s[..., None, None]).flatten(-2)
        return rearrange(rows.mT @ self.right.flatten(-2), (self.left.shape[-2], self.right.shape[-2]))

    def apply(self, x: Tensor) -> Tensor:
        """The product x aᵀ with the approximation, no Kronecker product formed: (..., n) -> (..., m).

        A row of x is an n_1 x n_2 matrix X, and U ⊗ V maps it to U X Vᵀ: k (m_1 n_1 n_2 + m_1 m_2 n_2) multiplications
        a row, or k (n_1 n_2 m_2 + m_1 n_1 m_2) in the other order; the cheaper one is taken. Differentiable.

        Args:
            x: (..., n), converted to the dtype of the factors. For a batch (..., tokens, n), where the leading
                dimensions are those of the batch, as in ``x @ a.mT``.

        Raises:
            LinalgError: The last dimension of x is not n.
        """
        (m1, n1), (m2, n2) = self.left.shape[-2:], self.right.shape[-2:]
        single = self.s.ndim == 1
        if x.ndim < (1 if single else 2) or x.shape[-1] != n1 * n2:
            raise LinalgError.about("x", x, f"holds no rows for a matrix of {n1 * n2} columns", "give (..., n)")
        rows = x.to(self.s.dtype)
        rows = rows.reshape(-1, n1 * n2) if single else rows  # one large product instead of many small ones
        blocks, left = rows.unflatten(-1, (n1, n2)), self.left * self.s[..., None, None]
        if n1 * m2 * (n2 + m1) <= n2 * m1 * (n1 + m2):
            y = _sandwich(left, blocks, self.right)
        else:
            y = _sandwich(self.right, blocks.mT, left).mT
        y = y.flatten(-2)
        return y.reshape(*x.shape[:-1], m1 * m2) if single else y


def kronecker_svd(
    a: Tensor,
    rank: int | None = None,
    shape: tuple[int, int] | None = None,
    *,
    driver: Driver = "auto",
    tol: float | None = None,
    generator: torch.Generator | None = None,
) -> KroneckerSVD:
    """The sum of ``rank`` Kronecker products nearest to a.

        min over U_i, V_i of ||a - sum_i U_i ⊗ V_i||_F = sqrt(s_{k+1}^2 + s_{k+2}^2 + ...),   s of rearrange(a, shape)

    One copy of a and one SVD of the same number of entries, so O(m n k) with the default driver and as accurate as
    it: within 1 % of the best error for large a and few terms, exact otherwise. A single term can have full rank,
    rank(U ⊗ V) = rank(U) rank(V), which is what it has over a low-rank term. shape = (m, 1) is the ordinary SVD.
    Not differentiable (the input is detached).

    Args:
        a: (..., m, n), any float dtype. Half precision is computed and returned in float32.
        rank: Number k of terms, at most min(m_1 n_1, m_2 n_2); None for all, which reproduces a.
        shape: (m_1, n_1) of the first factor; m_1 divides m and n_1 divides n. None for ``kronecker_shape(m, n)``.
        driver: As in `svd`.
        tol: As in `svd`.
        generator: As in `svd`.

    Returns:
        Factors, weights and the error.

    Raises:
        LinalgError: A shape that does not divide, NaN or Inf in ``a``, not a float matrix.
        ValueError: rank below 1, unknown driver, no shape given for a matrix that has none.

    Example:
        >>> import torch
        >>> u, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0], [0.0]])
        >>> result = kronecker_svd(torch.kron(u, v), rank=1, shape=(1, 2))
        >>> torch.allclose(result.reconstruct(), torch.kron(u, v)), result.left.shape, result.right.shape
        (True, torch.Size([1, 1, 2]), torch.Size([1, 3, 1]))

    Reference:
        Van Loan and Pitsianis (1993), see the module.
    """
    if a.ndim < 2:
        raise LinalgError.about("a", a, "is not a matrix", "give it two dimensions, rows and columns")
    check_finite(a, "a")
    m, n = a.shape[-2:]
    m1, n1 = shape or kronecker_shape(m, n)
    rearranged = rearrange(a.detach(), (m1, n1))
    u, s, vh, error = svd(rearranged, rank, driver=driver, tol=tol, generator=generator)
    return KroneckerSVD(u.mT.unflatten(-1, (m1, n1)), s, vh.unflatten(-1, (m // m1, n // n1)), error)


def rearrange(a: Tensor, shape: tuple[int, int]) -> Tensor:
    """Makes every block of a matrix a row: Kronecker products become outer products.

        a (..., m, n)  ->  R (..., m_1 n_1, m_2 n_2),    R[(i, j), (p, q)] = a[i m_2 + p, j n_2 + q]

    A permutation of the entries, so norms and inner products stay; one copy. Its inverse is a rearrangement too:
    ``rearrange(R, (m_1, m_2))`` is a. Differentiable, any dtype.

    Args:
        a: (..., m, n).
        shape: (m_1, n_1): how many blocks there are down and across; blocks are (m / m_1, n / n_1).

    Raises:
        LinalgError: ``a`` is no matrix, or the shape does not divide its.

    Example:
        >>> import torch
        >>> rearrange(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), (1, 2)).tolist()
        [[1, 2, 5, 6], [3, 4, 7, 8]]
    """
    if a.ndim < 2:
        raise LinalgError.about("a", a, "is not a matrix", "give it two dimensions, rows and columns")
    _check_shape(a, shape)
    (m, n), (m1, n1) = a.shape[-2:], shape
    blocks = a.reshape(*a.shape[:-2], m1, m // m1, n1, n // n1)
    return blocks.transpose(-3, -2).reshape(*a.shape[:-2], m1 * n1, (m // m1) * (n // n1))


class KroneckerChoice(NamedTuple):
    """What `choose_kronecker_shape` found.

    Attributes:
        shape: (m_1, n_1).
        rank: Number of terms that the parameters allow at this shape.
        error: Frobenius norm of what they leave out, to about 10 %.
    """

    shape: tuple[int, int]
    rank: int
    error: float


def choose_kronecker_shape(
    a: Tensor,
    parameters: int,
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    generator: torch.Generator | None = None,
) -> KroneckerChoice:
    """The shape whose Kronecker SVD leaves the least error at a given number of parameters.

        min over (m_1, n_1) of  sum over i > k of s_i^2,    k = parameters // (m_1 n_1 + m_2 n_2)

    One SVD per candidate, O(m n k). Where it is sampled its error is good to 10 %, so that shapes nearer to each other
    than that may be confused. A 4096 x 4096 matrix has 167 shapes: for large matrices give the few that matter (say,
    those that keep heads together).

    Args:
        a: One matrix (m, n), any float dtype.
        parameters: Numbers to be stored, the weights of the terms not counted.
        shapes: Candidates; None for all `kronecker_shapes` of which at least one term fits.
        generator: As in `svd`.

    Returns:
        The best shape, its number of terms and their error; the first in the list where several are equal.

    Raises:
        LinalgError: Not one matrix, NaN or Inf, a candidate that does not divide it.
        ValueError: No term of any candidate has so few parameters.

    Example:
        >>> import torch
        >>> u, v = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 6), (9, 2)))
        >>> choose_kronecker_shape(torch.kron(u, v), parameters=30)[:2]
        ((2, 6), 1)
    """
    if a.ndim != 2:
        raise LinalgError.about("a", a, "is not one matrix", "choose a shape for one matrix and use it for the others")
    m, n = a.shape
    candidates = list(kronecker_shapes(m, n) if shapes is None else shapes)
    for shape in candidates:
        _check_shape(a, shape)
    ranks = [max(0, parameters // (m1 * n1 + m * n // (m1 * n1))) for m1, n1 in candidates]
    if not any(ranks):
        raise ValueError(f"parameters={parameters} holds no term of {candidates or 'any shape'}; allow more")
    best = None
    for shape, rank in zip(candidates, ranks, strict=True):
        if rank:
            found = kronecker_svd(a, rank, shape, tol=0.1, generator=generator)
            if best is None or float(found.error) < best.error:
                best = KroneckerChoice(shape, found.rank, float(found.error))
    assert best is not None
    return best


def _check_shape(a: Tensor, shape: tuple[int, int]) -> None:
    for size, parts, what in zip(a.shape[-2:], shape, ("rows", "columns"), strict=True):
        if parts < 1 or size % parts:
            remedy = "choose one of kronecker_shapes(m, n), or pad the matrix"
            raise LinalgError.about("a", a, f"its {size} {what} do not divide by the {parts} of shape {shape}", remedy)


def _sandwich(left: Tensor, blocks: Tensor, right: Tensor) -> Tensor:
    """Sum over k of left_k X right_kᵀ, from the right: X (..., t, n, q) -> (..., t, m, p)."""
    t, n, k, p = *blocks.shape[-3:-1], *right.shape[-3:-1]
    half = blocks.flatten(-3, -2) @ right.movedim(-1, -3).flatten(-2)  # (..., t n, k p)
    half = half.reshape(*half.shape[:-2], t, n * k, p)
    return left.movedim(-3, -1).flatten(-2)[..., None, :, :] @ half
