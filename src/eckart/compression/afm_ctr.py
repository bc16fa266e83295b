"""Atomic feature mimicking: PCA of a layer's OUTPUT around its mean, folded into two linears and a bias.

    y = W x + b,  W (m, n),   mu = E[y],  Cov[y] = U diag(l) U^T      y_k - mu = U_k U_k^T (y - mu)
    down = U_k^T W (k, n),   up = U_k (m, k),   bias = U_k U_k^T b + (I - U_k U_k^T) mu
    E||y - y_k||^2 = sum of l_i over i > k,   E[y_k] = mu
    embedding table D (V, d):   codes (D - mu) U_k (V, k),   e = U_k code + mu,   both over the rows that are LOOKED UP

H. Yu et al., Unified Low-rank Compression Framework for Click-through Rate Prediction, KDD 2024, arXiv 2405.18146;
code: yuhao318/Atomic_Feature_Mimicking, whose demonstrations do not run, so this is written from the formulas. For
transformers it is H. Yu and J. Wu, Compressing Transformers: Features are low-rank, but weights are not!, AAAI 2023.
What differs: the inner bias is folded into the outer one; moments are summed around the running mean, not by
subtracting a square; the vector of a padding id is kept exactly. Without the mean, U_k U_k^T W is SVD-LLM's weight.

`AFM` compresses the linears of transformers models; the covariance of y follows from the Gram matrix and the mean of x.
Recommender models, with embeddings, are for `eckart.compression.mimicking`. Fine-tune afterwards, as the paper does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..linalg import eigh, rank_for_parameters, weighted_svd
from ..linalg.rank import Form
from ..models.calibrate import Statistics
from ..models.output_moments import Moments
from ..structures import LowRank, Structure
from ..structures.low_rank_embedding import LowRankEmbedding
from .contract import StructureMethod

__all__ = ["AFM", "Atoms", "atoms", "centred_gram", "mimic_embedding", "mimic_linear", "mimic_with_activation"]


class Atoms(NamedTuple):
    """The principal directions of a layer's outputs.

    Attributes:
        basis: U_k (m, k), orthonormal columns, float64.
        mean: mu (m,), float64.
        error: root of E||y - y_k||^2 / E||y||^2.
    """

    basis: Tensor
    mean: Tensor
    error: float


def atoms(moments: Moments, rank: int) -> Atoms:
    """PCA of the outputs that moments describe.

    Args:
        moments: of outputs (m,).
        rank: k.

    Example:
        >>> y = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
        >>> found = atoms(Moments.of(y), rank=1)
        >>> found.basis.abs().tolist(), found.mean.tolist(), found.error
        ([[1.0], [0.0]], [2.0, 5.0], 0.0)
    """
    values, vectors = eigh(moments.scatter)
    lost = float(values[rank:].clamp_min(0).sum())
    whole = float(moments.scatter.trace()) + moments.count * float(moments.mean.square().sum())
    return Atoms(vectors[:, :rank], moments.mean, math.sqrt(lost / whole) if whole else 0.0)


def mimic_linear(weight: Tensor, bias: Tensor | None, found: Atoms) -> tuple[Tensor, Tensor, Tensor]:
    """up (m, k), down (k, n) and bias (m,) that put out the projection of y = W x + b, in float64.

    Args:
        weight: W (m, n).
        bias: b (m,), or None for zero.
        found: from y.
    """
    basis, mean, _ = found
    inner = 0 if bias is None else basis @ (basis.mT @ bias.double())
    return basis, basis.mT @ weight.double(), mean - basis @ (basis.mT @ mean) + inner


def mimic_with_activation(linear: nn.Linear, found: Atoms, activation: nn.Module) -> nn.Sequential:
    """The paper's other variant: the layer's activation between the two linears too.

        U_k act(U_k^T W x + U_k^T b) + (I - U_k U_k^T) mu

    NOT what the layer put out: a ReLU cuts half of the principal coordinates off. It is a start for training, of a
    network of another shape.

    Args:
        linear: y = W x + b.
        found: from y.
        activation: between the two.
    """
    basis, mean, _ = found
    (m, k), n, weight = basis.shape, linear.in_features, linear.weight
    first, second = (
        nn.Linear(inputs, outputs, device=weight.device, dtype=weight.dtype) for inputs, outputs in ((n, k), (k, m))
    )
    bias = weight.new_zeros(m) if linear.bias is None else linear.bias
    with torch.no_grad():
        first.weight.copy_(basis.mT @ weight.double())
        first.bias.copy_(basis.mT @ bias.double())
        second.weight.copy_(basis)
        second.bias.copy_(mean - basis @ (basis.mT @ mean))
    return nn.Sequential(first, activation, second)


def mimic_embedding(embedding: nn.Embedding, found: Atoms) -> LowRankEmbedding:
    """The embedding of rank k around the mean of what was looked up; the padding vector is kept.

    Args:
        embedding: table D (V, d).
        found: from the vectors of the ids in the data, which so count as often as they occur.
    """
    table, padding = embedding.weight.detach(), embedding.padding_idx
    return LowRankEmbedding.from_table(table, found.basis, found.mean, padding, sparse=embedding.sparse)


def centred_gram(gram: Tensor, mean: Tensor, count: int) -> Tensor:
    """N Cov[x] = sum (x - mean)(x - mean)^T (n, n), from sum x x^T, which is left as it is."""
    centred = gram.double() - count * torch.outer(mean, mean)
    # Where an input hardly varies, its variance is the difference of two large numbers and may come out below zero.
    centred.diagonal().clamp_min_(0)
    return centred


@dataclass(frozen=True)
class AFM(StructureMethod):
    """Low-rank layers that keep the mean of their outputs.

    The bias counts for the budget, as layers without one get one.

    Attributes:
        center: around the mean of the outputs; without it, the weight of `SVDLLM` and no bias.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight, x = torch.randn(12, 9, generator=generator), torch.randn(99, 9, generator=generator) + 3
        >>> statistics = Statistics(99, gram=(x.T @ x).double(), mean=x.double().mean(0))
        >>> layer = AFM().build(weight, statistics, parameters=99)
        >>> layer.rank, torch.allclose(layer(x).mean(0), (x @ weight.T).mean(0), atol=1e-4)
        (4, True)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "mean"})

    center: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.center, bool):
            raise ValueError(f"center must be true or false, not {self.center!r}")

    def weight_of_inputs(self, statistics: Statistics) -> Tensor | None:
        """N Cov[x] (n, n); without centring, the Gram matrix."""
        gram = statistics.require("gram")
        return centred_gram(gram, statistics.require("mean"), statistics.count) if self.center else gram

    def build(self, weight: Tensor, statistics: Statistics, parameters: int) -> Structure | None:
        """The largest rank whose pivoted factors, with their index and the bias, fit."""
        m, n = weight.shape
        index = 2 * min(m, n)  # four bytes each, as numbers of half precision, so that the rank depends on no type
        spare = parameters - (m if self.center else 0)
        rank = rank_for_parameters(m, n, spare - index)
        if rank < 1 or parameters >= m * n:
            return None
        layer = self._layer(weight, statistics, rank, "pivoted")
        if layer.form == "plain":  # rounding would have cost the pivoted form more
            rank = spare // (m + n)
            return self._layer(weight, statistics, rank, "plain") if rank else None
        return layer

    def _layer(self, weight: Tensor, statistics: Statistics, rank: int, form: Form) -> LowRank:
        best = weighted_svd(weight, self.weight_of_inputs(statistics), rank)
        basis = best.basis.double()
        bias = None
        if self.center:
            mean = weight.double() @ statistics.require("mean").to(weight.device)
            bias = mean - basis @ (basis.mT @ mean)
        down = basis.mT @ weight.double()
        lost = float((weight.double() - basis @ down).norm())
        return LowRank.from_factors(basis, down, bias=bias, form=form, dtype=weight.dtype, truncation_error=lost)
