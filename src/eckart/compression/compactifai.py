"""CompactifAI: every weight as a matrix product operator, a chain of cores with one bond dimension chi.

    W[(o_1 ... o_N), (i_1 ... i_N)] = G_1[:, o_1, i_1, :] ... G_N[:, o_N, i_N, :]    G_k (r_{k-1}, o_k, i_k, r_k)
    r_k = min(chi, numbers left of the bond, numbers right of it);   stored: sum of r_{k-1} o_k i_k r_k, r_0 = r_N = 1

A. Tomut et al., CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks, 2024,
arXiv 2401.14109. No official code. The decomposition is TT-SVD (`eckart.linalg.matrix_product_operator`): the nearest
chain for N = 2, where it is a sum of chi Kronecker products, and within sqrt(N - 1) of it beyond.

What we do: chi is the largest that fits what the layer may store, and a layer that no chi makes smaller stays dense.
The largest factor of the outputs meets the smallest of the inputs, which makes the sites more equal and leaves low rank
where the sizes are prime. Then the singular values of each bond are shared by both sides instead of all lying in the
last core, so that training the cores ("healing": `eckart compress --recover`) is well conditioned.

What to expect: weights alone are looked at, never data, and which rows share a site is an accident of their order. With
half of the numbers of SmolLM2-135M's matrices that loses to plain SVD in error (0.61 against 0.59 for an MLP's, 0.56
against 0.42 for a query's) and takes 14 and 12 times the operations of the dense product for a token, and a little more
than that product for a prompt. It is here because it is published, and to be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul

import torch

from ..linalg import balanced_factors, matrix_product_operator
from ..models.calibrate import Statistics
from ..structures import MatrixProductOperator
from .contract import StructureMethod

__all__ = ["CompactifAI", "balance_cores", "chain_parameters", "largest_bond", "site_factors"]


def site_factors(m: int, n: int, order: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factors of the outputs, descending, and of the inputs, ascending; sites with nothing in them are left out.

    Example:
        >>> site_factors(1536, 576, 2), site_factors(7, 5, 4)
        (((48, 32), (24, 24)), ((7, 1), (1, 5)))
    """
    pairs = zip(balanced_factors(m, order), reversed(balanced_factors(n, order)), strict=True)
    sites = [pair for pair in pairs if pair != (1, 1)] or [(1, 1)]
    outputs, inputs = zip(*sites, strict=True)
    return outputs, inputs


def bond_dimensions(sizes: Sequence[int], chi: int) -> list[int]:
    """r_1 ... r_{N-1} of a chain over sites of o_k i_k numbers: chi, or what the smaller side of the bond can fill."""
    left = list(accumulate(sizes, mul))
    return [min(chi, before, left[-1] // before) for before in left[:-1]]


def chain_parameters(sizes: Sequence[int], chi: int) -> int:
    """Numbers in the cores at bond dimension chi.

    Example:
        >>> chain_parameters([36, 36, 36], 10)  # 216 x 216 at chi = 10: 2 * 36 * 10 + 36 * 10^2
        4320
    """
    bonds = [1, *bond_dimensions(sizes, chi), 1]
    return sum(size * left * right for size, (left, right) in zip(sizes, pairwise(bonds), strict=True))


def largest_bond(sizes: Sequence[int], parameters: int) -> int | None:
    """The largest chi whose chain has at most so many numbers; None if even chi = 1 has more.

    Example:
        >>> largest_bond([36, 36, 36], 4320), largest_bond([36, 36, 36], 100)
        (10, None)
    """
    if chain_parameters(sizes, 1) > parameters:
        return None
    low, high = 1, max(bond_dimensions(sizes, sum(sizes) ** len(sizes)), default=1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chain_parameters(sizes, middle) <= parameters else (low, middle - 1)
    return low


def balance_cores(cores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same chain, with the singular values of every bond split evenly between its two sides.

        G_k  ->  diag(d_{k-1})^-1 G_k diag(d_k),     d_k[a]^2 = norm of row a of what follows bond k

    Args:
        cores: (r_{k-1}, o_k, i_k, r_k), all but the last left-orthonormal, as TT-SVD leaves them.

    Returns:
        Cores in float64. At each bond, column a of what precedes has the norm of row a of what follows.
    """
    wide = [core.double() for core in cores]
    following = wide[-1].new_ones(1, 1)  # Gram matrix of the rows of what follows a bond
    scales = [wide[-1].new_ones(1)]
    for core in reversed(wide[1:]):
        following = torch.einsum("aoib,bc,doic->ad", core, following, core)
        norms = following.diagonal().clamp(min=0).sqrt()
        # Rows without anything in them may have any scale.
        scales.insert(0, torch.where(norms > 0, norms, 1).sqrt())
    left = [wide[0].new_ones(1), *scales[:-1]]
    return [core / d[:, None, None, None] * e for core, d, e in zip(wide, left, scales, strict=True)]


@dataclass(frozen=True)
class CompactifAI(StructureMethod):
    """Matrix product operators of the largest bond dimension that fits.

    Attributes:
        order: number N of sites. 2 by default: the decomposition is optimal, the forward pass the cheapest, and the
            error on weights of a small language model about that of 3 and 4 sites. Reimplementations take 2 to 4.
        balance: split the singular values of each bond between its sides, for training; the same matrix.

    Example:
        >>> import torch
        >>> weight = torch.kron(torch.ones(4, 4), torch.eye(4)) + torch.kron(torch.eye(4), torch.ones(4, 4))
        >>> structure = CompactifAI().build(weight, Statistics(), parameters=64)
        >>> structure.ranks, structure.num_parameters(), torch.allclose(structure.dense(), weight, atol=1e-5)
        ((2,), 64, True)
    """

    order: int = 2
    balance: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or isinstance(self.order, bool) or self.order < 2:
            raise ValueError(f"order must be a whole number of at least 2 sites, not {self.order!r}; try 2 or 3")
        if not isinstance(self.balance, bool):
            raise ValueError(f"balance must be true or false, not {self.balance!r}")

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """None: the weight itself is approximated."""
        return None

    def build(self, weight: torch.Tensor, statistics: Statistics, parameters: int) -> MatrixProductOperator | None:
        """The chain of at most so many numbers; None if there is none."""
        m, n = weight.shape
        outputs, inputs = site_factors(m, n, self.order)
        chi = largest_bond([o * i for o, i in zip(outputs, inputs, strict=True)], parameters)
        if chi is None:
            return None
        chain = matrix_product_operator(weight, outputs, inputs, chi if len(outputs) > 1 else None)
        cores = balance_cores(chain.cores) if self.balance else chain.cores
        return MatrixProductOperator.from_cores(cores, dtype=weight.dtype)
