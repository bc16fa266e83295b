"""A truncated SVD that follows its matrix while rows, columns and low-rank changes arrive, most of them sparse.

    [u diag(s) vᵀ]
    [     e      ]  ->  its k leading triplets,   u = U K (m, k),  v = V L (n, k),  new rows e (r, n)

and likewise for new columns and for u diag(s) vᵀ + d eᵀ. What e adds to v are directions q (n, l), which are kept as a
pair whose b is as sparse as e (in the paper: Sparse Vector minus Low-rank COlumn Vectors, SV-LCOV):

    q = b - v w,   qᵀ q = I,   w = vᵀ b (k, l),   eᵀ ≈ v c + q xᵀ,   c = vᵀ eᵀ (k, r),   x (r, l)

    [diag(s)  0]
    [   cᵀ    x]  ≈  f diag(t) gᵀ,   k triplets,   f = [f_1; f_2],   g = [g_1; g_2]

    K <- K f_1,   U <- [U; f_2 K^-1],   L <- L (g_1 - w g_2),   V <- V + b g_2 L^-1,   s <- t

An update touches the rows of V that belong to nonzero columns of e, and no others: its cost depends on e and k, not on
m and n. Haoran Deng, Yang Yang, Jiahe Li, Cheng Chen, Weihao Jiang and Shiliang Pu, "Fast Updating Truncated SVD for
Representation Learning with Sparse Matrices", ICLR 2024, arXiv:2401.09703; code https://github.com/zjunet/IncSVD.

What is different here: q comes from the Gram matrix bᵀ b - wᵀ w at once instead of column by column, without what lies
in span(v) up to rounding. For many rows, "exact" iterates for the part of q that the leading triplets need, where the
paper takes a subspace ("gkl", "rpi") that looks at e alone. K and L are float64, not inverted, and multiplied out where
they become ill-conditioned. Space for new rows is reserved ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._basis import orthonormalize
from ._prepare import result_dtype
from ._sparse import as_tensor, compress, energy, multiplier, transposed
from ._sv_lcov import Directions, FactoredBasis, exact, golub_kahan, leading, power_iteration
from .contract import MatrixMethod
from .errors import LinalgError
from .svd import svd
from .svd_operator import svd_operator

__all__ = ["SVDUpdate", "UpdatableSVD"]

Method = Literal["exact", "gkl", "rpi"]

# Squared length outside span(v), relative to all of it, from which a direction counts as new: above the rounding of v.
_NEW = {torch.float32: 1e-5, torch.float64: 1e-12}
_MANY = 2  # new rows, in units of the rank, from which iterating for the directions that matter is faster than all


@dataclass(frozen=True)
class SVDUpdate(MatrixMethod):
    """Starts a truncated SVD that can be updated: ``SVDUpdate(rank)(a)`` is the `UpdatableSVD` of a.

    Attributes:
        rank: Number k of triplets to keep; 64 as in the paper's examples.
        method: Which directions of new rows outside span(v) are taken. "exact": all that matter, so that an update
            gives the leading triplets of [u diag(s) vᵀ; e], as that of Zha and Simon does. "gkl": ``subspace`` steps
            of Golub-Kahan-Lanczos bidiagonalisation. "rpi": random power iteration with ``subspace`` vectors, the
            default of the official code. The last two cost less for very many rows at a time, but see these rows
            alone, not what they have in common with the matrix so far.
        subspace: Dimension of the space that "gkl" and "rpi" look for; None for the rank.
        iterations: Rounds of "rpi".
        tol: Accuracy of the SVD of the first matrix; see `svd_operator`.
    """

    rank: int = 64
    method: Method = "exact"
    subspace: int | None = None
    iterations: int = 3
    tol: float | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {self.method!r}")
        for name in ("rank", "subspace", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"tol must be positive, not {self.tol}")

    def __call__(self, a: Any, *, generator: torch.Generator | None = None) -> UpdatableSVD:
        """The truncated SVD of a (m, n), which may have no rows yet, or no columns.

        Args:
            a: Dense or sparse tensor, or sparse matrix of SciPy. A sparse one is multiplied, never made dense.
            generator: Source of the random starts, now and in updates, on the device of ``a``. None means a private
                one with a fixed seed.

        Raises:
            LinalgError: Not one real floating-point matrix; NaN or Inf.
            TypeError: Not a matrix.
        """
        a = as_tensor(a, "a")
        dtype, total = result_dtype(a), energy(a)
        a = a.to(dtype)
        generator = generator or torch.Generator(device=a.device).manual_seed(0)
        if a.numel() == 0:
            u, v = (torch.zeros(size, 0, dtype=dtype, device=a.device) for size in a.shape)
            return UpdatableSVD(self, u, u.new_empty(0), v, 0.0, generator)
        products = multiplier(a).__matmul__, multiplier(transposed(a)).__matmul__
        m, n = a.shape
        u, s, vh, _ = svd_operator(
            *products, (m, n), self.rank, tol=self.tol, dtype=dtype, device=a.device, generator=generator
        )
        missed = total - float(s.to(torch.float64).square().sum())
        return UpdatableSVD(self, u, s, vh.mT, max(0.0, missed), generator)


class UpdatableSVD:
    """Truncated SVD of a matrix that changes, as made by `SVDUpdate`.

        a ≈ u diag(s) vh,   u (m, k), s (k,), vh (k, n)

    k is the rank asked for, or less as long as the matrix is smaller. An update by "exact" gives the best
    approximation of the last approximation with the new part. What has been left out before cannot come back, so after
    many updates the error is larger than that of a new SVD. Updates take dense and sparse tensors and sparse matrices
    of SciPy, and leave everything as it was where they raise. The vectors are stored in float32 for float32 matrices;
    all else is float64.

    Example:
        >>> import torch
        >>> a = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> state = SVDUpdate(rank=2)(a)
        >>> state.add_rows(torch.tensor([[0.0, 0.0, 4.0]]).to_sparse())
        >>> state.shape, state.s.tolist(), round(float(state.error), 6)
        ((3, 3), [4.0, 3.0], 2.0)
    """

    def __init__(
        self, options: SVDUpdate, u: Tensor, s: Tensor, v: Tensor, missed: float, generator: torch.Generator
    ) -> None:
        self._options, self._generator = options, generator
        self._left, self._right = FactoredBasis(u), FactoredBasis(v)
        self._s = s.to(torch.float64)
        self._missed = missed

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix so far."""
        return self._left.count, self._right.count

    @property
    def u(self) -> Tensor:
        """(m, k) left singular vectors, multiplied out, O(m k^2); `rows` gives some of them."""
        return self._left.basis()

    @property
    def s(self) -> Tensor:
        """(k,) singular values, descending."""
        return self._s.to(self._left.dtype)

    @property
    def vh(self) -> Tensor:
        """(k, n) right singular vectors, multiplied out, O(n k^2); `columns` gives some of them."""
        return self._right.basis().mT

    @property
    def error(self) -> Tensor:
        """Frobenius norm of all that truncations have left out, () float64.

        That of a - u diag(s) vh, to eps^(1/2) of the norm of a, if only rows, or only columns, were added by "exact".
        Otherwise an estimate, which takes what was left out at different times for orthogonal.
        """
        return torch.tensor(self._missed, dtype=torch.float64).sqrt()

    def rows(self, index: Tensor) -> Tensor:
        """u[index], O(k^2) a row."""
        return self._left.take(index).to(self._left.dtype)

    def columns(self, index: Tensor) -> Tensor:
        """vh[:, index], O(k^2) a column."""
        return self._right.take(index).mT.to(self._right.dtype)

    def reconstruct(self) -> Tensor:
        """u diag(s) vh, (m, n), dense."""
        return (self.u * self.s) @ self.vh

    def add_rows(self, e: Any) -> None:
        """Appends rows e (r, n)."""
        e = as_tensor(e, "e")
        self._check(e.shape[1] == self.shape[1], "e", e)
        self._append(self._left, self._right, e)

    def add_columns(self, e: Any) -> None:
        """Appends columns e (m, r)."""
        e = as_tensor(e, "e")
        self._check(e.shape[0] == self.shape[0], "e", e)
        self._append(self._right, self._left, transposed(e))

    def add_low_rank(self, d: Any, e: Any) -> None:
        """Adds d eᵀ, d (m, r) and e (n, r). What "gkl" and "rpi" miss of it does not enter `error`."""
        d, e = as_tensor(d, "d"), as_tensor(e, "e")
        self._check(d.shape[0] == self.shape[0], "d", d)
        self._check(e.shape == (self.shape[1], d.shape[1]), "e", e)
        if d.shape[1] == 0:
            return
        left = self._directions(self._left, transposed(d))
        right = self._directions(self._right, transposed(e))
        core = left.coordinates @ right.coordinates.mT
        core.diagonal()[: self._s.shape[0]] += self._s
        f, s, gh, tail = svd(core, self._options.rank, driver="exact")
        self._left.rotate(f, left)
        self._right.rotate(gh.mT, right)
        self._s, self._missed = s, self._missed + float(tail) ** 2

    def reset(self) -> None:
        """Multiplies K and L out and makes the vectors orthonormal again, O((m + n) k^2).

        Worth it after thousands of updates, hundreds in float32: see how far ``u.mT @ u`` is from the identity. A K or
        L that becomes ill-conditioned is multiplied out without being asked.
        """
        (u, left), (v, right) = orthonormalize(self.u), orthonormalize(self.vh.mT)
        f, self._s, gh, _ = svd(left * self._s @ right.mT, driver="exact")
        self._left, self._right = FactoredBasis(u @ f.to(u.dtype)), FactoredBasis(v @ gh.mT.to(v.dtype))

    def _check(self, fits: bool, name: str, e: Tensor) -> None:
        if not fits:
            m, n = self.shape
            remedy = f"give rows of length {n}, columns of length {m}, or d ({m}, r) and e ({n}, r)"
            raise LinalgError.about(name, e, f"does not fit a matrix of shape ({m}, {n})", remedy)

    def _append(self, grown: FactoredBasis, kept: FactoredBasis, e: Tensor) -> None:
        """Appends rows e to the side ``grown``; their entries belong to the side ``kept``."""
        if e.shape[0] == 0:
            return
        new, k = self._directions(kept, e, self._s), self._s.shape[0]
        core = torch.cat([new.coordinates.new_zeros(k, new.coordinates.shape[0]), new.coordinates.mT])
        core.diagonal()[:k] = self._s
        f, s, gh, tail = svd(core, self._options.rank, driver="exact")
        kept.rotate(gh.mT, new)
        grown.rotate(f[:k])
        grown.append(f[k:])
        self._s, self._missed = s, self._missed + float(tail) ** 2 + new.lost

    def _directions(self, side: FactoredBasis, e: Tensor, s: Tensor | None = None) -> Directions:
        """The rows e in an orthonormal basis that extends that of ``side``; s if they are appended to diag(s) vᵀ."""
        options, block, tol = self._options, compress(e), _NEW[side.dtype]
        inside = (block.matrix @ side.take(block.columns)).mT
        size = min(options.subspace or options.rank, e.shape[0])
        if options.method == "gkl":
            return golub_kahan(block, inside, tol, size, self._generator)
        if options.method == "rpi":
            return power_iteration(block, inside, tol, size, options.iterations, self._generator)
        if s is not None and e.shape[0] > _MANY * options.rank:
            return leading(block, inside, tol, s, options.rank, self._generator)
        return exact(block, inside, tol)
