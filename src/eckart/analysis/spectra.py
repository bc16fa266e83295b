"""Figures of every weight's singular values: how much of it a low rank would keep.

    s_1 >= ... >= s_p of W (m, n), p = min(m, n);   energy at a fraction f: sum over i <= ceil(f p) of s_i^2 / ||W||_F^2

These are figures of the weights alone. What a truncation does to the outputs also depends on the inputs
(`eckart.compression.svd_llm`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..linalg import LinalgError, break_even_rank, effective_rank, energy_at, singular_values, stable_rank
from ..models.parallel import parallel_map
from ..models.progress import track
from ..models.select import LinearRef, Where, linears

__all__ = ["FRACTIONS", "LayerSpectrum", "spectra"]

#: Shares of full rank at which the energy is reported.
FRACTIONS = (0.1, 0.25, 0.5)


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
        singular_values: all of them, descending.
    """

    name: str
    shape: tuple[int, int]
    stable_rank: float
    effective_rank: float
    energy: tuple[float, ...]
    break_even_rank: int
    largest: float
    condition: float
    singular_values: torch.Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; the singular values are left out."""
        data = {key: value for key, value in asdict(self).items() if key != "singular_values"}
        data["energy"] = {f"{fraction:.0%}": value for fraction, value in zip(FRACTIONS, self.energy, strict=True)}
        return data


def spectra(model: nn.Module, *, where: Where | None = None, progress: bool = True) -> list[LayerSpectrum]:
    """Spectrum figures of every selected weight.

    Args:
        model: a transformers model; a structure's product is looked at as a whole.
        where: which linears, as in `eckart.models.linears`.
        progress: show a bar with the time left.

    Returns:
        One entry a weight, in the model's order.

    Raises:
        ValueError: the model has no linears.
        LinalgError: a weight has NaN or Inf entries, named by layer.

    Example:
        >>> import torch
        >>> block = torch.nn.Linear(4, 4, bias=False)
        >>> _ = torch.nn.init.eye_(block.weight)
        >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Sequential(block)])})
        >>> [found] = spectra(model, progress=False)
        >>> round(found.stable_rank, 6), round(found.effective_rank, 6), found.break_even_rank
        (4.0, 4.0, 2)
    """
    members = linears(model, where).linears
    # Enough at a time for every core to have work, few enough for the bar to move.
    groups = [members[start : start + 8] for start in range(0, len(members), 8)]
    found: list[LayerSpectrum] = []
    for group in track(groups, "spectra", enabled=progress):
        found += parallel_map(_figures, group, cost=lambda ref: ref.in_features * ref.out_features * min(ref.shape))
    return found


def _figures(ref: LinearRef) -> LayerSpectrum:
    try:
        s = singular_values(ref.weight.detach()).double().cpu()
    except LinalgError as error:
        raise LinalgError(f"{ref.name}: {error}") from error
    m, n = ref.shape
    smallest = float(s[-1])
    return LayerSpectrum(
        name=ref.name,
        shape=ref.shape,
        stable_rank=float(stable_rank(s)),
        effective_rank=float(effective_rank(s)),
        energy=tuple(float(energy_at(s, fraction)) for fraction in FRACTIONS),
        break_even_rank=break_even_rank(m, n, "plain"),
        largest=float(s[0]),
        condition=float(s[0]) / smallest if smallest > 0 else float("inf"),
        singular_values=s.float(),
    )
