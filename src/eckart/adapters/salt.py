"""SALT: scale and shift the largest singular values of a weight, and change the core of the others at low rank.

    W = U diag(s) Vᵀ,   U (out, n), V (in, n), n = min(out, in);   core C (n, n) = diag(s) at the start
    C_11 = diag(a ∘ s_1 + b) (k, k),   C_22 = diag(s_2) + c X Y (n - k, n - k),   y = x (U C Vᵀ)ᵀ
    penalty λ (||(a - 1) ∘ s_1 + b|| + ||c X Y||_F);   a, b (k,), X (n - k, r), Y (r, n - k) trained from 1, 0, X_0, 0

A. Elsayed, S. Hashmi, M. Elseiagy, H. Wang, M. Yaqub, I. Almakky, SALT: Parameter-Efficient Fine-Tuning via Singular
Value Adaptation with Low-Rank Transformation, 2025, arXiv 2503.16055; code: BioMedIA-MBZUAI/SALT. With k = n it is
S-SAM, with k = 0 LoRA among the singular vectors.

Different here: the code puts a ReLU over the whole of C, so that singular values stay positive. It also sets half of
the entries of X Y to zero, which then has no small rank, and holds back the gradient of Y, whose entries start at the
kink. That is ``relu="full"``; "diagonal" clamps the singular values alone, and with the default "none" the change has
rank k + r. The code builds W anew in every call; here U_2 X and Y V_2ᵀ are made first, which costs what 2 r tokens do
in the layer. The trained number is a - 1, so that weight decay pulls to the start and not to zero. c = alpha / r
multiplies X Y; the code has no alpha. U and V, n (out + in) frozen numbers, are saved with the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .site import Site, SiteKind

__all__ = ["SALT", "product_norm"]

ReLU = Literal["none", "diagonal", "full"]
Init = Literal["zero", "normal"]


def product_norm(x: Tensor, y: Tensor) -> Tensor:
    """||x y||_F of x (m, r) and y (r, n), without the product; its gradient is 0 where it is 0."""
    energy = ((x.mT @ x) * (y @ y.mT)).sum()
    return torch.where(energy > 0, energy, 1).sqrt() * (energy > 0)


@dataclass(frozen=True)
class SALT(AdapterMethod):
    """Singular value adaptation with low-rank transformation.

    Attributes:
        ratio: k / n, the share of the singular values that are scaled and shifted: rounded down, but at least one
            unless it is 0. The code has 0.1 for SAM 2.
        relu: What is kept positive: "none"; "diagonal", all singular values; "full", every entry of C as in the code,
            at the price of three products as large as the layer's.
        regularization: λ, 0 in the released configuration and 0.01 as the default of its functions.
        init: Start of the low-rank core: "zero" (X Kaiming uniform, Y = 0, as in the code for SAM 2), or "normal" (both
            with standard deviation 0.01, as in the code for SAM), which changes the layer a little at the start.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = SALT(ratio=0.5).build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (18, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d"})

    ratio: float = 0.1
    relu: ReLU = "none"
    regularization: float = 0.0
    init: Init = "zero"

    def __post_init__(self) -> None:
        self.check_choices(relu=ReLU, init=Init)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio is a share of the singular values, from 0 to 1, not {self.ratio}")
        if not 0 <= self.regularization < math.inf:
            raise ValueError(f"regularization must be a number of at least 0, not {self.regularization}")

    def leading(self, site: Site) -> int:
        """k."""
        return max(1, int(self.ratio * site.largest_rank)) if self.ratio else 0

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """Scales, shifts, and the low-rank core trained."""
        return _SALTAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """2 k + 2 r (n - k)."""
        k = self.leading(site)
        return 2 * k + 2 * rank * (site.largest_rank - k)

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether so low a rank is low among n - k singular values."""
        problem, rest = super().check(site, rank), site.largest_rank - self.leading(site)
        if problem is None and 0 < rest < rank:
            return f"has {rest} singular values below the scaled ones; lower the rank {rank} to that, or the ratio"
        return problem


class _SALTAdapter(Adapter):
    u: Tensor
    s: Tensor
    vh: Tensor
    gain: Tensor
    shift: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, method: SALT, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.scale = method, scale
        n, self.k = site.largest_rank, method.leading(site)
        self.buffer("u", site.out_features, n)
        self.buffer("s", n)
        self.buffer("vh", n, site.in_features)
        self.parameter("gain", self.k)  # a - 1
        self.parameter("shift", self.k)
        self.parameter("left", n - self.k, rank)  # X
        self.parameter("right", rank, n - self.k)  # Y

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        found = svd(weight)
        self.fill(u=found.u, s=found.s, vh=found.vh)
        left, right = torch.zeros(self.left.shape), torch.zeros(self.right.shape)
        if self.method.init == "normal":
            left, right = (0.01 * torch.randn(part.shape, generator=generator) for part in (left, right))
        elif left.numel():
            nn.init.kaiming_uniform_(left, a=math.sqrt(20), generator=generator)
        self.fill(left=left, right=right)
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        left, core, right = self._factors()
        z = self.site.reduce(x, right)
        return self.site.expand(z if core is None else self.site.expand(z, core), left)

    def delta(self, weight: Tensor) -> Tensor:
        left, core, right = self._factors()
        return left @ right if core is None else left @ core @ right

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        left, core, right = self._factors()
        return (left, right) if core is None else None

    def penalty(self) -> Tensor | None:
        if self.method.regularization == 0:
            return None
        top = torch.linalg.vector_norm(self._top())
        return self.method.regularization * (top + product_norm(self.scale * self.left, self.right))

    def _top(self) -> Tensor:
        """(a - 1) s + b (k,)."""
        return self.gain * self.s[: self.k] + self.shift

    def _factors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Δ = left @ right, or left @ core @ right where the core has no small rank."""
        k, top, left = self.k, self._top(), self.scale * self.left
        if self.method.relu == "full":
            core = torch.block_diag(torch.diag(top), left @ self.right) + torch.diag(self.s)
            return self.u, core.relu() - torch.diag(self.s), self.vh
        lefts, rights = [self.u[:, k:] @ left], [self.right @ self.vh[k:]]
        if self.method.relu == "diagonal":
            top = top.maximum(-self.s[:k])
            value = self.s[k:] + (left * self.right.mT).sum(dim=1)
            negative = (value < 0).nonzero()[:, 0]  # few: what they lack is added as terms of their own
            lefts.append(self.u[:, k:][:, negative] * -value[negative])
            rights.append(self.vh[k:][negative])
        return torch.cat([self.u[:, :k] * top, *lefts], dim=1), None, torch.cat([self.vh[:k], *rights])
