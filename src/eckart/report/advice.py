"""What to compress first and how far, from the spectra of the weights alone.

For a ratio r the ranks are those that `eckart.compress` would choose, and so are the bytes; the energy kept is

    sum over layers of sum_{i <= k_l} s_li^2  /  sum over layers of ||W_l||_F^2

The suggested ratio is the largest at which this is at least `ENOUGH` and no more than `CLEARLY` of what random weights
would lose is lost: random weights keep 96 % of their energy where a tenth of their numbers goes, and have no low rank.
That is a rule of thumb: what a truncation does to the outputs depends on the inputs too, which no spectrum knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..analysis import RATIOS, LayerSpectrum
from ..compression.budget import Budget, kinds_of
from ..linalg import marchenko_pastur_energy, num_parameters
from ..linalg.allocate import Policy

__all__ = ["CLEARLY", "ENOUGH", "Advice", "Step", "advise", "noise_kept"]

#: Share of the weights' energy that the suggested ratio keeps, where any ratio does.
ENOUGH = 0.95
#: Share of what random weights would lose that the suggested ratio loses at most.
CLEARLY = 0.8


@dataclass(frozen=True)
class Step:
    """What one ratio would leave.

    Attributes:
        ratio: fraction of the selected weights' numbers that is removed.
        bytes: size of the whole model afterwards.
        kept: share of the energy kept with the same ratio for every weight.
        noise: the same for random weights of these shapes and norms.
        shared: the same where the budget goes to where it keeps the most (``--allocation threshold``).
        worst: smallest share that one weight keeps at the same ratio for all.
        worst_layer: which weight that is.
    """

    ratio: float
    bytes: int
    kept: float
    noise: float
    shared: float
    worst: float
    worst_layer: str

    @property
    def enough(self) -> bool:
        """Whether the weights keep enough, and clearly more than random ones."""
        return self.kept >= ENOUGH and 1 - self.kept <= CLEARLY * (1 - self.noise)


@dataclass(frozen=True)
class Advice:
    """The suggestion.

    Attributes:
        steps: one entry a ratio.
        ratio: the suggested one.
        enough: whether the weights keep enough energy there; if not, they do so at no ratio, and it is the smallest.
        bytes: predicted size of the whole model.
        kept: share of the energy kept.
        ranks: rank of each weight at that ratio; min(m, n) is dense.
        saved: bytes that each weight would save.
    """

    steps: list[Step]
    ratio: float
    enough: bool
    bytes: int
    kept: float
    ranks: dict[str, int]
    saved: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; ranks and savings stand with the layers."""
        mine = {key: getattr(self, key) for key in ("ratio", "enough", "bytes", "kept")}
        return {**mine, "threshold": ENOUGH, "steps": [vars(step) for step in self.steps]}


def advise(layers: Sequence[LayerSpectrum], size: int, itemsize: Mapping[str, int]) -> Advice | None:
    """Suggest a ratio.

    Args:
        layers: spectra of the selected weights, all dense.
        size: bytes of the whole model now.
        itemsize: bytes of one number of each weight.

    Returns:
        The suggestion, with the ratios of `eckart.analysis.RATIOS` beside it; None if the weights are too small for
        any of them.

    Example:
        >>> from eckart.analysis.layer_spectrum import figures_of_values
        >>> steep = figures_of_values("steep", (64, 64), 2.0 ** -torch.arange(64.0))
        >>> found = advise([steep], 4 * 64 * 64, {"steep": 4})
        >>> found.ratio, found.ranks, found.bytes  # 18 (64 + 64 - 18) numbers and an index of 64
        (0.5, {'steep': 18}, 8176)
    """
    steps, chosen = [], None
    spectra = {layer.name: layer.singular_values.double() for layer in layers}
    for ratio in RATIOS:
        try:
            same, shared = (_ranks(layers, spectra, ratio, policy) for policy in ("uniform", "threshold"))
        except ValueError:  # rank one everywhere is more than this ratio leaves
            break
        saved = {layer.name: _saved(layer, same[layer.name], itemsize[layer.name]) for layer in layers}
        worst = min(layers, key=lambda layer, ratio=ratio: layer.kept[f"{ratio:.0%}"])  # type: ignore[misc]
        step = Step(
            ratio=ratio,
            bytes=size - sum(saved.values()),
            kept=_kept(spectra, same),
            noise=_kept_by_noise(layers, spectra, same),
            shared=_kept(spectra, shared),
            worst=worst.kept[f"{ratio:.0%}"],
            worst_layer=worst.name,
        )
        steps.append(step)
        if chosen is None or step.enough:
            chosen = step, same, saved
    if chosen is None:
        return None
    step, ranks, saved = chosen
    return Advice(steps, step.ratio, step.enough, step.bytes, step.kept, ranks, saved)


def noise_kept(shape: tuple[int, int], rank: int) -> float:
    """Share of its energy that a random matrix of this shape keeps at a rank.

    Example:
        >>> round(noise_kept((64, 64), 32), 3)
        0.894
    """
    short, long = sorted(shape)
    return marchenko_pastur_energy(short / long, rank / short)


def _ranks(
    layers: Sequence[LayerSpectrum], spectra: Mapping[str, torch.Tensor], ratio: float, policy: Policy
) -> dict[str, int]:
    names = [layer.name for layer in layers]
    shapes = {layer.name: layer.shape for layer in layers}
    return Budget.of(ratio=ratio).ranks(shapes, policy=policy, form="pivoted", spectra=spectra, kinds=kinds_of(names))


def _saved(layer: LayerSpectrum, rank: int, itemsize: int) -> int:
    """Bytes less than dense: the pivoted form keeps an index of 4 bytes for each feature of the smaller side."""
    m, n = layer.shape
    if rank >= min(m, n):
        return 0
    return (m * n - num_parameters(m, n, rank, "pivoted")) * itemsize - 4 * min(m, n)


def _kept(spectra: Mapping[str, torch.Tensor], ranks: Mapping[str, int]) -> float:
    total = sum(float(s.square().sum()) for s in spectra.values())
    kept = sum(float(s[: ranks[name]].square().sum()) for name, s in spectra.items())
    return kept / total if total > 0 else 1.0


def _kept_by_noise(
    layers: Sequence[LayerSpectrum], spectra: Mapping[str, torch.Tensor], ranks: Mapping[str, int]
) -> float:
    sizes = {name: float(s.square().sum()) for name, s in spectra.items()}
    total = sum(sizes.values())
    kept = sum(sizes[layer.name] * noise_kept(layer.shape, ranks[layer.name]) for layer in layers)
    return kept / total if total > 0 else 1.0
