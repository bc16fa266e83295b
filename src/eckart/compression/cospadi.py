"""CoSpaDi: each output combines a few atoms of its layer's own dictionary, learnt in the norm of the layer's output.

    min over D, S of ||X W^T - X D S||_F = ||L (W^T - D S)||_F        W (m, n), X (tokens, n), G = X^T X = L^T L
    D (n, k) dense, S (k, m) with s nonzeros a column, k = rho s;     learnt as L W^T = (L D) S, then D = L^-1 (L D)

D. Shopkhoev et al., CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning, 2025, arXiv
2509.22075, for the solver "k-svd": orthogonal matching pursuit and K-SVD's atom updates by warm power steps, in turn.
The solver "rocket" is the same group's ROCKET: eigenvectors of L W^T (L W^T)^T as atoms, the largest entries of their
coefficients kept, and the dictionary refitted by least squares; 30 times faster. No official code was found for either.

What differs: the sweeps start from ROCKET's dictionary, which is worth one sweep or more, unless independent columns do
better, and end with its refit by least squares, which can only help. Pursuit adds its atoms in 16 steps instead of s
(`pursuit_steps`), and 3 sweeps are the default instead of some sixty: a 576 x 1536 weight then takes 17 s on one core,
and each further sweep 4 s. Every column of S has the same number of values; ROCKET lets 0.5 % of them move between
columns. Positions are stored as a bit mask or as indices and count in the budget, so that half precision, where they
are as large as before, has room for fewer atoms. Groups of layers with one dictionary are not built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch

from ..linalg import dictionary, orthogonal_matching_pursuit, pivot_rows, solve_spd, svd, whiten
from ..models.calibrate import Statistics
from ..structures import SparseDictionary
from ..structures.sparse_dictionary import Positions, positions_bytes, smaller_positions
from .contract import StructureMethod

__all__ = ["CoSpaDi", "Codes", "Layout", "balanced", "k_svd", "layout", "refitted", "rocket"]

Solver = Literal["k-svd", "rocket"]
Stored = Literal["smaller", "mask", "index"]

_SAMPLE = 96  # columns on which two starts are compared


class Codes(NamedTuple):
    """A matrix (n, m) as D (n, k) times sparse columns: support (m, s) and values (m, s) of each."""

    d: torch.Tensor
    support: torch.Tensor
    values: torch.Tensor

    def dense(self) -> torch.Tensor:
        """S (k, m) with its zeros."""
        empty = self.values.new_zeros(len(self.values), self.d.shape[1])
        return empty.scatter(1, self.support, self.values).mT


class Layout(NamedTuple):
    """Number k of atoms, number s of values a column, and how positions are stored."""

    atoms: int
    sparsity: int
    positions: Positions


def layout(
    shape: tuple[int, int],
    size: int,
    itemsize: int,
    *,
    rho: float = 2.0,
    most: int | None = None,
    stored: Stored = "smaller",
) -> Layout | None:
    """The largest dictionary with k / s = rho that takes at most ``size`` bytes; None if not even one atom fits.

        bytes = itemsize (n k + m s) + m * (ceil(k / 8), or s times 1, 2 or 4)

    Args:
        shape: (m, n) of the weight.
        size: bytes.
        itemsize: bytes of a number.
        rho: k / s; what is left over goes to s.
        most: largest k; m by default, beyond which a column would be an atom.
        stored: "mask", "index", or "smaller": whichever takes fewer bytes.

    Example:
        >>> layout((1536, 576), 2 * 707788, 2)  # bfloat16, 20 % smaller
        Layout(atoms=491, sparsity=245, positions='mask')
    """
    m, n = shape

    def needed(k: int, s: int) -> tuple[int, Positions]:
        positions = smaller_positions(k, s) if stored == "smaller" else stored
        return itemsize * (n * k + m * s) + m * positions_bytes(k, s, positions), positions

    def nonzeros(k: int) -> int:
        return max(1, min(n, math.floor(k / rho)))

    atoms, high = 0, m if most is None else most
    while atoms < high:
        middle = (atoms + high + 1) // 2
        atoms, high = (middle, high) if needed(middle, nonzeros(middle))[0] <= size else (atoms, middle - 1)
    if atoms == 0:
        return None
    sparsity = max(s for s in range(nonzeros(atoms), min(n, atoms) + 1) if needed(atoms, s)[0] <= size)
    return Layout(atoms, sparsity, needed(atoms, sparsity)[1])


def refitted(target: torch.Tensor, codes: Codes) -> Codes:
    """The same codes with the dictionary that fits them best, D = T S^T (S S^T)^-1; unused atoms become zero."""
    s = codes.dense().double()
    return codes._replace(d=solve_spd(s @ s.mT, s @ target.double().mT).mT.to(codes.d.dtype))


def rocket(
    target: torch.Tensor, atoms: int, sparsity: int, *, back: torch.Tensor | None = None, importance: float = 0.0
) -> Codes:
    """Leading directions, the coefficients of each column that weigh most, and the dictionary that fits these best.

        B (n, k) leading left singular vectors of T (n, m),  C = B^T T,  S keeps the largest |c_ij| ||M b_i||^importance

    Args:
        target: T = L W^T (n, m).
        atoms: k, at most min(m, n).
        sparsity: s. With s = k this is the truncated SVD.
        back: M = L^-1 (n, n); not needed without importance.
        importance: how much an atom counts that is large once it is carried back to the weight.
    """
    basis = svd(target, atoms).u
    coefficients = basis.mT @ target
    weighed = coefficients.abs()
    if back is not None and importance:
        weighed *= torch.linalg.vector_norm(back.to(basis.dtype) @ basis, dim=0)[:, None] ** importance
    support = weighed.topk(sparsity, dim=0).indices.mT.contiguous()
    return refitted(target, Codes(basis, support, coefficients.mT.gather(1, support)))


def k_svd(target: torch.Tensor, atoms: int, sparsity: int, *, sweeps: int, steps: int | None) -> Codes:
    """K-SVD from ROCKET's dictionary or from columns, and a last refit of the dictionary.

    Args:
        target: (n, m).
        atoms: k; beyond min(m, n), where there are no further directions, columns are drawn for the start.
        sparsity: s.
        sweeps: updates of all atoms and codes; the error never rises.
        steps: in how many steps pursuit adds the s atoms of a column; None for one at a time.
    """
    start = _start(target, atoms, sparsity, steps) if atoms <= min(target.shape) else None
    found = dictionary(target, atoms, sparsity, sweeps=sweeps, steps=steps, start=start)
    return refitted(target, Codes(found.atoms, found.codes.indices, found.codes.values))


def _start(target: torch.Tensor, atoms: int, sparsity: int, steps: int | None) -> torch.Tensor:
    """ROCKET's dictionary or the most independent columns, whichever codes a sample of the columns better.

    The columns win where they lie in a few subspaces, which K-SVD does not find from directions that mix them all.
    """
    columns = target[:, pivot_rows(svd(target, atoms).vh.mT).kept]
    sample = target[:, :: max(1, target.shape[1] // _SAMPLE)]

    def error(d: torch.Tensor) -> float:
        return float(orthogonal_matching_pursuit(d, sample, sparsity, steps=steps).error)

    return min(rocket(target, atoms, sparsity).d, columns, key=error)


def balanced(codes: Codes) -> Codes:
    """The same product, each atom as long as its row of coefficients: neither overflows where the other vanishes."""
    ratio = torch.linalg.vector_norm(codes.dense(), dim=1) / torch.linalg.vector_norm(codes.d, dim=0)
    scale = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1).sqrt()
    return Codes(codes.d * scale, codes.support, codes.values / scale[codes.support])


@dataclass(frozen=True)
class CoSpaDi(StructureMethod):
    """Dictionaries with sparse columns, learnt under the calibration Gram matrix.

    Attributes:
        solver: "k-svd" (CoSpaDi) or "rocket" (closed form, seconds for a whole small model).
        rho: atoms for each nonzero of a column, k / s, at least 1; 2 as published.
        sweeps: of K-SVD, at least 0; 3, see the module.
        pursuit_steps: in how many steps pursuit chooses the s atoms of a column; None for one at a time, as published,
            which takes 17 times as long for a 0.3 % smaller error.
        importance: exponent of ROCKET's weight of an atom; 0.5 as published. 0 has the smaller error on the calibration
            tokens. The solver "k-svd" has no use for it.
        ridge: added to the diagonal of the Gram matrix, relative to its mean, 1e-6, so that directions which the
            calibration text hardly visits are not left to rounding; 0 adds the least that makes it invertible.
        positions: "smaller", "mask" (a bit for each atom and output) or "index" (faster; larger unless rho > 8).

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight, x = torch.randn(24, 16, generator=generator), torch.randn(99, 16, generator=generator)
        >>> structure = CoSpaDi().build(weight, Statistics(gram=(x.T @ x).double()), parameters=300)
        >>> structure.atoms, structure.sparsity, structure.nbytes() <= 4 * 300
        (10, 5, True)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    solver: Solver = "k-svd"
    rho: float = 2.0
    sweeps: int = 3
    pursuit_steps: int | None = 16
    importance: float = 0.5
    ridge: float = 1e-6
    positions: Stored = "smaller"

    def __post_init__(self) -> None:
        self.check_choices(solver=Solver, positions=Stored)
        for name, value, least in (("rho", self.rho, 1), ("importance", self.importance, 0), ("ridge", self.ridge, 0)):
            if not least <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least {least}, not {value}")
        for name, count, least in (("sweeps", self.sweeps, 0), ("pursuit_steps", self.pursuit_steps, 1)):
            optional = name == "pursuit_steps" and count is None
            if not optional and (not isinstance(count, int) or count < least):
                raise ValueError(f"{name} must be a whole number of at least {least}, not {count}")

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """G (n, n)."""
        return statistics.require("gram")

    def build(self, weight: torch.Tensor, statistics: Statistics, parameters: int) -> SparseDictionary | None:
        """The dictionary and codes that fit into so many numbers; None if not even one atom does."""
        itemsize, most = weight.element_size(), min(weight.shape) if self.solver == "rocket" else None
        sizes = layout(
            (weight.shape[0], weight.shape[1]),
            parameters * itemsize,
            itemsize,
            rho=self.rho,
            most=most,
            stored=self.positions,
        )
        if sizes is None:
            return None
        codes = self.codes(weight, statistics.require("gram"), sizes.atoms, sizes.sparsity)
        return SparseDictionary.from_codes(*codes, positions=sizes.positions, dtype=weight.dtype)

    def codes(self, weight: torch.Tensor, gram: torch.Tensor, atoms: int, sparsity: int) -> Codes:
        """D (n, k) and S (k, m) of W^T, of given sizes.

        Args:
            weight: (m, n).
            gram: (n, n).
            atoms: k.
            sparsity: s.
        """
        if not bool(gram.any()):
            gram = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)  # no input: no direction is preferred
        whitening = whiten(gram, form="cholesky", shrinkage=self.ridge or "auto")
        target, back = whitening.factor.mT @ weight.double().mT, whitening.inverse.mT
        if weight.dtype != torch.float64:
            target = target.float()
        if self.solver == "rocket":
            codes = rocket(target, atoms, sparsity, back=back, importance=self.importance)
        else:
            codes = k_svd(target, atoms, sparsity, sweeps=self.sweeps, steps=self.pursuit_steps)
        return balanced(Codes(back @ codes.d.double(), codes.support, codes.values.double()))
