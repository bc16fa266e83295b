"""CE-SSL: low-rank adaptation with layers left out at random, two ranks shared out once, and unlabelled data.

    training:     y = x (W + m c B A)ᵀ,   m = 0 with probability p, for the whole batch of a step, else 1
    afterwards:   W' = W + (1 - p) c B A,   B (out, r) from 0, A (r, in) from N(0, 0.02²)
    ranks:        before training the layers are ordered by mean (W ⊙ G)², G the gradient of the labelled data;
                  the lowest share of them gets 2 floor(r / 4), the others r

R. Zhou and others, Computation-Efficient Semi-Supervised Learning for ECG-based Cardiovascular Diseases Detection,
2024, arXiv 2406.14377; code: KAZABANA/CE-SSL. A layer that is left out costs neither its product nor its gradient. The
third part, batch statistics of unlabelled data, is `with_unlabelled`.

Different here: what is left out is drawn once a step, from seed and step, so that micro-batches, processes and
recomputed activations agree, and evaluation uses the expected weight (the code draws there too until it has merged).
The order comes from the true gradients of single sequences, by columns: Σ_j (mean_i W_ij²) (Σ_i G_ij²) over the number
of entries stands for mean (W ⊙ G)², which needs every G_ij; the code multiplies the gradient of a batch with A Aᵀ of
one draw. ``importance="fisher"`` is mean G². Both are for linear layers only: no such gradients are gathered of
convolutions. One-dimensional convolutions are `nn.Conv2d` of height 1, as in the code. Training all biases is left to
``modules_to_save``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .coordinator import Coordinator
from .factored import FactoredAdapter
from .site import Site, SiteKind

__all__ = ["CESSL", "with_unlabelled"]

Importance = Literal["taylor", "fisher", "none"]


@contextmanager
def with_unlabelled(encoder: nn.Module, unlabelled: Tensor) -> Iterator[None]:
    """Let unlabelled examples pass through a module along with each batch, for its batch statistics, and drop them.

    Args:
        encoder: A module of one tensor, with the batch in front, that has batch normalisation; in training mode.
        unlabelled: (batch, ...), of the shape of its inputs.

    Example:
        >>> encoder = nn.BatchNorm1d(1)
        >>> with with_unlabelled(encoder, torch.tensor([[3.0], [5.0]])):
        ...     encoder(torch.tensor([[0.0], [0.0]])).shape
        torch.Size([2, 1])
        >>> round(float(encoder.running_mean), 2)
        0.2
    """

    def join(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.cat([args[0], unlabelled.to(args[0])]), *args[1:])

    def split(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output[: len(output) - len(unlabelled)]

    handles = encoder.register_forward_pre_hook(join), encoder.register_forward_hook(split)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class CESSL(AdapterMethod):
    """Computation-efficient semi-supervised learning.

    Attributes:
        drop: p, probability that a layer's update is left out in a step.
        low_share: Share of the layers that get the low rank. The code has 0.1 to 0.9 by data set.
        importance: What orders the layers: "taylor" (mean (W ⊙ G)² by columns; the paper's choice), "fisher" (mean
            G²), or "none" for one rank, which needs no data.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = CESSL(drop=0.25).build(site, rank=2, scale=1.0)
        >>> weight = torch.zeros(8, 6)
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.left.data += 1
        >>> bool(torch.allclose(adapter.delta(weight), 0.75 * adapter.left @ adapter.right))
        True
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d"})

    drop: float = 0.2
    low_share: float = 0.6
    importance: Importance = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be a probability below 1, not {self.drop}; the paper uses 0.2")
        if not 0 <= self.low_share <= 1:
            raise ValueError(f"low_share must be a share from 0 to 1, not {self.low_share}")
        self.check_choices(importance=Importance)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of the options: one rank needs no data
        """Squared gradients, where layers are ordered by them."""
        return frozenset() if self.importance == "none" else frozenset({"fisher"})

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """B and A trained."""
        return _CESSLAdapter(self.drop, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out)."""
        return rank * (site.in_features + site.out_features)

    def ranks(
        self,
        sites: Mapping[str, Site],
        statistics: Mapping[str, Statistics],
        rank: int,
        weight: Callable[[str], Tensor],
    ) -> dict[str, int] | None:
        """Two ranks, by importance."""
        if self.importance == "none":
            return None
        scores: dict[str, float] = {}
        for name, site in sites.items():
            squares = statistics[name].fisher
            assert squares is not None
            if self.importance == "taylor":
                squares = squares * weight(name).double().square().mean(dim=0).to(squares.device)
            scores[name] = float(squares.sum()) / (site.out_features * site.in_features)
        order = sorted(scores, key=lambda name: scores[name])
        low = set(order[: int(self.low_share * len(order))])
        return {name: max(1, 2 * (rank // 4)) if name in low else rank for name in sites}

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator | None:
        """What draws the layers that are left out."""
        return _Deactivation(self.drop, adapters, seed) if self.drop else None


class _CESSLAdapter(FactoredAdapter):
    def __init__(self, drop: float, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "right"), scale=scale)
        self.full_scale, self.drop = scale, drop
        self.active: bool | None = None  # of this step; None for the expected weight
        self.scale = (1 - drop) * scale

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        right = 0.02 * torch.randn(self.right.shape, generator=generator)
        self.set_factors(left=torch.zeros(self.left.shape), right=right)

    def set_active(self, active: bool | None) -> None:
        """In or out for a training step, or None for the expected weight."""
        self.active = active
        self.scale = self.full_scale * (1 - self.drop if active is None else 1)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Factors of the expected Δ, whatever was drawn for the last step."""
        return (1 - self.drop) * self.full_scale * self.left, self.right

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return base(x) if self.active is False else super().forward(x, base)


class _Deactivation(Coordinator):
    def __init__(self, drop: float, adapters: Mapping[str, Any], seed: int) -> None:
        super().__init__(adapters, seed)
        self.drop = drop
        self.members: list[_CESSLAdapter] = list(adapters.values())
        self.state["step"] = torch.zeros((), dtype=torch.int64)  # steps that are done

    def before_forward(self, kwargs: dict[str, Any], training: bool) -> None:
        if not training:
            for adapter in self.members:
                adapter.set_active(None)
            return
        drawn = torch.rand(len(self.members), generator=self.generator(int(self.state["step"])))
        for adapter, active in zip(self.members, (drawn >= self.drop).tolist(), strict=True):
            adapter.set_active(active)
        if self.members and not any(adapter.active for adapter in self.members):
            # The loss would depend on nothing that is trained, and its backward pass would fail.
            self.members[0].active, self.members[0].scale = True, 0.0

    def on_step(self, step: int, total: int) -> None:
        self.state["step"] = torch.tensor(step)
