"""The figures of one weight's singular values.

    s_1 >= ... >= s_p of W (m, n), p = min(m, n)

    energy at a fraction f     sum over i <= ceil(f p) of s_i^2 / ||W||_F^2
    kept at a ratio r          the same over i <= k, k the largest rank with k (m + n - k) <= (1 - r) m n
    stable rank                ||W||_F^2 / s_1^2
    effective, entropy rank    exp(-sum p_i log p_i),   p_i = s_i / sum s_j,   p_i = s_i^2 / sum s_j^2
    noise edge                 σ (√m + √n),   σ from the median singular value (Marchenko and Pastur)
    tail exponent              α of the density of s_i^2 ~ x^-α, x >= x_min (Clauset, Shalizi and Newman)

These are figures of the weight alone. What a truncation does to the outputs also depends on the inputs
(`eckart.compression.svd_llm`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..linalg import (
    break_even_rank,
    effective_rank,
    energy_at,
    marchenko_pastur_edge,
    noise_level,
    power_law_tail,
    rank_for_ratio,
    spectral_entropy,
    stable_rank,
)

__all__ = ["FRACTIONS", "RATIOS", "LayerSpectrum", "figures_of_values"]

#: Shares of full rank at which the energy is reported.
FRACTIONS = (0.1, 0.25, 0.5)
#: Budgets, as the fraction of a weight's numbers that is removed, at which the energy kept is reported.
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of one weight, in figures.

    Attributes:
        name: dotted module name.
        shape: (out, in).
        stable_rank: ||W||_F^2 / s_1^2.
        effective_rank: exp of the entropy of s / sum(s) (Roy and Vetterli, 2007).
        energy: share of ||W||_F^2 kept at 10, 25 and 50 % of full rank.
        break_even_rank: smallest rank at which two plain factors hold no fewer numbers than the weight.
        largest: s_1.
        condition: s_1 / s_p; infinite for a singular weight.
        singular_values: all of them, descending, float32.
        entropy_rank: exp of the entropy of s^2 / sum(s^2), at most the effective rank.
        tail_exponent: α of the power law that fits the tail of the eigenvalues of WᵀW best, as WeightWatcher reports
            it; NaN where there is no tail (fewer than two different eigenvalues above rounding).
        tail_distance: Kolmogorov-Smirnov distance of that fit; NaN where there is none.
        noise_edge: largest singular value of noise with the median singular value of this weight.
        above_noise: how many singular values are above the noise edge.
        kept: share of ||W||_F^2 that the best pivoted factors keep when they save "10%" to "50%" of the numbers.
        parameters: numbers that hold the weight: m n, fewer for a factored one.
    """

    name: str
    shape: tuple[int, int]
    stable_rank: float
    effective_rank: float
    energy: tuple[float, ...]
    break_even_rank: int
    largest: float
    condition: float
    singular_values: Tensor = field(repr=False)
    entropy_rank: float
    tail_exponent: float
    tail_distance: float
    noise_edge: float
    above_noise: int
    kept: dict[str, float]
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON numbers, None for what is infinite or not defined; the singular values are left out."""
        data = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "singular_values"}
        data["energy"] = {f"{fraction:.0%}": value for fraction, value in zip(FRACTIONS, self.energy, strict=True)}
        return data


def figures_of_values(name: str, shape: tuple[int, int], s: Tensor, parameters: int | None = None) -> LayerSpectrum:
    """All figures of a weight from its singular values.

    Args:
        name: dotted module name.
        shape: (m, n).
        s: (min(m, n),) singular values, any float dtype; float64 for the figures of a wide spectrum.
        parameters: numbers that hold the weight; default m n.

    Raises:
        LinalgError: not min(m, n) finite values >= 0.

    Example:
        >>> found = figures_of_values("q_proj", (4, 3), torch.tensor([2.0, 1.0, 1.0]))
        >>> found.stable_rank, round(found.kept["50%"], 6), found.parameters  # one of three directions
        (1.5, 0.666667, 12)
    """
    m, n = shape
    s = s.detach().double().cpu().sort(descending=True).values
    edge = marchenko_pastur_edge(shape, noise_level(s, shape))
    largest, smallest = float(s[0]), float(s[-1])
    # What is left of directions that the weight does not have would be the longest tail of all.
    certain = s[s > max(shape) * torch.finfo(torch.float32).eps * largest] / (largest or 1.0)
    tail = power_law_tail(certain.square())
    energies = (s / (largest or 1.0)).square().cumsum(0)
    total = float(energies[-1])

    def kept(rank: int) -> float:
        return (float(energies[rank - 1]) / total if rank else 0.0) if total > 0 else 1.0

    return LayerSpectrum(
        name=name,
        shape=(m, n),
        stable_rank=stable_rank(s),
        effective_rank=effective_rank(s),
        energy=tuple(energy_at(s, fraction) for fraction in FRACTIONS),
        break_even_rank=break_even_rank(m, n, "plain"),
        largest=largest,
        condition=largest / smallest if smallest > 0 else math.inf,
        singular_values=s.float(),
        entropy_rank=math.exp(spectral_entropy(s)) if largest > 0 else 0.0,
        tail_exponent=tail.exponent if tail else math.nan,
        tail_distance=tail.distance if tail else math.nan,
        noise_edge=edge,
        above_noise=int((s > edge).sum()),
        kept={f"{ratio:.0%}": kept(rank_for_ratio(m, n, ratio, "pivoted")) for ratio in RATIOS},
        parameters=m * n if parameters is None else parameters,
    )


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
