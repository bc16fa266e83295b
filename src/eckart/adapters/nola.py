"""NOLA: low-rank factors that are mixtures of random matrices, of which only the weights are trained and saved.

    Δ = c B A,   A = A_0 + Σ_i α_i M_i (r, in),   B = Σ_j β_j N_j (out, r)
    M_i uniform in ±1 / √k, N_j in ±1 / √l, A_0 Kaiming uniform, all from one seed;   α (k,) and β (l,) from 0

S. A. Koohpayegani, K. L. Navaneet, P. Nooralinejad, S. Kolouri, H. Pirsiavash, NOLA: Compressing LoRA using Linear
Combination of Random Basis, ICLR 2024, arXiv 2310.02556; code: UCDvision/NOLA. What is trained and saved, k + l numbers
a layer, depends neither on the rank nor on the width.

The seed stands in the configuration. The matrices are drawn by the processor in float32 and moved, so they are the same
on every device, and from generators of their own, so dropout is not disturbed (the code reseeds the global one in each
pass). Layers of equal shape share them. They are kept between passes, or with ``keep=False`` drawn again a few at a
time where memory is short, which costs k r (in + out) random numbers a layer in each pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .factored import LowRankAdapter, kaiming_uniform
from .site import Site, SiteKind

__all__ = ["NOLA", "RandomBasis"]

_AT_ONCE = 2**20  # numbers drawn at a time


class RandomBasis:
    """Σ_i w_i M_i for count matrices M_i (rows, columns), uniform in ±1 / √count, that a seed stands for.

    Args:
        seed: Of the matrices.
        count: How many.
        rows: Of each.
        columns: Of each.
        keep: Whether to hold them in memory once drawn.

    Example:
        >>> basis = RandomBasis(0, 4, 2, 3)
        >>> mixture = basis.mix(torch.tensor([0.0, 1.0, 0.0, 0.0]))
        >>> mixture.shape, bool((mixture.abs() <= 0.5).all())
        (torch.Size([2, 3]), True)
    """

    def __init__(self, seed: int, count: int, rows: int, columns: int, keep: bool = True) -> None:
        self.seed, self.count, self.rows, self.columns, self.keep = seed, count, rows, columns, keep
        self._kept: dict[torch.device, list[Tensor]] = {}

    def mix(self, weights: Tensor) -> Tensor:
        """Σ_i w_i M_i (rows, columns), differentiable in w (count,)."""
        mixture: Tensor = _Mix.apply(weights, self)
        return mixture

    def parts(self, device: torch.device) -> Iterator[Tensor]:
        """The matrices in order, some at a time, each a row (rows * columns)."""
        if device in self._kept:
            yield from self._kept[device]
            return
        generator = torch.Generator().manual_seed(self.seed)
        size = self.rows * self.columns
        step = max(1, _AT_ONCE // size)
        parts = []
        for start in range(0, self.count, step):
            drawn = torch.rand(min(step, self.count - start), size, generator=generator)
            part = drawn.mul_(2).sub_(1).mul_(self.count**-0.5).to(device)
            if self.keep:
                parts.append(part)
            yield part
        if self.keep:
            self._kept[device] = parts


class _Mix(torch.autograd.Function):
    """The mixture without keeping, and its gradient <G, M_i> by drawing again."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, basis: RandomBasis) -> Tensor:
        ctx.basis, ctx.dtype = basis, weights.dtype
        total = weights.new_zeros(basis.rows * basis.columns)
        start = 0
        for part in basis.parts(weights.device):
            total += weights[start : start + len(part)] @ part.to(weights.dtype)
            start += len(part)
        return total.view(basis.rows, basis.columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        flat = gradients[0].reshape(-1).to(ctx.dtype)
        return torch.cat([part.to(ctx.dtype) @ flat for part in ctx.basis.parts(flat.device)]), None


@dataclass(frozen=True)
class NOLA(AdapterMethod):
    """Networks as a linear combination of a low-rank random basis.

    Attributes:
        terms: k = l, matrices mixed for each factor. The paper has 512 to 1024.
        basis_seed: Of the matrices, the same for all layers.
        keep: Whether the matrices stay in memory, once for all layers of a shape.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = NOLA(terms=5).build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (10, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    terms: int = 512
    basis_seed: int = 0
    keep: bool = True

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise ValueError(f"terms must be at least 1, not {self.terms}; the paper mixes 512")
        if self.basis_seed < 0:
            raise ValueError(f"basis_seed must be at least 0, not {self.basis_seed}")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """α and β trained."""
        return _NOLAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """k + l, whatever the rank and the shape."""
        return 2 * self.terms

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        """Let layers of a shape draw and hold their matrices once."""
        drawn: dict[tuple[int, int, int], tuple[RandomBasis, RandomBasis]] = {}
        for adapter in adapters.values():
            assert isinstance(adapter, _NOLAAdapter)
            shape = (adapter.rank, adapter.site.out_features, adapter.site.in_features)
            adapter.left_basis, adapter.right_basis = drawn.setdefault(shape, (adapter.left_basis, adapter.right_basis))


class _NOLAAdapter(LowRankAdapter):
    left_weights: Tensor
    right_weights: Tensor

    def __init__(self, method: NOLA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.scale = scale
        self.seed = 4 * method.basis_seed  # four streams of numbers a seed: M, N, and A_0
        self.parameter("left_weights", method.terms)  # β
        self.parameter("right_weights", method.terms)  # α
        self.left_basis = RandomBasis(self.seed, method.terms, site.out_features, rank, method.keep)
        self.right_basis = RandomBasis(self.seed + 1, method.terms, rank, site.in_features, method.keep)

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        self.fill(left_weights=torch.zeros_like(self.left_weights), right_weights=torch.zeros_like(self.right_weights))
        self.ready = True

    def low_rank(self) -> tuple[Tensor, Tensor]:
        device = self.right_weights.device
        start = kaiming_uniform((self.rank, self.site.in_features), torch.Generator().manual_seed(self.seed + 2))
        right = start.to(device) + self.right_basis.mix(self.right_weights)
        return self.scale * self.left_basis.mix(self.left_weights), right
