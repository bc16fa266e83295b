"""SVD initialisation: a network of one hidden layer starts as the best linear map of its rank from inputs to targets.

    ŷ = W2 φ(W1 x + b1) + b2,   W1 (h, p), W2 (q, h)
    B = argmin ||Yc - Xc Bᵀ||_F  (q, p),   B_h = G F its best map of rank h,   F (h, p), G (q, h)
    W1 = t F,   b1 = -W1 x̄,   W2 = G / (t φ'(0)),   b2 = ȳ - W2 φ(0) 1,   rows of F scaled to rms(Xc Fᵀ) = 1

Hidden values stay within about t of zero, where φ is nearly linear, so as t → 0 the start is the linear model: the
error falls like t² for tanh and sigmoid, and like t where φ''(0) ≠ 0 (GELU, SiLU). For an autoencoder B = I, and the
start is PCA. A small t makes W2 large (1 / t) and steps along W1 steep: a learning rate is to be tuned for this start.
It helps as far as the targets have a linear part; the result says how much (``explained``).

B. Bermeitinger, T. Hrycej and S. Handschuh, "Singular Value Decomposition and Neural Networks", ICANN 2019,
arXiv:1906.11755; no code.

What differs. The paper's truncated SVD of B (``optimal="coefficients"``) is best for B; the default is best for the
data, G = leading left singular vectors of the fitted values (reduced-rank regression: A. Izenman, "Reduced-rank
regression for the multivariate linear model", 1975). An activation with a kink, such as ReLU, has no linear zone; two
units v and -v make φ(z) - φ(-z) = 2 gain z, at half the rank, as GELU, SiLU and softplus do exactly (``pairs``). Units
beyond the rank get outgoing weights of zero: the function is the same, and they learn. Ours is the extension to more
hidden layers: each hands the h decorrelated units on to the next, so that the whole starts as the same linear map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..linalg import eigh, solve_spd, svd, weighted_svd
from ..models.chain import Activation
from .contract import Affine, Initialization, InitializationMethod
from .initialize import initialize
from .moments import JointMoments

__all__ = ["SVDInit", "best_linear_map", "linear_factors", "svd_initialize"]

Optimal = Literal["data", "coefficients"]
Padding = Literal["random", "pca"]

_NOTHING = 1e-7  # of ||Yc||_F: what a direction adds to the fitted values below this is rounding
_LITTLE = 0.05  # share of the variance explained from which on the linear part is worth a warning


def best_linear_map(moments: JointMoments, ridge: float = 0.0) -> Tensor:
    """B (q, p) = argmin ||Yc - Xc Bᵀ||_F² + ridge Σ_j var_j ||B_:j||² N, of smallest norm where it is not unique.

    Args:
        moments: Of inputs (p) and targets (q).
        ridge: In units of each input's own variance, so that the units of the inputs do not matter.

    Example:
        >>> from eckart.pretraining.moments import joint_moments
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])  # the second input is constant
        >>> best_linear_map(joint_moments([(x, 3 * x[:, :1] + 5)])).round(decimals=6).tolist()
        [[3.0, 0.0]]
    """
    inverse = _inverse(moments.xx.diagonal().sqrt())
    scaled = inverse[:, None] * moments.xx * inverse
    return (inverse[:, None] * solve_spd(scaled, inverse[:, None] * moments.xy, ridge=ridge)).mT


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 for 0."""
    return torch.where(values > 0, 1 / torch.where(values > 0, values, 1), 0)


def linear_factors(
    moments: JointMoments, rank: int, *, ridge: float = 0.0, optimal: Optimal = "data"
) -> tuple[Tensor, Tensor]:
    """G (q, k) and F (k, p), k <= rank, of the best map of that rank, with units of variance 1, largest effect first.

    Args:
        moments: Of inputs (p) and targets (q).
        rank: Largest k; directions that add nothing to the fitted values are left out.
        ridge: See `best_linear_map`.
        optimal: "data" for the least error on the targets, "coefficients" for the truncated SVD of B.
    """
    b = best_linear_map(moments, ridge)
    rank = min(rank, *b.shape)
    if rank == 0 or not bool(b.any()):
        return b[:, :0], b[:0]
    if optimal == "data":
        # With the ridge in the weight too, this is the optimum of the ridge problem under the rank constraint. Inputs
        # are brought to unit variance, since directions of very little weight are left aside.
        deviation = moments.xx.diagonal().sqrt()
        inverse = _inverse(deviation)
        weight = inverse[:, None] * moments.xx * inverse
        weight.diagonal().mul_(1 + ridge)
        up = weighted_svd(b * deviation, weight, rank, double=True).basis
        down = up.mT @ b
    else:
        up, s, down, _ = svd(b, rank, driver="exact")
        down = s[:, None] * down
    effect = ((down @ moments.xx) * down).sum(dim=1).clamp_min(0).sqrt()  # columns of `up` have unit norm
    kept = effect > _NOTHING * moments.yy**0.5
    deviation = effect[kept] / moments.count**0.5
    return up[:, kept] * deviation, down[kept] / deviation[:, None]


@dataclass(frozen=True)
class SVDInit(InitializationMethod):
    """Start at the best linear map.

    Args:
        optimal: "data" or, as in the paper, "coefficients".
        scale: t, root mean square of the hidden values before the activation; 0.1 to 1. Where all activations are
            homogeneous (ReLU, none), layers are balanced instead, since the function does not depend on it.
        ridge: Of the least squares, in units of each input's variance.
        pairs: Use ±pairs for smooth activations too.
        padding: Incoming weights of the units beyond the rank: "random", or "pca" for the principal directions of
            the inputs that the other units do not see, and random ones after these.

    Raises:
        ValueError: A number or a choice makes no sense.

    Example:
        >>> SVDInit(scale=0.1).scale
        0.1
    """

    optimal: Optimal = "data"
    scale: float = 0.3
    ridge: float = 1e-6
    pairs: bool = False
    padding: Padding = "random"

    def __post_init__(self) -> None:
        self.check_choices(optimal=Optimal, padding=Padding)
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be positive, not {self.scale}")
        if not 0 <= self.ridge < float("inf"):
            raise ValueError(f"ridge must be at least 0, not {self.ridge}")

    def initialize(
        self,
        widths: Sequence[int],
        activations: Sequence[Activation],
        moments: JointMoments,
        generator: torch.Generator,
    ) -> Initialization:
        """Weights from the factors of the linear map."""
        paired = [one.kink or self.pairs for one in activations]
        room = min(width // 2 if pair else width for width, pair in zip(widths[1:-1], paired, strict=True))
        g, f = linear_factors(moments, room, ridge=self.ridge, optimal=self.optimal)
        rank = len(f)
        scales = self._scales(activations, paired, f, g)
        layers: list[Affine] = []
        # How to read the units (rank,) off the layer below: u = read @ a - offset; to begin with, off the inputs.
        read, offset = f, f @ moments.x_mean
        below, spread_below = Activation(), 1.0
        for width, activation, pair, t in zip(widths[1:-1], activations, paired, scales, strict=True):
            rows, shift = t[:, None] * read, t * offset
            if pair:
                rows, shift = torch.cat([rows, -rows]), torch.cat([shift, -shift])
            spread = float(t.mean()) if rank else 1.0  # nothing linear: random units are worth more if they bend
            if layers:
                extra = _random(width - len(rows), rows.shape[1], generator).to(rows)
                extra = extra * (spread / (spread_below * abs(below.gain)))
                middle = extra.sum(dim=1) * below.value
            else:
                extra = spread * _unseen(width - len(rows), moments, f, self.padding, generator)
                middle = extra @ moments.x_mean
            layers.append(Affine(torch.cat([rows, extra]), -torch.cat([shift, middle])))
            gain = 1 / (t * activation.gain * (2 if pair else 1))
            read = torch.cat([torch.diag(gain), -torch.diag(gain)], dim=1) if pair else torch.diag(gain)
            offset = torch.zeros_like(gain) if pair else gain * activation.value
            read = nn.functional.pad(read, (0, width - read.shape[1]))
            below, spread_below = activation, spread
        layers.append(Affine(g @ read, moments.y_mean - g @ offset))
        return _summary(moments, layers, g @ f, rank)

    def _scales(self, activations: Sequence[Activation], paired: Sequence[bool], f: Tensor, g: Tensor) -> list[Tensor]:
        """t (rank,) of each hidden layer."""
        if not all(activation.homogeneous for activation in activations):
            return [torch.full_like(f[:, 0], self.scale) for _ in activations]
        # Unit by unit, the norms of incoming and outgoing weights are made equal from layer to layer.
        gains = [activation.gain * (2 if pair else 1) for activation, pair in zip(activations, paired, strict=True)]
        total = f.norm(dim=1) * g.norm(dim=0)
        for gain in gains:
            total = total / abs(gain)
        norm = total ** (1 / (len(gains) + 1))
        scales = [norm / f.norm(dim=1)]
        for gain in gains[:-1]:
            scales.append(norm * scales[-1] * abs(gain))
        return scales


def _random(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Rows (count, width) of unit norm, float64."""
    return nn.functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def _unseen(count: int, moments: JointMoments, f: Tensor, padding: Padding, generator: torch.Generator) -> Tensor:
    """Rows (count, p) of which the values on the data have variance 1."""
    rows = f[:0]
    if padding == "pca":
        # What the units leave of the inputs; the units need not be uncorrelated.
        seen = f @ moments.xx
        fitted = solve_spd(seen @ f.mT, seen) if len(f) else seen
        values, vectors = eigh(moments.xx - seen.mT @ fitted, max(1, count))
        rows = vectors.mT[:count][values[:count] > _NOTHING * moments.xx.trace()]
        rows = rows - rows @ fitted.mT @ f
    drawn = _random(count - len(rows), f.shape[1], generator).to(f)
    rows = torch.cat([rows, drawn * _inverse(moments.xx.diagonal().sqrt())])
    variance = ((rows @ moments.xx) * rows).sum(dim=1, keepdim=True).clamp_min(0) / moments.count
    return rows * _inverse(variance.sqrt())


def _summary(moments: JointMoments, layers: list[Affine], b: Tensor, rank: int) -> Initialization:
    lost = moments.yy - 2 * float((b.mT * moments.xy).sum()) + float(((b @ moments.xx) * b).sum())
    error = max(0.0, lost) / moments.count
    explained = 1 - error * moments.count / moments.yy if moments.yy > 0 else 0.0
    warnings = []
    if rank == 0:
        warnings.append("the targets have no linear part (or no unit has room for it): hidden units are random")
    elif explained < _LITTLE:
        warnings.append(f"the linear map explains {explained:.1%} of the targets: a random start may do as well")
    return Initialization(layers, rank, error, explained, warnings)


def svd_initialize(
    network: nn.Module,
    inputs: Tensor | Iterable[tuple[Tensor, Tensor]],
    targets: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Initialization:
    """`initialize` with this method: the network starts as the best linear map of its rank.

    Args:
        network: An `nn.Sequential` of linear layers and elementwise activations, changed in place.
        inputs: (N, p), or pairs of inputs and targets.
        targets: (N, q), if not in the pairs.
        generator: Of the units beyond the rank; None for a private one with a fixed seed.
        options: Of `SVDInit`.

    Raises:
        ValueError: See `initialize`.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> y = x @ torch.tensor([[1.0], [2.0], [0.0]]) + 3
        >>> network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> found = svd_initialize(network, x, y)
        >>> found.rank, torch.allclose(network(x), y, atol=1e-4)
        (1, True)
    """
    return initialize(network, SVDInit(**options), inputs, targets, generator=generator)
