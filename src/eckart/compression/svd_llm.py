"""SVD-LLM: the rank-k weight whose OUTPUT on the calibration tokens is closest to the dense layer's.

    min over rank(B) <= k of ||X W^T - X B^T||_F^2 = tr((W - B) G (W - B)^T)     W (m, n), G = X^T X (n, n)
    W S = U diag(s) V^T with G = S S^T;   B = U_k diag(s_k) V_k^T S^-1;   loss^2 = sum of s_i^2 over i > k

X. Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model
Compression, ICLR 2025, arXiv 2403.07378, and SVD-LLM V2, NAACL 2025, arXiv 2503.12340; code:
AIoT-MLSys-Lab/SVD-LLM. S is a Cholesky factor in the first paper and an eigen factor in the second.
By default neither is formed: B = U_k U_k^T W, and U_k are eigenvectors of W G W^T, the same matrix
without an inverse. One Gram matrix serves all layers that share an input, grouped-query attention
included. The rank allocation of V2 is `allocation="svd-llm-v2"`, open to every method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..linalg import solve_spd, svd, whiten
from ..models.calibrate import Statistics
from .contract import Factors, WeightMethod

__all__ = ["SVDLLM", "update_up", "whitened_svd"]

Whitening = Literal["output", "eigen", "cholesky"]


def whitened_svd(weight: torch.Tensor, gram: torch.Tensor, rank: int, form: Literal["eigen", "cholesky"]) -> Factors:
    """The papers' recipe, in float64: factor the Gram matrix, SVD of W S, and S^-1 on the way back.

    Args:
        weight: (m, n).
        gram: (n, n).
        rank: k.
        form: "cholesky" (first paper) or "eigen" (V2).
    """
    if not bool(gram.any()):
        gram = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)  # no input: no direction is preferred
    whitening = whiten(gram, form=form)
    left = svd(weight.double() @ whitening.factor, rank, driver="exact")
    root = left.s.sqrt()
    return Factors(left.u * root, root[:, None] * (left.vh @ whitening.inverse))


def update_up(weight: torch.Tensor, factors: Factors, gram: torch.Tensor) -> Factors:
    """Closed-form refit of ``up`` on the inputs x' that really arrive, ``down`` kept.

    up = W G' D^T (D G' D^T)^-1          D = down (k, n), G' = sum of x' x'^T (n, n)

    Worked out as the least change of ``up``, so that what no input tells about stays as it was.
    """
    up, down = factors.up.double(), factors.down.double()
    right = down @ gram
    change = solve_spd(right @ down.mT, right @ (weight.double() - up @ down).mT).mT
    return Factors(up + change, down)


@dataclass(frozen=True)
class SVDLLM(WeightMethod):
    """Truncation-aware SVD.

    Attributes:
        whitening: "output" (eigenvectors of W G W^T, no whitening formed), "cholesky" (first paper) or
            "eigen" (V2). The same weights in exact arithmetic.
        update: refit one factor on the inputs that arrive from the compressed layers before it (the
            first paper's closed-form update); off as in its main recipe. Costs a second forward pass.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight, x = torch.randn(8, 6, generator=generator), torch.randn(99, 6, generator=generator)
        >>> statistics = Statistics(gram=(x.T @ x).double())
        >>> one, two = (SVDLLM(form).factorize(weight, statistics, rank=3) for form in ("output", "cholesky"))
        >>> torch.allclose((one.up @ one.down).double(), two.up @ two.down, atol=1e-4)
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    whitening: Whitening = "output"
    update: bool = False

    def __post_init__(self) -> None:
        self.check_choices(whitening=Whitening)
        if not isinstance(self.update, bool):
            raise ValueError(f"update must be true or false, not {self.update!r}")

    @property
    def gathers(self) -> frozenset[str]:
        """The Gram matrix, and with ``update`` also that of the compressed model's inputs."""
        return self.needs | {"compressed_gram"} if self.update else self.needs

    @property
    def surveys(self) -> frozenset[str]:
        """The Gram matrix alone."""
        return self.needs

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """G (n, n)."""
        return statistics.require("gram")

    def factorize(self, weight: torch.Tensor, statistics: Statistics, rank: int) -> Factors:
        """Factors of ``weight`` (m, n) of the given rank."""
        if self.whitening == "output":
            factors = super().factorize(weight, statistics, rank)
        else:
            factors = whitened_svd(weight, statistics.require("gram"), rank, self.whitening)
        if self.update and statistics.compressed_gram is not None:
            factors = update_up(weight, factors, statistics.compressed_gram)
        return factors
