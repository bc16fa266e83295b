"""What an adapter is, and what a method has to say to make one.

    y = base(x) + update(x),   update(x) = x Δᵀ,   Δ (out, in) = delta()

The base weight is never touched. A paper whose base is a residual, W_res + B A with W_res = W - B_0 A_0, is written as
W + (B A - B_0 A_0): the same function, with B_0 A_0 kept. So the output at the start is exact in every dtype, a
quantized base will do, taking an adapter off needs no arithmetic, and any number of them compose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..models.calibrate import Statistics
from ..options import Options
from .site import Site, SiteKind

if TYPE_CHECKING:
    from .coordinator import Coordinator

__all__ = ["Adapter", "AdapterMethod"]


class Adapter(nn.Module, ABC):
    """The tensors of one method at one site: trained ones are parameters, frozen ones buffers.

    All but indices are float32, shaped but without values after construction; `initialize` or a checkpoint fills them.

    Args:
        site: Where it sits.
        rank: r.

    Attributes:
        ready: Whether the tensors have values.
    """

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.site = site
        self.rank = rank
        self.ready = False

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """Output of the adapted layer.

        Args:
            x: Input of the layer.
            base: The layer with the adapters under this one; ``base.bias``, where it exists, is the layer's bias.
        """
        y = base(x)
        inner = x if self.site.kind == "embedding" else x.to(torch.float32)
        return y + self.update(inner).to(y.dtype)

    @abstractmethod
    def update(self, x: Tensor) -> Tensor:
        """What is added to the base output, for x in float32 (or the indices of an embedding)."""

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """Δ (out, in) float32 with adapted weight = weight + Δ.

        Args:
            weight: (out, in) float32, the weight under this adapter, for methods whose Δ depends on it.
        """

    @abstractmethod
    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        """Fill the tensors.

        Args:
            weight: (out, in) float32, the base weight.
            statistics: What the method's `needs` asked for, of this site's input.
            generator: Source of randomness, on the CPU.
        """

    def penalty(self) -> Tensor | None:
        """A term that is added to the loss, or None."""
        return None

    def on_step(self, step: int, total: int) -> None:
        """Called after every optimizer step: ``step`` of ``total``, the first one is 1. Nothing to do for most."""

    def truncate(self, rank: int) -> None:
        """Keep the leading ``rank`` components, where a method has trained them to stand alone.

        Raises:
            ValueError: The method has no such order.
        """
        raise ValueError(f"{self.site.name}: only a method that trains nested ranks, such as dylora, can be truncated")

    def share(self, owner: Adapter, *names: str) -> None:
        """Use the tensors of these names of another adapter in place of its own.

        They stay registered with ``owner`` only, so they are trained, counted and saved once. It is the adapter that
        is remembered, not the tensors: loading may replace those.
        """
        for name in names:
            delattr(self, name)
        self.__dict__.setdefault("_owners", {}).update(dict.fromkeys(names, owner))

    def __getattr__(self, name: str) -> Any:
        owner = self.__dict__.get("_owners", {}).get(name)
        return super().__getattr__(name) if owner is None else getattr(owner, name)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(left (out, k), right (k, in)) with Δ = left @ right exactly, or None where Δ has no small rank."""
        return None

    def parameter(self, name: str, *shape: int) -> None:
        """Register a trained tensor."""
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def buffer(self, name: str, *shape: int) -> None:
        """Register a frozen tensor, saved with the others."""
        self.register_buffer(name, torch.zeros(shape))

    @torch.no_grad()
    def fill(self, **values: Tensor) -> None:
        """Copy values into tensors of these names."""
        for name, value in values.items():
            getattr(self, name).copy_(value)

    def num_trainable(self) -> int:
        """Trained numbers."""
        return sum(p.numel() for p in self.parameters())


@dataclass(frozen=True)
class AdapterMethod(Options, ABC):
    """A published method with its options; makes one `Adapter` a site.

    A subclass is a frozen dataclass whose fields are the options of the paper.

    Attributes:
        needs: Calibration statistics that `Adapter.initialize` wants, from `eckart.models.calibrate.NEEDS`.
        kinds: Kinds of site it is defined for.
        mergeable: Whether the adapted layer is a linear map with one weight; if not, `Adapter.delta` raises.
        whole_modules: Whether `configure` has modules of the model trained whole beside the adapters. PEFT then trains
            and saves copies of them, keeps those when it unloads, and has one adapter of that kind active at a time.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear"})
    mergeable: ClassVar[bool] = True
    whole_modules: ClassVar[bool] = False

    @abstractmethod
    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """The adapter with its tensors allocated, without values.

        Args:
            site: Where it will sit.
            rank: r, from 1 to ``site.largest_rank``.
            scale: alpha / r.
        """

    @abstractmethod
    def trainable(self, site: Site, rank: int) -> int:
        """Trained numbers at one site by the paper's formula; what `build` makes is checked against it."""

    def check(self, site: Site, rank: int) -> str | None:
        """Why the method cannot be used at this site with this rank, or None."""
        if site.kind not in self.kinds:
            return f"is of kind {site.kind}, for which the method is not defined"
        if not 1 <= rank <= site.largest_rank:
            return f"has min(out, in) = {site.largest_rank}, so its rank must be 1 to {site.largest_rank}, not {rank}"
        return None

    def ranks(
        self,
        sites: Mapping[str, Site],
        statistics: Mapping[str, Statistics],
        rank: int,
        weight: Callable[[str], Tensor],
    ) -> dict[str, int] | None:
        """The rank of each site by name, where the method shares ranks out itself; None for ``rank`` everywhere.

        Asked once, before anything is built, and written into the configuration's ``rank_pattern``. A site that gets 0
        has no adapter.

        Args:
            sites: Every site, by name; ``check`` has passed them with ``rank``.
            statistics: What `needs` asked for, by the same names; empty where nothing is needed.
            rank: r of the configuration.
            weight: Gives the base weight (out, in) float32 of a site by its name.
        """
        return None

    def configure(self, model: nn.Module, config: Any) -> None:  # most have nothing to say
        """Fill in what the method decides for the whole model, such as ``config.modules_to_save``; mostly nothing.

        Asked before anything is planned, not for an adapter that is loaded.
        """

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        """Let adapters share tensors, by `Adapter.share`; called once all are built, before they have values."""

    def total_trainable(self, sites: Mapping[str, Site], ranks: Mapping[str, int]) -> int:
        """Trained numbers of all sites together: fewer than the sum of `trainable` where `link` shares tensors."""
        return sum(self.trainable(site, ranks[name]) for name, site in sites.items())

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator | None:
        """What the adapters do together, or None where they are independent."""
        return None

    def training_order(self, examples: int, batch: int, steps: int, seed: int) -> list[int] | None:
        """Which example each place of a whole training run takes, where the method has a say; None for any order.

        Args:
            examples: How many there are.
            batch: Examples in one optimizer step, over all its micro-batches and processes.
            steps: Optimizer steps.
            seed: Of the order.

        Returns:
            ``steps * batch`` indices below ``examples``, to be read in sequence.
        """
        return None
