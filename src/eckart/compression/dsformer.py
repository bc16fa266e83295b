"""DSFormer: a dense dictionary times a semi-structured sparse matrix, instead of two thin dense factors.

    Wᵀ (n, m) ≈ D S,   D (n, k),   S (k, m) with s nonzeros a column, at the same places in each block of c columns
    stored: n k + s m numbers and s m / c small integers          s = k: the best rank-k approximation
    or N of every M neighbours in a column:   s = k N / M,   n k + s m numbers and s m positions of 1 to 8 bits

R. Chand, Y. Prabhu, P. Kumar, DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight
Factorization, 2023, arXiv 2312.13211; no official code. Only the form and the straight-through training
are in the abstract; the layout in blocks and the steps of the factoriser are ours, so this is in the
manner of DSFormer and no reproduction. Here is the task-unaware route: alternating sparse coding and
least squares on the trained weight (`eckart.linalg.dense_sparse`). Training through the factorisation
is `eckart.compression.straight_through`. With ``calibrated`` the error is that of the layer's output on
calibration tokens, which the paper leaves to the training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..linalg import Dictionary, dense_sparse, pivot_rows, svd, whiten
from ..models.calibrate import Statistics
from ..structures import BlockSparseDictionary, SemiStructuredDictionary, Structure
from .contract import StructureMethod
from .dense_sparse_sizes import Sizes, parse_pattern, sizes_for, sizes_of_pattern

__all__ = ["DSFormer", "factorise", "structure_of"]


def factorise(weight: torch.Tensor, sizes: Sizes, *, gram: torch.Tensor | None = None, sweeps: int = 10) -> Dictionary:
    """D and S by alternating least squares.

        min ||(W - Ŵ) R||_F,   R Rᵀ = gram, or R = 1:   Rᵀ Wᵀ ≈ (Rᵀ D) S

    Args:
        weight: (m, n).
        sizes: of the factors.
        gram: (n, n) Gram matrix of the inputs, or None.
        sweeps: updates of D; it ends earlier where nothing is gained.

    Returns:
        D (n, k) as atoms and S as codes; the error is that of the objective.
    """
    if gram is None or not bool(gram.any()):
        return _from_the_better_start(weight.mT, sizes, sweeps)
    whitening = whiten(gram)
    found = _from_the_better_start(whitening.factor.mT @ weight.double().mT, sizes, sweeps)
    return Dictionary(whitening.inverse.mT @ found.atoms, found.codes)


def _from_the_better_start(matrix: torch.Tensor, sizes: Sizes, sweeps: int) -> Dictionary:
    """The factors of Wᵀ (n, m) from its singular vectors, or from its own most independent columns if they fit better.

    Where the outputs lie in a union of small subspaces, their columns are atoms already and singular vectors are not.
    """
    nonzeros = sizes.sparsity if sizes.pattern is None else None

    def fit(start: torch.Tensor | None, sweeps: int) -> Dictionary:
        return dense_sparse(
            matrix,
            sizes.atoms,
            nonzeros=nonzeros,
            n_of_m=sizes.pattern,
            block=sizes.block,
            sweeps=sweeps,
            start=start,
        )

    leading = svd(matrix, sizes.atoms).vh
    starts = [None, matrix[:, pivot_rows(leading.mT).kept]]
    first = min((fit(start, 0) for start in starts), key=lambda found: float(found.error))
    return fit(first.atoms, sweeps) if sweeps else first


def structure_of(found: Dictionary) -> BlockSparseDictionary:
    """The factors with positions in blocks as a layer, without bias.

    Example:
        >>> found = factorise(torch.eye(4), Sizes(atoms=4, sparsity=2, block=2))
        >>> torch.allclose(structure_of(found).dense(), torch.eye(4), atol=1e-6)
        True
    """
    values = found.codes.values.unflatten(0, (-1, found.codes.block)).mT
    return BlockSparseDictionary.from_codes(found.atoms, found.codes.indices, values)


@dataclass(frozen=True)
class DSFormer(StructureMethod):
    """Dense-sparse factorisation of each weight.

    Without training through it, on matrices of a language model of 135M weights in bfloat16, the error is about that of
    pivoted low rank of the same size when half is removed, and larger when less is. What is gained is gained by
    `eckart.compression.straight_through`, or where outputs fall into groups. Positions of their own in few bits do
    better than blocks: with half removed from a (576, 576) and a (1536, 576) matrix of that model in bfloat16, relative
    errors are 0.466 and 0.571 in blocks of 4, 0.443 and 0.508 for "2:4", 0.426 and 0.486 for "1:4", and 0.455 and 0.569
    for pivoted low rank (4 sweeps).

    Attributes:
        overcomplete: atoms a nonzero, k / s; 2. 1 gives low rank.
        block: outputs that share their positions, 4. 1 lets each output choose, at the price of more positions; 16
            makes larger dense products and larger errors.
        sweeps: updates of D, 10.
        pattern: "N:M", such as "2:4": each output uses N of every M atoms, so that k / s = M / N, and has positions of
            its own, 2 bits each at 2:4. In place of ``overcomplete`` and ``block``; None for positions in blocks.
        calibrated: whether inputs count as often as calibration tokens visit them.

    Example:
        >>> weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
        >>> layer = DSFormer().build(weight, Statistics(), parameters=400)
        >>> layer.atoms, layer.sparsity, layer.nbytes() <= 4 * 400
        (11, 4, True)
    """

    overcomplete: float = 2.0
    block: int = 4
    sweeps: int = 10
    pattern: str | None = None
    calibrated: bool = False

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 1 <= self.overcomplete < math.inf:
            raise ValueError(f"overcomplete is atoms a nonzero, at least 1, not {self.overcomplete}; usual are 2 to 4")
        for name, least in (("block", 1), ("sweeps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.pattern is not None:
            parse_pattern(self.pattern)
            if (self.overcomplete, self.block) != (2.0, 4):
                raise ValueError("a pattern says how many atoms an output uses: leave out overcomplete and block")
        if not isinstance(self.calibrated, bool):
            raise ValueError(f"calibrated must be true or false, not {self.calibrated!r}")

    @property
    def gathers(self) -> frozenset[str]:
        """The Gram matrix if ``calibrated``."""
        return frozenset({"gram"}) if self.calibrated else self.needs

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """G (n, n) if ``calibrated``."""
        return statistics.require("gram") if self.calibrated else None

    def build(self, weight: torch.Tensor, statistics: Statistics, parameters: int) -> Structure | None:
        """The dictionary and codes of ``weight`` (m, n) within ``parameters`` numbers."""
        m, n = weight.shape
        itemsize, gram = weight.element_size(), self.weight_of_inputs(statistics)
        if self.pattern is None:
            sizes = sizes_for(m, n, parameters, overcomplete=self.overcomplete, block=self.block, itemsize=itemsize)
        else:
            sizes = sizes_of_pattern(m, n, parameters, parse_pattern(self.pattern), itemsize=itemsize)
        if sizes is None:
            return None
        found = factorise(weight, sizes, gram=gram, sweeps=self.sweeps)
        if sizes.pattern is None:
            return structure_of(found)
        return SemiStructuredDictionary.from_codes(found.atoms, found.codes.indices, found.codes.values, sizes.pattern)
