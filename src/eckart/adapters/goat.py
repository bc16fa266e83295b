"""GOAT: experts that start from different segments of the spectrum, of which a router picks a few for each token.

    y = x (W - (s / E) Σ_i B_i⁰ A_i⁰)ᵀ + s Σ_i g_i(x) x A_iᵀ B_iᵀ,   A_i (d, in), B_i (out, d), d = r / E
    A_i⁰ = √S_i' V_iᵀ, B_i⁰ = U_i √S_i', S_i' = S_i / (s ρ),   U_i, S_i, V_i: the first d triplets of the i-th of E
        segments of the spectrum of W
    g(x) = softmax(x Gᵀ) kept at its k largest, divided by their sum,   G (E, in)
    s = sqrt(3 η in / d)

The layer starts at W as far as the gates of a token are all 1 / E; with k < E it is off by a part of 1 / ρ.

C. Fan, Z. Lu, S. Liu, C. Gu, X. Qu, W. Wei, Y. Cheng, Make LoRA Great Again: Boosting LoRA with Adaptive Singular
Values and Mixture-of-Experts Optimization Alignment, ICML 2025, arXiv 2502.16894; code: Facico/GOAT-PEFT.

In the released scripts s is α / d and η is not read; that is ``scaling="alpha"``. Different here: the experts are one
product under a mask in place of a loop, the router computes in float32 under autocast too, and the balance loss counts
every training forward pass since it was last read, without padded tokens. A layer that is run again for its gradient
(checkpointing) counts once; reentrant checkpointing, whose first run has no gradient, leaves the balance loss out.
Dropout is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .coordinator import Coordinator
from .site import Site

__all__ = ["GOAT", "route", "slices"]

Slices = Literal["first", "last", "top", "bottom"]
Scaling = Literal["theory", "alpha"]


def slices(count: int, experts: int, rank: int, choice: Slices) -> Tensor:
    """Which singular triplets the experts start from, (experts, rank) int64.

    Args:
        count: Triplets there are, min(out, in).
        experts: E.
        rank: d, of one expert.
        choice: "first" or "last" of E segments, or all from the "top" or the "bottom" of the spectrum.

    Example:
        >>> slices(9, 3, 2, "first").tolist()
        [[0, 1], [3, 4], [6, 7]]
    """
    within = torch.arange(experts * rank).view(experts, rank)
    if choice in ("top", "bottom"):
        return within if choice == "top" else within + (count - experts * rank)
    segment = count // experts
    offset = torch.arange(experts)[:, None] * (segment - rank)
    return within + (offset if choice == "first" else offset + (segment - rank))


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gates of the ``top_k`` likeliest experts, which sum to 1; all probabilities; and which were chosen (bool).

    Args:
        logits: (..., E) float32.
        top_k: k.

    Example:
        >>> route(torch.tensor([3.0, 1.0, 3.0]), 2)[0].tolist()
        [0.5, 0.0, 0.5]
    """
    probabilities = logits.softmax(dim=-1)
    places = logits.topk(top_k, dim=-1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, places, True)
    # The softmax of the chosen alone is their share of the whole one, without dividing by what may underflow.
    return logits.masked_fill(~chosen, -math.inf).softmax(dim=-1), probabilities, chosen


@dataclass(frozen=True)
class GOAT(AdapterMethod):
    """Great LoRA mixture of experts. The rank is that of all experts together.

    Attributes:
        experts: E, a divisor of the rank; None for the paper's 8, or one for each rank where it is less.
        top_k: k, experts that work on a token.
        slices: Where the experts start: the "first" triplets of each segment (the paper) or the "last" (the code's
            goat_mini); or all at the "top" or the "bottom" of the spectrum, its PiSSA and MiLoRA mixtures.
        scaling: s: "theory", sqrt(3 η in / d) times the configuration's alpha / r; or "alpha", α / d, as the released
            scripts run.
        eta: η.
        rho: ρ, how small the experts start: theirs is 1 / ρ of the singular values.
        balance: Weight of the balance loss E Σ_i f_i p_i of each layer: f_i the share of tokens that choose expert i,
            p_i its mean probability. 0 leaves it out.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = GOAT(experts=2).build(site, rank=4, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable()
        68
    """

    mergeable: ClassVar[bool] = False

    experts: int | None = None
    top_k: int = 2
    slices: Slices = "first"
    scaling: Scaling = "theory"
    eta: float = 1.0
    rho: float = 10.0
    balance: float = 1e-3

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}; the paper uses 2")
        if self.experts is not None and self.experts < self.top_k:
            raise ValueError(f"experts must be at least top_k = {self.top_k}, not {self.experts}")
        self.check_choices(slices=Slices, scaling=Scaling)
        for name in ("eta", "rho"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {getattr(self, name)}")
        if not 0 <= self.balance < math.inf:
            raise ValueError(f"balance must be a number of at least 0, not {self.balance}; 0 leaves the loss out")

    def num_experts(self, rank: int) -> int:
        """E for the configuration's rank."""
        return min(8, rank) if self.experts is None else self.experts

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """All experts and the router trained."""
        return _GOATAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """E d (in + out) + E in, with E d = r."""
        return rank * (site.in_features + site.out_features) + self.num_experts(rank) * site.in_features

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether the rank can be shared among the experts."""
        problem = super().check(site, rank)
        experts = self.num_experts(rank)
        if problem is None and rank % experts:
            return f"has rank {rank} for {experts} experts; choose a multiple as its rank, or experts that divide it"
        if problem is None and experts < self.top_k:
            return f"has rank {rank}, so {experts} experts, fewer than top_k = {self.top_k}; choose a larger rank"
        return problem

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator | None:
        """The balance loss, where it has a weight."""
        return _Balance(self, adapters, seed) if self.balance else None


class _GOATAdapter(Adapter):
    left: Tensor
    right: Tensor
    router: Tensor
    left_start: Tensor
    right_start: Tensor

    def __init__(self, method: GOAT, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.experts = method, method.num_experts(rank)
        inner = rank // self.experts
        theory = method.scaling == "theory"
        self.scale = scale * (math.sqrt(3 * method.eta * site.in_features / inner) if theory else self.experts)
        self.tally: _Balance | None = None
        self.parameter("left", site.out_features, rank)  # B_1 to B_E side by side
        self.parameter("right", rank, site.in_features)  # A_1 to A_E below one another
        self.parameter("router", self.experts, site.in_features)
        self.buffer("left_start", site.out_features, rank)
        self.buffer("right_start", rank, site.in_features)

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        full = svd(weight, driver="gram")  # all triplets, each exact to 1e-8 of the largest value
        inner = self.rank // self.experts
        used = slices(self.site.largest_rank, self.experts, inner, self.method.slices).flatten().to(weight.device)
        roots = (full.s[used] / (self.scale * self.method.rho)).sqrt()
        left, right = full.u[:, used] * roots, roots[:, None] * full.vh[used]
        bound = self.site.in_features**-0.5  # as torch's own linear layers, which the code has
        router = (2 * torch.rand(self.router.shape, generator=generator) - 1) * bound
        self.fill(left=left, right=right, router=router, left_start=left, right_start=right)
        self.ready = True

    def update(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # half precision ties experts that are not equal
            gates, probabilities, chosen = route(F.linear(x, self.router), self.method.top_k)
        if self.tally is not None:
            self.tally.count(self.site.name, probabilities, chosen)
        z, start = F.linear(x, torch.cat([self.right, self.right_start])).split(self.rank, dim=-1)
        z = (z.unflatten(-1, (self.experts, -1)) * gates[..., None]).flatten(-2)
        left = torch.cat([self.scale * self.left, -self.scale / self.experts * self.left_start], dim=1)
        return F.linear(torch.cat([z, start.to(z.dtype)], dim=-1), left)

    def delta(self, weight: Tensor) -> Tensor:
        raise ValueError(
            f"{self.site.name}: a router picks the experts of each token, so there is no one weight to merge"
        )


class _Balance(Coordinator):
    """Counts who was chosen in the forward passes since `penalty` was last read, and gives the loss of that."""

    counts_steps: ClassVar[bool] = False

    def __init__(self, method: GOAT, adapters: Mapping[str, Any], seed: int) -> None:
        super().__init__(adapters, seed)
        self.weight = method.balance
        self.counted_at = self._versions()
        self.open = False
        self.mask: Tensor | None = None
        # By layer: choices (E,), summed probabilities (E,), tokens (), of each pass.
        self.passes: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for adapter in self.adapters.values():
            assert isinstance(adapter, _GOATAdapter)
            adapter.tally = self

    def before_forward(self, kwargs: dict[str, Any], training: bool) -> None:
        self.open = training
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) else None
        if self.counted_at != self._versions():  # of an earlier step, in a loop that does not ask for the loss
            self.passes.clear()
            self.counted_at = self._versions()

    def count(self, name: str, probabilities: Tensor, chosen: Tensor) -> None:
        """Note one pass through a layer: both (..., E)."""
        if not torch.is_grad_enabled():
            return
        experts, tokens = chosen.shape[-1], chosen.shape[:-1]
        weights = probabilities.new_ones(tokens.numel(), 1)
        if self.mask is not None and tokens in (self.mask.shape, (self.mask.numel(),)):
            weights = self.mask.reshape(-1, 1).to(weights)
        sums = [(weights * value.reshape(-1, experts)).sum(dim=0) for value in (chosen, probabilities)]
        if self.open:  # asked last: a layer that is run again for its gradient must repeat what it did
            self.passes.setdefault(name, []).append((sums[0], sums[1], weights.sum()))

    def penalty(self) -> Tensor | None:
        terms = []
        for passes in self.passes.values():
            choices, probabilities, tokens = (torch.stack(parts).sum(dim=0) for parts in zip(*passes, strict=True))
            share = choices * probabilities / tokens.clamp_min(1).square()
            terms.append(len(choices) * share.sum())
        # Each token counts once; what is run again for its gradient comes after this, and does not.
        self.passes.clear()
        self.open = False
        return self.weight * torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else None
