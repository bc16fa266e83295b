"""A layer of a model with adapters on it, in the form that PEFT handles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..models.kinds import is_four_bit, linear_kind
from ..structures import Structure
from .contract import Adapter
from .site import Site

__all__ = ["EckartLayer", "base_weight", "layer_name", "repacked"]


def layer_name(name: str) -> str:
    """Name of the layer that a module is, or is the base of.

    Example:
        >>> layer_name("layers.0.up_proj.base_layer")
        'layers.0.up_proj'
    """
    return name.removesuffix(".base_layer")


def base_weight(site: Site, layer: EckartLayer | nn.Module) -> Tensor:
    """W (out, in) of a module in float32, whatever stores it: transposed, quantized or structured.

    Raises:
        ValueError: The module keeps its weight in a form that cannot be read back.
    """
    module = layer.get_base_layer() if isinstance(layer, EckartLayer) else layer
    if isinstance(module, Structure):
        return module.dense().detach().to(torch.float32)
    if repacked(module):
        return _read_through(site, module)
    backend = getattr(layer, "quantization_backend", None)
    try:
        weight = backend.get_base_weight(module) if backend is not None else module.get_parameter("weight")
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{site.name} ({type(module).__name__}) has no readable weight: {error}") from error
    weight = weight.detach()
    if not weight.is_floating_point():
        raise ValueError(f"{site.name} stores its weight as {weight.dtype}, which PEFT cannot dequantize")
    if site.kind == "embedding" or linear_kind(module) == "conv1d":
        weight = weight.mT
    return weight.reshape(site.out_features, site.in_features).to(torch.float32)


def repacked(module: nn.Module) -> bool:
    """Whether bitsandbytes has reordered the four-bit weight of a module for inference on the processor."""
    weight: Any = getattr(module, "weight", None)
    return is_four_bit(module) and bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


@torch.no_grad()
def _read_through(site: Site, module: nn.Module) -> Tensor:
    """W of a linear module from what it does to the unit vectors.

    bitsandbytes reorders four-bit weights for the processor at their first use in evaluation, and its own routine for
    reading a weight, which PEFT calls, then returns the entries in that order.
    """
    unit = torch.eye(site.in_features, device=module.get_parameter("weight").device)
    offset = module.bias if isinstance(module.bias, Tensor) else torch.zeros((), device=unit.device)
    weight: Tensor = module(unit).to(torch.float32) - offset.to(torch.float32)
    return weight.mT.contiguous()


class EckartLayer(nn.Module, BaseTunerLayer):
    """A base layer and the adapters on it, by name; the active ones are nested around it in order.

    Args:
        base_layer: The module that is adapted.
        site: What kind of weight it has.
    """

    adapter_layer_names: tuple[str, ...] = ("eckart_adapters",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, site: Site) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self.eckart_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._original: Tensor | None = None  # the base weight while adapters are merged into it
        self.in_features, self.out_features = site.in_features, site.out_features

    def add(self, name: str, adapter: Adapter, *, inference_mode: bool) -> None:
        """Put an adapter on the layer."""
        self.eckart_adapters[name] = adapter
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def adapters(self, names: list[str] | None = None) -> list[Adapter]:
        """The adapters of these names (the active ones) that this layer has."""
        wanted = self.active_adapters if names is None else names
        found = [self.eckart_adapters[name] for name in wanted if name in self.eckart_adapters]
        return [adapter for adapter in found if isinstance(adapter, Adapter)]

    def train(self, mode: bool = True) -> EckartLayer:
        """As for any module, but a four-bit base under an adapter in training is kept from reordering its weights."""
        super().train(mode)
        base = self.get_base_layer()
        if is_four_bit(base):
            base.training = mode or any(p.requires_grad for p in self.eckart_adapters.parameters())
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Its device only: PEFT's own also takes over the dtype, which would round what is frozen to half precision."""
        wanted = device or next(iter(self.get_base_layer().parameters())).device
        if adapter_name not in self.eckart_adapters or wanted.type == "meta":
            return
        adapter = self.eckart_adapters[adapter_name]
        if not any(tensor.device.type == "meta" for tensor in adapter.state_dict().values()):  # still to be loaded
            adapter.to(wanted)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer under its active adapters."""
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        bias = getattr(self.get_base_layer(), "bias", None)
        below = _Below(partial(_call, self.base_layer, args, kwargs), bias)
        if not (self.disable_adapters or self.merged):
            for adapter in self.adapters():
                below = _Below(partial(adapter, base=below), bias)
        return below(x)

    def merged_weight(self, names: list[str] | None = None) -> Tensor:
        """(out, in) float32, what the layer computes with the named adapters."""
        weight = base_weight(self.site, self)
        for adapter in self.adapters(names):
            weight = weight + adapter.delta(weight).to(weight.device)
        return weight

    @torch.no_grad()
    def total_delta(self) -> Tensor:
        """(out, in) float32, what the active adapters add to the weight together."""
        weight = base_weight(self.site, self)
        total = torch.zeros_like(weight)
        for adapter in self.adapters():
            delta = adapter.delta(weight).to(weight.device)
            weight, total = weight + delta, total + delta
        return total

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapted weight into the base layer; `unmerge` brings the original back bit for bit.

        Args:
            safe_merge: Check for NaN and Inf before anything is written.
            adapter_names: Which adapters; the active ones by default.

        Raises:
            ValueError: The merged weight is not finite, or the base layer cannot take a dense weight.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.eckart_adapters]
        if not names:
            return
        base = self.get_base_layer()
        if isinstance(base, Structure):
            raise ValueError(
                f"{self.site.name} is a {type(base).__name__}, which cannot hold a merged weight; serve it with the "
                "adapter, or dequantize the model first"
            )
        weight = self.merged_weight(names)
        if safe_merge and not bool(weight.isfinite().all()):
            raise ValueError(f"merging {', '.join(names)} into {self.site.name} gives NaN or Inf; nothing was changed")
        if self._original is None:
            self._original = self.get_base_weight().clone()
        self.set_base_weight(self.as_stored(weight))
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Bring back the weight from before the first `merge`."""
        if self._original is not None:
            self.set_base_weight(self._original)
        self._original = None
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters in its weight if ``merge``, as it was if not."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.unmerge()
        return self.get_base_layer()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into a LoRA: every one has a delta."""
        return self.site.kind == "linear"

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Δ of one adapter, in the layout of the stored weight."""
        (adapter,) = self.adapters([adapter_name])
        return self.as_stored(adapter.delta(base_weight(self.site, self)))

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight (out, in) in the layout and dtype of the stored one."""
        stored = self.get_base_weight()
        if self.site.kind == "embedding" or linear_kind(self.get_base_layer()) == "conv1d":
            weight = weight.mT
        return weight.reshape(stored.shape).to(stored.dtype).contiguous()

    def __repr__(self) -> str:
        """As PEFT marks its layers."""
        return "eckart." + super().__repr__()


class _Below:
    """What lies under an adapter, as the adapter calls it.

    Attributes:
        bias: That of the base layer, or None.
    """

    __slots__ = ("_apply", "bias")

    def __init__(self, apply: Callable[[Tensor], Tensor], bias: Tensor | None) -> None:
        self._apply = apply
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x)


def _call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    result: Tensor = layer(x, *args, **kwargs)
    return result
