"""Sparse dictionary learning: a matrix as atoms times codes with few nonzeros in each column.

    min over D, S of ||W - D S||_F,   W (m, n), D (m, k) of unit columns, S (k, n) with at most s nonzeros a column

Where a low-rank factorisation uses the same k directions for every column, here each column picks its own s of them: at
equal storage a matrix whose columns lie in several small subspaces is met where low rank fails. s = k is low rank.

Reference: M. Aharon, M. Elad and A. Bruckstein, "K-SVD", IEEE Trans. Signal Processing 54 (2006); R. Rubinstein,
M. Zibulevsky and M. Elad, Technion CS-2008-08 (2008); for weights of language models Shopkhoev et al., "CoSpaDi",
arXiv:2509.22075. What differs: the start is not random, but the better of the leading singular vectors and the most
independent columns; a column keeps its old support where pursuit finds none better, so no sweep raises the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ._prepare import prepare, rescale, squared_norm
from .errors import LinalgError
from .interpolative import pivot_rows
from .pursuit import SparseCodes, best_fit, check_steps, expand, pursue
from .soft_threshold import accurate_driver
from .solve import solve_spd
from .svd import svd

__all__ = ["Dictionary", "Factored", "descend", "dictionary", "factor_each", "unit"]

_POWER_STEPS = 2  # for each atom and sweep, from the atom it had
_STALLED = 1e-6  # relative gain of a sweep below which no other follows


@dataclass(frozen=True)
class Dictionary:
    """A matrix W (..., m, n) as atoms times sparse codes.

    Attributes:
        atoms: D (..., m, k), columns of unit length.
        codes: S (..., k, n), with the error ||W - D S||_F.
    """

    atoms: Tensor
    codes: SparseCodes

    @property
    def error(self) -> Tensor:
        """Frobenius norm of W - D S, (...,) float64."""
        return self.codes.error

    def reconstruct(self) -> Tensor:
        """D S, (..., m, n)."""
        return self.atoms @ self.codes.dense()

    def num_parameters(self) -> int:
        """Floating-point numbers stored, m k + s n summed over the batch; positions are not counted."""
        return self.atoms.numel() + self.codes.values.numel()

    def nbytes(self, bits: int = 16) -> int:
        """Bytes stored with numbers of ``bits`` bits, positions included: as a mask or as indices, what is smaller."""
        return -(-(self.num_parameters() * bits + self.codes.position_bits()) // 8)


class Factored(NamedTuple):
    """D (m, k), values (n, s), indices (n / c, s) and error () of one well-scaled matrix."""

    d: Tensor
    values: Tensor
    indices: Tensor
    error: Tensor


def dictionary(
    w: Tensor,
    atoms: int,
    sparsity: int,
    *,
    sweeps: int = 10,
    steps: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Dictionary:
    """Learns a dictionary by K-SVD with orthogonal matching pursuit.

        w (m, n) = D (m, k) S (k, n) + remainder

    A sweep replaces each atom in turn, with the codes of the columns that use it, by the leading singular pair of what
    these columns lack without it (power steps from the old pair, which never do harm); atoms without users become the
    worst-fit columns. Then all columns are coded anew, and each keeps the better of the old support and the new one.
    The error never rises from sweep to sweep; with at most min(m, n) atoms it starts at or below that of the truncated
    SVD of rank s, and with s = k it is equal to it. A sweep costs O(n s (k^2 + s^2) + m n s). A local optimum: the
    problem is NP-hard. Not differentiable.

    Args:
        w: (..., m, n), any float dtype; the matrices of a batch are learnt one by one.
        atoms: Number k of atoms, at most n of them.
        sparsity: Number s of atoms a column, at most min(m, k).
        sweeps: Updates of all atoms; ends earlier when one gains nothing. The default 10 is within 2 % of the error of
            50 on weights of a language model; 0 codes w by the start.
        steps: Steps of each pursuit, as in `orthogonal_matching_pursuit`. Where it is given, a column also keeps its
            old code as it is, not refitted, if no better one is found: 8 times faster for 245 of 491 atoms a column.
        start: Initial atoms (..., m, k), of any length; by default chosen from the singular vectors and the columns.
        generator: Draws the atoms beyond min(m, n) from the columns of w. None means a fixed seed.

    Returns:
        Atoms and codes, in float64 for float64 input and float32 otherwise.

    Raises:
        LinalgError: Not a float matrix, empty, NaN or Inf; a start of the wrong shape.
        ValueError: atoms, sparsity or steps below 1, sweeps negative.

    Example:
        >>> import torch
        >>> w = torch.block_diag(torch.ones(2, 3), torch.ones(2, 3))  # columns on two lines
        >>> result = dictionary(w, atoms=2, sparsity=1)
        >>> bool(result.error < 1e-6), result.codes.indices.T.tolist() in ([[0, 0, 0, 1, 1, 1]], [[1, 1, 1, 0, 0, 0]])
        (True, True)
    """
    if atoms < 1 or sparsity < 1:
        raise ValueError(f"atoms and sparsity must be at least 1, not {atoms} and {sparsity}")
    if sweeps < 0:
        raise ValueError(f"sweeps must be at least 0, not {sweeps}")
    check_steps(steps)
    atoms = min((atoms, *w.shape[-1:]))
    sparsity = min(sparsity, *w.shape[-2:-1], atoms)

    def learn(matrix: Tensor, d: Tensor | None) -> Factored:
        starts = _starts(matrix, atoms, generator) if d is None else [d]
        code = _code if steps is None else partial(_code_in_steps, steps=steps)
        best = min((code(matrix, d, sparsity) for d in starts), key=lambda found: float(found.error))

        def sweep(old: Factored) -> Factored:
            updated = _updated(matrix, old)
            return code(matrix, updated.d, sparsity, updated)

        return descend(best, sweep, sweeps)

    return factor_each(w, atoms, start, learn)


def factor_each(
    w: Tensor, size: int, start: Tensor | None, factor: Callable[[Tensor, Tensor | None], Factored]
) -> Dictionary:
    """Applies ``factor`` to every well-scaled matrix (m, n) of a batch and its start (m, size), if one is given."""
    work, scale, _ = prepare(w, "w")
    if work.numel() == 0:
        raise LinalgError.about("w", w, "is empty", "give it rows and columns")
    shape = (*w.shape[:-1], size)
    if start is not None and start.shape != shape:
        raise LinalgError.about("start", start, "does not fit w", f"give it the shape {shape}")
    matrices = work.reshape(-1, *w.shape[-2:])
    starts: list[Tensor | None] = [None] * len(matrices)
    if start is not None:
        starts = list(unit(prepare(start, "start").matrix.to(work.dtype)).reshape(-1, *shape[-2:]))
    found = [factor(matrix, own) for matrix, own in zip(matrices, starts, strict=True)]
    d, values, indices, error = (
        torch.stack(part).reshape(w.shape[:-2] + part[0].shape) for part in zip(*found, strict=True)
    )
    return Dictionary(d, SparseCodes(rescale(values, scale, "codes"), indices, size, error * scale))


def descend(best: Factored, sweep: Callable[[Factored], Factored], sweeps: int) -> Factored:
    """Repeats ``sweep`` while it lowers the error."""
    for _ in range(sweeps):
        found = sweep(best)
        stalled = not float(found.error) < (1 - _STALLED) * float(best.error)
        best = found if float(found.error) < float(best.error) else best
        if stalled:
            break
    return best


def _starts(w: Tensor, atoms: int, generator: torch.Generator | None) -> list[Tensor]:
    """Two sets of atoms: the leading left singular vectors, and the columns that span the largest volume."""
    leading = svd(w, atoms, driver=accurate_driver(w, atoms))
    pivots = pivot_rows(leading.vh.mT)
    if generator is None:
        generator = torch.Generator(device=w.device).manual_seed(0)
    drawn = torch.randperm(len(pivots.rest), generator=generator, device=w.device)[: atoms - leading.rank]
    more = w[:, pivots.rest[drawn]]  # none unless atoms > min(m, n)
    return [unit(torch.cat([basis, more], dim=1)) for basis in (leading.u, w[:, pivots.kept])]


def _code(w: Tensor, d: Tensor, sparsity: int, old: Factored | None = None) -> Factored:
    """The atoms d and the codes of all columns by them, on the old support where that is better."""
    gram, target = _normal_equations(w, d)
    supports = [] if old is None else [old.indices]
    supports.append(pursue(gram.to(w.dtype), target.to(w.dtype), sparsity))
    if d.shape[1] <= d.shape[0]:
        # The largest entries of D⁺W: exact where an exact code exists, which pursuit may miss among coherent atoms.
        supports.append(solve_spd(gram, target.mT).abs().topk(sparsity, dim=0).indices.mT)
    indices, values = best_fit(gram, target[:, None], supports, w.dtype)
    return Factored(d, values[:, 0], indices, squared_norm(_remainder(w, d, values[:, 0], indices)).sqrt())


def _code_in_steps(w: Tensor, d: Tensor, sparsity: int, old: Factored | None = None, *, steps: int) -> Factored:
    """As `_code`, with one exact refit instead of up to three: a column keeps its old code where that is better."""
    gram, target = _normal_equations(w, d)
    support = pursue(gram.to(w.dtype), target.to(w.dtype), sparsity, steps)
    indices, fitted = best_fit(gram, target[:, None], [support], w.dtype)
    values = fitted[:, 0]
    left = _remainder(w, d, values, indices)
    if old is not None:
        old_left = _remainder(w, d, old.values, old.indices)
        better = torch.linalg.vector_norm(left, dim=0) < torch.linalg.vector_norm(old_left, dim=0)
        indices = torch.where(better[:, None], indices, old.indices)
        values = torch.where(better[:, None], values, old.values)
        left = torch.where(better, left, old_left)
    return Factored(d, values, indices, squared_norm(left).sqrt())


def _normal_equations(w: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """DᵀD (k, k) and WᵀD (n, k), float64."""
    wide = d.to(torch.float64)
    return wide.mT @ wide, w.to(torch.float64).mT @ wide


def _remainder(w: Tensor, d: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """W - D S."""
    return w - d @ expand(values, indices, d.shape[1]).mT


def _updated(w: Tensor, old: Factored) -> Factored:
    """All atoms, one after the other, and their codes replaced by the best ones for the columns that use the atom."""
    codes = expand(old.values, old.indices, old.d.shape[1]).mT.contiguous()
    # A row for each column of w, because the users of an atom are gathered.
    remainder = _remainder(w, old.d, old.values, old.indices).mT.contiguous()
    d = old.d.mT.clone()
    for atom, code in zip(d, codes, strict=True):  # in turn: atoms that share a column change each other's task
        users = code.nonzero()[:, 0]
        if not len(users):
            continue
        part, weights = remainder[users], code[users]
        direction, fitted = atom.clone(), weights
        for _ in range(_POWER_STEPS):  # on part + weights ⊗ atom, what the users lack without the atom
            image = part.mT @ fitted + atom * (weights @ fitted)
            length = torch.linalg.vector_norm(image)
            direction = torch.where(length > 0, image / length, direction)
            fitted = part @ direction + weights * (atom @ direction)
        remainder[users] = part.addr(weights, atom).addr_(fitted, direction, alpha=-1)
        code.index_copy_(0, users, fitted)
        atom.copy_(direction)
    dead = (codes == 0).all(dim=1).nonzero()[:, 0]
    worst = torch.linalg.vector_norm(remainder, dim=1).topk(len(dead)).indices
    d[dead] = unit(w[:, worst]).mT
    values = codes.mT.gather(1, old.indices)
    return Factored(d.mT, values, old.indices, squared_norm(remainder).sqrt())


def unit(d: Tensor) -> Tensor:
    """Columns scaled to length one; zero columns stay."""
    lengths = torch.linalg.vector_norm(d, dim=-2, keepdim=True)
    return d / torch.where(lengths > 0, lengths, 1)
