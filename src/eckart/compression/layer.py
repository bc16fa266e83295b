"""One layer: from a method's factors to the structure that is stored, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..linalg import LinalgError, all_finite, num_parameters, weighted_norm
from ..linalg.rank import Form
from ..models.calibrate import Statistics
from ..models.result import LayerResult
from ..models.select import LinearRef
from ..structures import LowRank, Structure
from .contract import Factors, LayerMethod, StructureMethod, WeightMethod
from .policies import loss_spectrum

__all__ = ["Fit", "Measure", "compressed", "left_dense", "low_rank", "relative_error"]


@dataclass(frozen=True)
class Fit:
    """Compresses any of the selected linears: a task for an `eckart.compression.engine.Engine`.

    Attributes:
        method: how to factorise.
        ranks: rank of each linear by name.
        form: how factors are stored.
    """

    method: LayerMethod
    ranks: Mapping[str, int]
    form: Form

    def __call__(self, ref: LinearRef, statistics: Statistics | None) -> tuple[Structure | None, LayerResult]:
        """As `compressed`; a linear that no token came to, or that would not become smaller, stays dense."""
        rank = self.ranks[ref.name]
        if statistics is None or rank >= min(ref.shape):
            return None, left_dense(ref)
        return compressed(ref, self.method, statistics, rank, self.form)


@dataclass(frozen=True)
class Measure:
    """The spectrum (min(m, n),) of any linear under a method's own measure: a task for an engine.

    Attributes:
        method: whose measure.
        information: sum of the Fisher information over each weight by name, for spectra in units of the loss; 0 for one
            that is not there.
    """

    method: LayerMethod
    information: Mapping[str, float] | None = None

    def __call__(self, ref: LinearRef, statistics: Statistics | None) -> torch.Tensor:
        """All ones where no token came."""
        if statistics is None:
            return torch.ones(min(ref.shape))
        s = self.method.spectrum(ref.weight.detach(), statistics).cpu()
        if self.information is None:
            return s
        measure = self.method.weight_of_inputs(statistics)
        return loss_spectrum(s, measure, self.information.get(ref.name, 0.0), ref.shape)


def left_dense(ref: LinearRef) -> LayerResult:
    """The record of a layer that keeps its weight."""
    m, n = ref.shape
    return LayerResult(ref.name, ref.shape, min(m, n), "dense", m * n, 0.0)


def compressed(
    ref: LinearRef, method: LayerMethod, statistics: Statistics, rank: int, form: Form
) -> tuple[Structure | None, LayerResult]:
    """What takes the place of one linear, with as many numbers as factors of this rank would have; None: it stays.

    Raises:
        LinalgError: naming the layer, if its factorisation failed.
    """
    if isinstance(method, StructureMethod):
        return _built(ref, method, statistics, num_parameters(*ref.shape, rank, form))
    assert isinstance(method, WeightMethod)
    return _factored(ref, method, statistics, rank, form)


def _built(
    ref: LinearRef, method: StructureMethod, statistics: Statistics, parameters: int
) -> tuple[Structure | None, LayerResult]:
    weight = ref.weight.detach()
    try:
        structure = method.build(weight, statistics, parameters)
    except LinalgError as failure:
        raise LinalgError(f"{ref.name}: {failure}") from failure
    if structure is None:
        return None, left_dense(ref)
    structure.to(weight.dtype)
    if not all(all_finite(p) for p in structure.parameters()):
        raise LinalgError(f"{ref.name}: the factors do not fit in {weight.dtype}; compress in float32")
    stored = structure.nbytes() / weight.element_size()
    if stored > parameters:
        raise RuntimeError(
            f"{ref.name}: {type(method).__name__} stored {stored:,.0f} numbers of at most {parameters:,}"
        )
    shift = None if structure.bias is None else structure.bias.detach()
    error = relative_error(weight, structure.dense(), statistics, shift)
    numbers = structure.num_parameters()
    if ref.bias is not None:
        numbers -= 0 if shift is None else shift.numel()  # merged with the one that is there
        structure.bias = torch.nn.Parameter(ref.bias.detach() + (0 if shift is None else shift))
    return structure, LayerResult(ref.name, ref.shape, min(ref.shape), structure.type_name, numbers, error)


def _factored(
    ref: LinearRef, method: WeightMethod, statistics: Statistics, rank: int, form: Form
) -> tuple[LowRank, LayerResult]:
    """Factorise one linear and store it in the wanted form."""
    weight = ref.weight.detach()
    try:
        structure, factors = low_rank(ref, method.factorize(weight, statistics, rank), rank, form)
    except LinalgError as failure:
        raise LinalgError(f"{ref.name}: {failure}") from failure
    if not all(all_finite(p) for p in structure.parameters()):
        raise LinalgError(f"{ref.name}: the factors do not fit in {weight.dtype}; compress in float32")
    parameters = structure.num_parameters() - (0 if ref.bias is None else ref.out_features)
    error = relative_error(weight, factors.up.float() @ factors.down.float(), statistics)
    return structure, LayerResult(ref.name, ref.shape, structure.rank, structure.form, parameters, error)


def low_rank(ref: LinearRef, factors: Factors, rank: int, form: Form) -> tuple[LowRank, Factors]:
    """Factors in place of a linear, with its bias, in no more numbers than this rank takes in the wanted form.

    Where the pivoted form would lose more to rounding than truncation did, `LowRank.from_factors` falls
    back to plain factors, which cost more numbers: the rank is then lowered to stay within the budget.

    Returns:
        The structure, and the factors that are in it.
    """
    weight = ref.weight.detach()
    structure = _stored(ref, weight, factors, form)
    if structure.form != form:
        budget = num_parameters(*ref.shape, rank, form)
        factors = factors.truncate(max(1, budget // sum(ref.shape)))
        structure = _stored(ref, weight, factors, structure.form)
    return structure, factors


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


def relative_error(
    weight: torch.Tensor, approximation: torch.Tensor, statistics: Statistics, shift: torch.Tensor | None = None
) -> float:
    """sqrt(sum |E x - s|^2 / tr(W G W^T)), E = W - B, s the bias that B adds; of the weight itself without a Gram."""
    gram = statistics.gram if statistics.gram is not None else statistics.compressed_gram
    dense = weight.float()
    lost = dense - approximation.float()
    size = (lambda a: float(a.norm())) if gram is None else (lambda a: weighted_norm(a, gram))
    whole, squared = size(dense), size(lost) ** 2
    if shift is not None and gram is not None and statistics.mean is not None:
        moved = shift.double() - 2 * lost.double() @ statistics.mean.to(shift.device)
        squared += statistics.count * float(shift.double() @ moved)
    return max(0.0, squared) ** 0.5 / whole if whole else 0.0
