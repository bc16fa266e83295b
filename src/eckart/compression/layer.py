"""One layer: from a method's factors to the structure that is stored, and what that cost."""

from __future__ import annotations

import torch

from ..linalg import LinalgError, all_finite, num_parameters, weighted_norm
from ..linalg.rank import Form
from ..models.calibrate import Statistics
from ..models.result import LayerResult
from ..models.select import LinearRef
from ..structures import LowRank
from .contract import Factors, WeightMethod

__all__ = ["factored", "left_dense"]


def left_dense(ref: LinearRef) -> LayerResult:
    """The record of a layer that keeps its weight."""
    m, n = ref.shape
    return LayerResult(ref.name, ref.shape, min(m, n), "dense", m * n, 0.0)


def factored(
    ref: LinearRef, method: WeightMethod, statistics: Statistics, rank: int, form: Form
) -> tuple[LowRank, LayerResult]:
    """Factorise one linear and store it in the wanted form.

    Where the pivoted form would lose more to rounding than truncation did, `LowRank.from_factors` falls
    back to plain factors, which cost more numbers: the rank is then lowered to stay within the budget.

    Raises:
        LinalgError: naming the layer, if its factorisation failed.
    """
    weight = ref.weight.detach()
    try:
        factors = method.factorize(weight, statistics, rank)
        structure = _stored(ref, weight, factors, form)
        if structure.form != form:
            budget = num_parameters(*ref.shape, rank, form)
            lower = max(1, budget // sum(ref.shape))
            factors = factors.truncate(lower)
            structure = _stored(ref, weight, factors, structure.form)
    except LinalgError as failure:
        raise LinalgError(f"{ref.name}: {failure}") from failure
    if not all(all_finite(p) for p in structure.parameters()):
        raise LinalgError(f"{ref.name}: the factors do not fit in {weight.dtype}; compress in float32")
    parameters = structure.num_parameters() - (0 if ref.bias is None else ref.out_features)
    error = _relative_error(weight, factors, statistics)
    return structure, LayerResult(ref.name, ref.shape, structure.rank, structure.form, parameters, error)


def _stored(ref: LinearRef, weight: torch.Tensor, factors: Factors, form: Form) -> LowRank:
    lost = weight.float() - (factors.up.float() @ factors.down.float())
    return LowRank.from_factors(
        factors.up,
        factors.down,
        bias=None if ref.bias is None else ref.bias.detach(),
        form=form,
        dtype=weight.dtype,
        truncation_error=float(lost.norm()),
    )


def _relative_error(weight: torch.Tensor, factors: Factors, statistics: Statistics) -> float:
    """sqrt(tr(E G E^T) / tr(W G W^T)), E = W - B; of the weight itself without a Gram matrix."""
    gram = statistics.gram if statistics.gram is not None else statistics.compressed_gram
    dense = weight.float()
    lost = dense - (factors.up.float() @ factors.down.float())
    size = (lambda a: float(a.norm())) if gram is None else (lambda a: weighted_norm(a, gram))
    whole = size(dense)
    return size(lost) / whole if whole else 0.0
