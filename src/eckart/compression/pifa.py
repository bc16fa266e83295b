"""PIFA / MPIFA: each layer fitted to the inputs that reach it in the compressed model, stored pivoted.

    min over rank(B) <= k of sum_t ||y_t - B x'_t||^2 + e ||W - B||_F^2,   y = (1 - mix) W x' + mix W x
    W_ls = W ((1 - mix) G' + mix K + e I) (G' + e I)^-1,   B = U_k U_k^T W_ls,     W (m, n)
    U_k = leading eigenvectors of W_ls (G' + e I) W_ls^T    G' = sum x' x'^T,  K = sum x x'^T  (n, n)

x is the layer's input in the dense model and x' the one that arrives from the compressed layers before
it, so a layer also mends what those lost. J. Zhao et al., Pivoting Factorization: A Compact Meta
Low-Rank Representation of Sparsity for Efficient Inference in Large Language Models, ICML 2025, arXiv
2501.19090; code: biomedical-cybernetics/pivoting-factorization. The paper alternates between the two
factors for two rounds; this is the same objective solved at once, by reduced-rank regression, to its
global optimum. The ridge pulls towards the dense weight and not, as in the paper, towards zero: directions
that the calibration text hardly visits keep what they had. The storage as k of the weight's own rows is
`eckart.structures.LowRank`, the default form of every method here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..linalg import solve_spd
from ..linalg.weighted import weighted_svd
from ..models.calibrate import Statistics
from .contract import Factors, WeightMethod

__all__ = ["PIFA", "reduced_rank_regression"]


def reduced_rank_regression(
    weight: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, rank: int, *, mix: float, ridge: float
) -> Factors:
    """Best rank-k map from the compressed model's inputs to the mixed targets.

    Args:
        weight: (m, n) dense weight W.
        gram: (n, n) G', sum of x' x'^T.
        cross: (n, n) K, sum of x x'^T.
        rank: k.
        mix: share of the dense model's own outputs in the target, 0 to 1.
        ridge: e relative to the mean diagonal of G'. With 0, directions that no input visits are forgotten.

    Returns:
        up (m, k) with orthonormal columns and down (k, n).
    """
    # Where no input ever arrived, any e says the same: stay close to W.
    pull = ridge * (float(gram.diagonal().mean()) or 1.0)
    target, weighted = torch.lerp(gram, cross, mix), gram.clone()
    for matrix in (target, weighted):
        matrix.diagonal().add_(pull)
    # W M (G' + e I)^-1 = (solve (G' + e I) Z = M^T W^T)^T: one solve with m right-hand sides.
    fitted = solve_spd(weighted, target.mT @ weight.double().mT).mT
    # The basis may be worked out in float32, but not from numbers rounded to half precision.
    basis = weighted_svd(fitted if weight.dtype == torch.float64 else fitted.float(), weighted, rank).basis.double()
    return Factors(basis, basis.mT @ fitted)


@dataclass(frozen=True)
class PIFA(WeightMethod):
    """Error-compensated low-rank layers.

    Attributes:
        mix: share of the dense model's outputs in each layer's target; the rest is what the dense layer
            would answer to the compressed model's inputs. 0.25 in the paper; 0.35 by default, chosen on a
            held-out slice of the calibration text.
        ridge: how strongly a fitted layer is pulled towards its dense weight, relative to the mean diagonal of the
            Gram matrix; 1e-4.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight, x = torch.randn(8, 6, generator=generator), torch.randn(99, 6, generator=generator)
        >>> gram = (x.T @ x).double()
        >>> statistics = Statistics(compressed_gram=gram, cross_gram=gram)
        >>> factors = PIFA(ridge=0.0).factorize(weight, statistics, rank=6)
        >>> torch.allclose((factors.up @ factors.down).float(), weight, atol=1e-4)
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"compressed_gram", "cross_gram"})

    mix: float = 0.35
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix must lie in [0, 1], not {self.mix}; the paper uses 0.25")
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge must be a number of at least 0, not {self.ridge}; the default is 1e-4")

    @property
    def surveys(self) -> frozenset[str]:
        """The Gram matrix of the dense model: ranks are chosen before anything is compressed."""
        return frozenset({"gram"})

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """G (n, n) of the dense model."""
        return statistics.require("gram")

    def factorize(self, weight: torch.Tensor, statistics: Statistics, rank: int) -> Factors:
        """Factors of ``weight`` (m, n) of the given rank."""
        gram, cross = statistics.require("compressed_gram"), statistics.require("cross_gram")
        return reduced_rank_regression(weight, gram, cross, rank, mix=self.mix, ridge=self.ridge)
