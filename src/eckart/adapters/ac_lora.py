"""AC-LoRA: low-rank adaptation that keeps the signal of its factors and draws the rest anew; no search for a rank.

    Δ = c B A,   B (out, r) from 0, A (r, in) Kaiming uniform;   every few steps, for M = A and for M = B:
    M = Σ_i s_i p_i q_iᵀ,   signal: those i with s_1² + ... + s_i² < p ||M||²   (at least one)
    M <- signal + G,   G of independent normal entries with the variance of the entries of M - signal
    p = 1 - l^a,   l the loss, a = 1 + step / total

Cui, Tian, Ying and Lu, AC-LoRA: Auto Component LoRA for Personalized Artistic Style Image Generation, 2025,
arXiv 2504.02231; no official code. The rule for p needs a loss between 0 and 1, as that of a diffusion model: the loss
here is its running mean over that of the first step, unless ``relative=False``; ``schedule="linear"`` raises p from
``start`` to ``end`` instead. The last of the restarts comes before the last tenth of the steps, so that what is saved
has been trained since. The factors are treated one by one, as published: which part of them is signal depends on how
the product is split. The moments of the optimizer stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import Adapter, AdapterMethod
from .coordinator import Coordinator
from .factored import FactoredAdapter, kaiming_uniform
from .site import Site, SiteKind

__all__ = ["ACLoRA", "renew"]

Schedule = Literal["loss", "linear"]
_SMOOTHING = 0.9  # of the running mean of the loss
_LAST = 0.9  # share of the steps after which nothing is renewed


def renew(matrix: Tensor, energy: float, generator: torch.Generator) -> Tensor:
    """The signal of a matrix with its noise drawn again, of the same variance.

    Args:
        matrix: M, any two sizes.
        energy: p, the share of ||M||² that the signal stays below.
        generator: Source of the noise, on the CPU.

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> renewed = renew(matrix, 0.95, torch.Generator().manual_seed(0))
        >>> bool((renewed - torch.diag(torch.tensor([3.0, 2.0, 0.0]))).abs().max() < 1.5)
        True
    """
    u, s, vh, _ = svd(matrix.to(torch.float32), driver="exact")
    energies = s.double().square().cumsum(0)
    if not float(energies[-1]) > 0:
        return matrix.clone()
    count = max(1, int((energies < energy * energies[-1]).sum()))
    signal = (u[:, :count] * s[:count]) @ vh[:count]
    deviation = float((matrix - signal).double().std(correction=0))
    noise = deviation * torch.randn(matrix.shape, generator=generator)
    return (signal + noise.to(signal.device)).to(matrix.dtype)


@dataclass(frozen=True)
class ACLoRA(AdapterMethod):
    """Auto component low-rank adaptation.

    Attributes:
        every: Optimizer steps between two restarts; the paper has ten epochs.
        schedule: Of p: by the "loss" (the paper), or "linear" in the steps.
        relative: Whether the loss is taken relative to that of the first step.
        start: p at the first step of the linear schedule.
        end: p at the last step of the linear schedule.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = ACLoRA().build(site, rank=2, scale=1.0)
        >>> weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        >>> adapter.initialize(weight, None, torch.Generator().manual_seed(0))
        >>> adapter.num_trainable(), float(adapter.delta(weight).detach().abs().max())
        (28, 0.0)
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear", "conv2d", "embedding"})

    every: int = 200
    schedule: Schedule = "loss"
    relative: bool = True
    start: float = 0.7
    end: float = 0.99

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, not {self.every}")
        self.check_choices(schedule=Schedule)
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start and end must rise between 0 and 1, not {self.start} and {self.end}")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """B and A trained."""
        return _ACLoRAAdapter(site, rank, trained=("left", "right"), scale=scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out)."""
        return rank * (site.in_features + site.out_features)

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator:
        """What draws the noise again."""
        return _Restarts(self, adapters, seed)


class _ACLoRAAdapter(FactoredAdapter):
    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        self.set_factors(left=torch.zeros(self.left.shape), right=kaiming_uniform(self.right.shape, generator))


class _Restarts(Coordinator):
    def __init__(self, method: ACLoRA, adapters: Mapping[str, Any], seed: int) -> None:
        super().__init__(adapters, seed)
        self.method = method
        self.members: list[_ACLoRAAdapter] = list(adapters.values())

    def observe(self, loss: Tensor) -> None:
        value = loss.float().cpu()
        if not bool(value.isfinite()):  # a step that mixed precision skips; the mean would never recover
            return
        self.state.setdefault("first", value)
        self.state["mean"] = _SMOOTHING * self.state.get("mean", value) + (1 - _SMOOTHING) * value

    def energy(self, step: int, total: int) -> float:
        """p after a step, between 0 and 1.

        Raises:
            RuntimeError: No loss has been seen, by which to set it.
        """
        method = self.method
        if method.schedule == "linear":
            return method.start + (method.end - method.start) * step / total
        if "mean" not in self.state:
            raise RuntimeError(
                "AC-LoRA sets its threshold by the loss, and the model has returned none: pass labels, or use "
                "schedule='linear'"
            )
        loss = float(self.state["mean"])
        if method.relative:
            loss /= max(float(self.state["first"]), torch.finfo(torch.float32).tiny)
        return 1 - min(max(loss, 0.0), 1.0) ** (1 + step / total)

    def on_step(self, step: int, total: int) -> None:
        if step % self.method.every or step > _LAST * total:
            return
        energy, generator = self.energy(step, total), self.generator(step)
        for adapter in self.members:
            for factor in (adapter.right, adapter.left):
                factor.copy_(renew(factor, energy, generator))
