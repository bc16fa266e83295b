"""Jacobian nuclear norm: make a network locally of low rank, without singular values and without its Jacobian.

    min over f = g ∘ h of  E[ℓ(f(x)) + η ||J_f(x)||_*]
      = min over g, h of   E[ℓ(g(h(x))) + η/2 (||J_g(z)||_F² + ||J_h(x)||_F²)],   z = h(x)   (penalty, at every g and h,
                           at least η ||J_f||_*, since ||A B||_* <= (||A||_F² + ||B||_F²) / 2)
    ||J_h(x)||_F² = E ||h(x + ε) - h(x)||² / σ² + O(σ²),   ε ~ N(0, σ² I),   and the same of g at z

Sums over all axes but the first, means over the batch. The optimum is the same where g and h are expressive enough to
balance each other at every x; a given network gets the upper bound. Cut at a linear point, with no normalisation there:
that hides the scale of J_h. A skip connection across the cut belongs to z; where it does not, what goes through it is
not penalised. More cuts would be another regulariser (a Schatten quasi-norm).

C. Scarvelis and J. Solomon, "Nuclear Norm Regularization for Deep Learning", NeurIPS 2024, arXiv:2405.14544; no code.

What differs. σ is in units of the root mean square of what the noise is added to, so that it suits x and z alike (an
absolute one drowns in rounding, or smooths, where a hidden layer has another scale). ``estimator="jvp"`` takes exact
directional derivatives, E ||J v||² with v ~ N(0, I): no bias by σ and no rounding, for half precision too. Dropout uses
the same masks in the evaluations that are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..linalg import svd_with_gradient
from ..models.cut import Cut, RandomState
from .contract import Penalty, RegularizerMethod

__all__ = [
    "JacobianNuclearNorm",
    "directional_squares",
    "jacobian_nuclear_norm",
    "jacobians",
    "noise_squares",
]

Estimator = Literal["noise", "jvp"]
Function = Callable[[Tensor], Tensor]

_ROUNDING = 1e3  # σ is at least this many units of rounding, so that a difference keeps three digits


def noise_squares(
    f: Function, x: Tensor, y: Tensor, sigma: float, generator: torch.Generator, mask: Tensor | None = None
) -> Tensor:
    """||f(x + ε) - y||² / σ² of each row, (batch,): one draw of the squared Frobenius norm of the Jacobian.

    Args:
        f: Rows apart.
        x: (batch, ...).
        y: f(x).
        sigma: σ over the root mean square of x.
        generator: Of ε.
        mask: (batch, tokens), 0 where neither noise nor, if y is (batch, tokens, d), difference counts.

    Raises:
        ValueError: σ is lost in the rounding of the dtype, or the mask does not fit x.

    Example:
        >>> x = torch.ones(2, 3, dtype=torch.float64)
        >>> squares = noise_squares(lambda x: 2 * x, x, 2 * x, 0.1, torch.Generator().manual_seed(0))
        >>> squares.shape, bool((squares / 12 > 0).all())  # 12 on average
        (torch.Size([2]), True)
    """
    for dtype in (x.dtype, y.dtype):
        if sigma < _ROUNDING * torch.finfo(dtype).eps:
            raise ValueError(f'noise of {sigma:g} is lost in the rounding of {dtype}; use estimator="jvp" or float32')
    spread = float(x.detach().float().square().mean().sqrt()) or 1.0
    noise = _draw(x, generator, mask)
    difference = f(x + sigma * spread * noise) - y
    return _row_squares(difference, mask) / (sigma * spread) ** 2


def directional_squares(f: Function, x: Tensor, generator: torch.Generator, mask: Tensor | None = None) -> Tensor:
    """||J_f(x) v||² of each row, (batch,), v ~ N(0, I): one draw, by forward differentiation.

    Args:
        f: Rows apart.
        x: (batch, ...).
        generator: Of v.
        mask: As in `noise_squares`.

    Raises:
        ValueError: The mask does not fit x.

    Example:
        >>> x = torch.ones(1, 3, dtype=torch.float64)
        >>> v = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))  # drawn in float32
        >>> found = directional_squares(lambda x: 2 * x, x, torch.Generator().manual_seed(0))
        >>> bool(torch.isclose(found, 4 * v.double().square().sum()))
        True
    """
    # The fused kernels of attention have no forward derivative.
    with sdpa_kernel(SDPBackend.MATH):
        tangent: Tensor = jvp(f, (x.contiguous(),), (_draw(x, generator, mask),))[1]
    return _row_squares(tangent, mask)


def _draw(x: Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
    # Drawn in float32 where the generator is, so that a seed means the same on every device and in every dtype.
    noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"a mask of {tuple(mask.shape)} does not fit values of {tuple(x.shape)}, (batch, tokens, d)")
    return noise if mask is None else noise * _over(mask, x)


def _row_squares(values: Tensor, mask: Tensor | None) -> Tensor:
    values = values if values.dtype == torch.float64 else values.float()
    if mask is not None and values.ndim > 2 and values.shape[:2] == mask.shape:  # else one answer a text
        values = values * _over(mask, values)
    return values.flatten(1).square().sum(dim=1)


def _over(mask: Tensor, like: Tensor) -> Tensor:
    return mask.to(like).reshape(*mask.shape, *[1] * (like.ndim - 2))


def jacobians(f: Function, x: Tensor) -> Tensor:
    """J_f at each row, (batch, outputs, inputs), by reverse differentiation; differentiable, and slow.

    Args:
        f: Rows apart, without dropout.
        x: (batch, ...).

    Example:
        >>> jacobians(torch.sin, torch.zeros(1, 2)).tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    found: Tensor = vmap(jacrev(lambda row: f(row[None])[0].flatten()))(x)
    return found.flatten(2)


def jacobian_nuclear_norm(f: Function, x: Tensor) -> Tensor:
    """||J_f(x)||_* of each row, (batch,), through a differentiable SVD: what the penalty stands for.

    Args:
        f: Rows apart, without dropout.
        x: (batch, ...).

    Example:
        >>> jacobian_nuclear_norm(lambda x: 3 * x, torch.zeros(1, 2)).tolist()
        [6.0]
    """
    return svd_with_gradient(jacobians(f, x)).s.sum(dim=-1)


@dataclass(frozen=True)
class JacobianNuclearNorm(RegularizerMethod):
    """The penalty with its options.

    Args:
        eta: η; 0.01 to 0.25 in the paper.
        sigma: σ of the noise, over the root mean square of what it is added to; 0.01 to 0.1.
        estimator: "noise" as in the paper: one more evaluation of each half. "jvp": exact derivatives.
        probes: Draws a batch.

    Raises:
        ValueError: A number or a choice makes no sense.

    Example:
        >>> from torch import nn
        >>> from eckart.models.cut import Cut
        >>> h, g, x = nn.Linear(4, 3), nn.Linear(3, 4), torch.ones(8, 4)
        >>> found = JacobianNuclearNorm(eta=0.1).penalty(Cut(h, g), x, torch.Generator().manual_seed(0))
        >>> loss = (found.output - x).square().sum(1).mean() + found.value
    """

    eta: float = 0.1
    sigma: float = 0.01
    estimator: Estimator = "noise"
    probes: int = 1

    def __post_init__(self) -> None:
        self.check_choices(estimator=Estimator)
        for name in ("eta", "sigma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, not {self.probes}")

    def penalty(self, cut: Cut, x: Tensor, generator: torch.Generator, mask: Tensor | None = None) -> Penalty:
        """η/2 (||J_g||_F² + ||J_h||_F²), estimated; ``parts`` has the two squares."""
        if not x.is_floating_point():
            raise ValueError(f"a derivative by {x.dtype} inputs makes no sense; cut after the embeddings (source=)")
        done = cut.run(x)
        head = self._squares(cut.head, x, done.z, done.before_head, generator, mask)
        tail = self._squares(cut.tail, done.z, done.y, done.before_tail, generator, mask)
        parts = {"head": head.detach(), "tail": tail.detach()}
        return Penalty(self.eta / 2 * (head + tail), done.y, parts)

    def _squares(
        self, f: Function, x: Tensor, y: Tensor, state: RandomState, generator: torch.Generator, mask: Tensor | None
    ) -> Tensor:
        rows: list[Tensor] = []
        for _ in range(self.probes):
            with state.replayed():
                if self.estimator == "jvp":
                    rows.append(directional_squares(f, x, generator, mask))
                else:
                    rows.append(noise_squares(f, x, y, self.sigma, generator, mask))
        return torch.stack(rows).mean()
