"""TLoRA: turn the input side of a weight by a tensor ring, and add what is left by another.

    y = x (W + c (W (T - I) + Δ))ᵀ + b,   W (out, in),   T (in, in), Δ (out, in)
    T[i, j] = tr(A¹[i_1, j_1] A²[i_2, j_2] ··· A^D[i_D, j_D]),   A^d (I_d, I_d, R_T, R_T),   in = I_1 ··· I_D
    Δ[i, j] = tr(B¹[i_1] ··· B^D[i_D] C¹[j_1] ··· C^D[j_D]),   B^d (J_d, r, r), C^d (I_d, r, r),   out = J_1 ··· J_D
    i = i_1 + I_1 i_2 + I_1 I_2 i_3 + ···   (little-endian, counted from 0)
    A^d from I ⊗ M^d, where tr(M¹ ··· M^D) = 1, so that T = I;   B¹ from 0, the others from N(0, 1 / (mode² r))

Z. Tao, Y. Takida, N. Murata, Q. Zhao, Y. Mitsufuji, Transformed Low-rank Adaptation via Tensor Decomposition and Its
Applications to Text-to-image Models, ICCV 2025, arXiv 2501.08727; code: taozerui/tlora_diffusion, not seen.

Different here: the paper's M^d = 1/R_T in all entries keeps the R_T² slices of a core equal in training, but for what
rounding does: a ring of rank 1. Here entries differ by up to ``noise``, and T is the identity all the same. T - I comes
from the changes of the cores, not by taking I off, so the layer starts as it was bit for bit, and a small T - I has a
small error. The layer is then applied to x and to (T - I) x apart: in half precision T x would lose whatever is below
1/256 of x, and now what is lost is 1/256 of the change. That takes a second multiplication by W, and no copy of it. A
size without balanced factors is filled up with zeros to one that has them.

For each token, (T - I) x takes in² multiplications with a dense T, and in · Σ_d I_d (R_T² + R_T³) at most by the ring:
0.08 of it for in = 4096, D = 3 and R_T = 2. T is formed only where that is the cheaper, in narrow layers under many
tokens. Between forward and backward pass x alone is kept. Δ is applied as two factors, (out, r²) and (r², in), which
the cores give at a cost that does not grow with the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..linalg import balanced_factors
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .site import Site

__all__ = ["TLoRA", "modes", "ring_change", "ring_slices", "squared_ring"]

Regularizer = Literal["identity", "orthogonality"]


def modes(size: int, order: int) -> tuple[int, ...]:
    """Factors of the size, or of the next one above whose factors are within 2 of each other.

    Args:
        size: Features of one side.
        order: D.

    Example:
        >>> modes(576, 3), modes(577, 3)
        ((12, 8, 6), (12, 7, 7))
    """
    found = (balanced_factors(padded, order) for padded in count(size))
    return next(factors for factors in found if factors[0] <= 2 * factors[-1])


def ring_slices(cores: Sequence[Tensor]) -> Tensor:
    """Products of the matrices of each core, X¹[i_1] ··· X^D[i_D], (n, R, R) for n = n_1 ··· n_D, little-endian.

    Args:
        cores: X^d (n_d, R, R).
    """
    product = cores[0]
    for core in cores[1:]:
        product = torch.einsum("apq,bqr->bapr", product, core).flatten(0, 1)
    return product


def ring_change(x: Tensor, cores: Sequence[Tensor], start: Tensor) -> Tensor:
    """(T - T_0) x, T of the cores A^d and T_0 of I ⊗ M^d, without forming either.

        T - T_0 = Σ_d (I ⊗ M¹) ··· (I ⊗ M^{d-1}) (A^d - I ⊗ M^d) A^{d+1} ··· A^D,   traced over the ring

    Args:
        x: (..., n), n at most I_1 ··· I_D; what is missing counts as zeros.
        cores: A^d (I_d, I_d, R, R).
        start: M (D, R, R).

    Returns:
        (..., n).
    """
    size, rank, order = math.prod(map(len, cores)), start.shape[-1], len(cores)
    padded = F.pad(x, (0, size - x.shape[-1]))
    prefix = torch.eye(rank, dtype=x.dtype, device=x.device)  # of the start: M¹ ··· M^{d-1}
    state, done = x.new_zeros(()), 1
    for d, (core, pattern) in enumerate(zip(cores, start, strict=True)):
        mode = len(core)
        source = torch.einsum("pq,ijqs->ijps", prefix, _moved(core, pattern))
        untouched = padded.reshape(-1, mode, done)
        if d == order - 1:  # the ring closes
            new = torch.einsum("njm,ij->nim", untouched, torch.einsum("ijpp->ij", source))
        else:
            new = torch.einsum("njm,ijps->nimps", untouched, source)
        if d > 0:
            state = state.reshape(-1, mode, done, rank, rank)
            new = new + torch.einsum(f"njmpq,ijq{'p->nim' if d == order - 1 else 's->nimps'}", state, core)
        state, prefix, done = new, prefix @ pattern, done * mode
    return state.reshape(padded.shape)[..., : x.shape[-1]]


def squared_ring(core: Tensor) -> Tensor:
    """Core of X Xᵀ, Σ_l A[i, l] ⊗ A[j, l], (n, n, R², R²).

    Args:
        core: A (n, n, R, R), one of X.
    """
    return torch.einsum("ilpq,jlrs->ijprqs", core, core).flatten(4, 5).flatten(2, 3)


def _moved(core: Tensor, pattern: Tensor) -> Tensor:
    """A - I ⊗ M."""
    eye = torch.eye(len(core), dtype=core.dtype, device=core.device)
    return core - eye[:, :, None, None] * pattern


@dataclass(frozen=True)
class TLoRA(AdapterMethod):
    """Transformed low-rank adaptation. The rank is that of the ring of Δ, r; Δ itself has rank r² at most.

    A fused weight, such as one of query, key and value, has one T for all its parts. Weight decay draws T to zero and
    not to the identity; the regularizer is what holds it there.

    Attributes:
        transform_rank: R_T; the paper's tables have 2, with r of 4 and 6.
        order: D, cores of T, and of each side of Δ.
        noise: Share by which the entries of M^d differ from 1 / R_T, below 1. 0 is the paper's start, where R_T might
            as well be 1.
        regularizer: What holds T back, from the cores alone: "identity", Σ_d Σ_pq ||A^d[:, :, p, q] - M^d[p, q] I||_F,
            which the paper finds better; or "orthogonality", the same for the cores of T Tᵀ.
        weight: Of the regularizer at each layer; 0 leaves it out.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = TLoRA(order=2).build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (96, 0.0)
    """

    transform_rank: int = 2
    order: int = 3
    noise: float = 0.1
    regularizer: Regularizer = "identity"
    weight: float = 0.0

    def __post_init__(self) -> None:
        self.check_choices(regularizer=Regularizer)
        if self.transform_rank < 1:
            raise ValueError(f"transform_rank must be at least 1, not {self.transform_rank}")
        if self.order < 2:
            raise ValueError(f"order must be at least 2, not {self.order}; with one core T would be dense")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be a share of at least 0 and below 1, not {self.noise}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be a number of at least 0, not {self.weight}; 0 leaves the regularizer out")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """The cores of T and Δ trained."""
        return _TLoRAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """R_T² Σ_d I_d² + r² Σ_d (I_d + J_d)."""
        inner, outer = modes(site.in_features, self.order), modes(site.out_features, self.order)
        return self.transform_rank**2 * sum(n * n for n in inner) + rank**2 * (sum(inner) + sum(outer))


class _TLoRAAdapter(Adapter):
    pattern: Tensor

    def __init__(self, method: TLoRA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.scale = method, scale
        ring = (method.transform_rank, method.transform_rank)
        self.modes = modes(site.in_features, method.order)
        self.buffer("pattern", method.order, *ring)  # M
        for d, mode in enumerate(self.modes):
            self.parameter(f"transform_{d}", mode, mode, *ring)  # A
        for d, mode in enumerate(modes(site.out_features, method.order)):
            self.parameter(f"output_{d}", mode, rank, rank)  # B
        for d, mode in enumerate(self.modes):
            self.parameter(f"input_{d}", mode, rank, rank)  # C

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        order, ring = self.method.order, self.method.transform_rank
        noise = self.method.noise if ring > 1 else 0.0  # one slice has no other to differ from
        draw = 2 * torch.rand(order, ring, ring, generator=generator, dtype=torch.float64) - 1
        pattern = (1 + noise * draw) / ring
        pattern[-1] /= torch.linalg.multi_dot([*pattern]).trace()
        self.fill(pattern=pattern)
        for name, parameter in self.named_parameters():
            kind, d = name.split("_")
            if kind == "transform":
                self.fill(**{name: torch.eye(len(parameter))[:, :, None, None] * self.pattern[int(d)].cpu()})
            elif name == "output_0":
                self.fill(**{name: torch.zeros(parameter.shape)})
            else:
                deviation = 1 / (len(parameter) * math.sqrt(self.rank))
                self.fill(**{name: deviation * torch.randn(parameter.shape, generator=generator)})
        self.ready = True

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        y = base(x)
        if not x.numel():
            return y
        turned: Tensor = checkpoint(self._turned, x, use_reentrant=False, preserve_rng_state=False)
        # A change far below x could vanish beside the bias, or below what half precision can hold.
        sizes = [part.detach().abs().amax().float() for part in (x, turned)]
        lift = (sizes[0] / sizes[1].clamp_min(torch.finfo(torch.float32).tiny)).clamp(1, 2**20).log2().floor().exp2()
        change = base((lift * turned).to(x.dtype)).to(torch.float32)
        bias = getattr(base, "bias", None)
        change = self.scale / lift * (change if bias is None else change - bias)
        return y + (change + self.update(x.to(torch.float32))).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """Of Δ, what does not go through the weight."""
        left, right = self._residual()
        return F.linear(F.linear(x, right), self.scale * left)

    def delta(self, weight: Tensor) -> Tensor:
        left, right = self._residual()
        change = ring_change(weight, [core.transpose(0, 1) for core in self._cores("transform")], self.pattern)
        return self.scale * (change + left @ right)

    def penalty(self) -> Tensor | None:
        if not self.method.weight:
            return None
        terms = []
        with torch.autocast(self.pattern.device.type, enabled=False):
            for core, pattern in zip(self._cores("transform"), self.pattern, strict=True):
                if self.method.regularizer == "orthogonality":
                    core, pattern = squared_ring(core), torch.kron(pattern, pattern)
                terms.append(torch.linalg.vector_norm(_moved(core, pattern), dim=(0, 1)).sum())
        return self.method.weight * torch.stack(terms).sum()

    def _cores(self, kind: str) -> list[Tensor]:
        return [getattr(self, f"{kind}_{d}") for d in range(self.method.order)]

    def _turned(self, x: Tensor) -> Tensor:
        """(T - I) x in float32."""
        with torch.autocast(x.device.type, enabled=False):
            x, width, cores = x.to(torch.float32), self.site.in_features, self._cores("transform")
            along, tokens = self._cost(), x.numel() // width
            if tokens * along <= tokens * width + width * along:
                return ring_change(x, cores, self.pattern)
            return x @ ring_change(torch.eye(width, dtype=x.dtype, device=x.device), cores, self.pattern)

    def _cost(self) -> int:
        """Multiplications along the ring for each entry of x."""
        ring = self.method.transform_rank
        first, *middle, last = self.modes
        return first * ring**2 + sum(middle) * (ring**2 + ring**3) + last * (1 + ring**2)

    def _residual(self) -> tuple[Tensor, Tensor]:
        """left (out, r²) and right (r², in) with Δ = left @ right."""
        with torch.autocast(self.pattern.device.type, enabled=False):
            left, right = ring_slices(self._cores("output")), ring_slices(self._cores("input"))
        left, right = left[: self.site.out_features], right[: self.site.in_features]
        return left.flatten(1), right.transpose(1, 2).flatten(1).mT
