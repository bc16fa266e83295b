"""The convolutions of a model, and the size of the pictures that they see: their cost depends on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..structures.conv_chain import ConvChain, conv_macs
from .calling import AnyBatch, call
from .groups import evaluating
from .kinds import owners
from .replace import swap
from .select import Where, matching

__all__ = ["ConvRef", "convolutions", "placed"]


@dataclass(frozen=True)
class ConvRef:
    """A convolution inside a model.

    Attributes:
        name: full name of the module.
        module: the module.
        sizes: (height, width) of the picture in every call during one pass through the model.
    """

    name: str
    module: nn.Conv2d = field(repr=False)
    sizes: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the kernel as a matrix, (F, C kh kw)."""
        weight = self.module.weight
        return weight.shape[0], weight[0].numel()

    @property
    def macs(self) -> int:
        """Multiply-adds on one picture."""
        return sum(conv_macs(self.module, *size)[0] for size in self.sizes)

    def macs_of(self, chain: ConvChain) -> int:
        """Multiply-adds of a chain in its place."""
        return sum(chain.macs(*size) for size in self.sizes)


def convolutions(model: nn.Module, batch: AnyBatch, where: Where | None = None) -> list[ConvRef]:
    """Every ``nn.Conv2d`` that the model calls on a batch and that is tied to no other, in the model's order.

    Args:
        model: any torch model.
        batch: inputs of its forward; pictures of the size that matters.
        where: which ones, as in `eckart.models.linears`; None for all.

    Raises:
        ValueError: there are no convolutions, or ``where`` matches none.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))
        >>> [(ref.name, ref.sizes, ref.macs) for ref in convolutions(model, torch.ones(1, 1, 8, 8))]
        [('0', ((8, 8),), 1296), ('2', ((6, 6),), 576)]
    """
    every: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not every:
        raise ValueError(f"{type(model).__name__} has no convolutions (nn.Conv2d) to work on")
    chosen = every.keys() if where is None else matching(where, every)
    seen: dict[str, list[tuple[int, int]]] = {}

    def watch(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(name, []).append((args[0].shape[-2], args[0].shape[-1]))

    handles = [every[name].register_forward_pre_hook(partial(watch, name)) for name in chosen]
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    names_of = owners(model)
    found = []
    for name, module in every.items():
        if name in seen and isinstance(module, nn.Conv2d) and len(names_of[id(module.weight)]) == 1:
            found.append(ConvRef(name, module, tuple(seen[name])))
    return found


@contextlib.contextmanager
def placed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put these modules into the places of others for a while."""
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        swap(model, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            swap(model, name, module)
