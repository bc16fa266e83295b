"""Two numbers of a base weight that tell whether an adapter belongs to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer import EckartLayer, base_weight

__all__ = ["check_fingerprints", "fingerprint"]

# A base that was rounded to bfloat16, or quantized to 8 bits, is still the same base.
_TOLERANCE = 0.05


def fingerprint(weight: Tensor) -> Tensor:
    """Norm of W (out, in), and aᵀ W b for fixed vectors a (out,) and b (in,) of norm one; (2,) float32.

    Example:
        >>> fingerprint(torch.eye(2)).shape
        torch.Size([2])
    """
    a, b = (_direction(size, weight.device) for size in weight.shape)
    return torch.stack([torch.linalg.vector_norm(weight), a @ (weight @ b)]).to("cpu", torch.float32)


def _direction(size: int, device: torch.device) -> Tensor:
    """A unit vector that no weight has a reason to be aligned with; the same in every version of every library."""
    values = torch.cos(torch.arange(size, dtype=torch.float64, device=device).square())
    return (values / values.norm()).to(torch.float32)


def check_fingerprints(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Compare the fingerprints in an adapter's tensors with the base weights that they are about to be put on.

    Args:
        model: The model, adapters in place.
        adapter_name: Which adapter.
        state: Its tensors, by the names of the model's state dict.

    Raises:
        ValueError: A base weight differs from the one that the adapter was made for, or the file lacks tensors.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, EckartLayer) or adapter_name not in layer.eckart_adapters:
            continue
        prefix = f"{name}.eckart_adapters.{adapter_name}."
        wanted = {prefix + key for key in layer.eckart_adapters[adapter_name].state_dict()}
        missing = sorted(wanted - state.keys())
        if missing:
            raise ValueError(f"the adapter file has no tensor {missing[0]}; it is damaged, or of another method")
        saved = state[f"{prefix}fingerprint"].to(torch.float64).cpu()
        actual = fingerprint(base_weight(layer.site, layer)).to(torch.float64)
        # The second number is of the size of the norm over the root of the larger dimension.
        size = actual[0].clamp(min=1e-30)
        allowed = _TOLERANCE * torch.stack([size, size / max(layer.in_features, layer.out_features) ** 0.5])
        if bool(((saved - actual).abs() > allowed).any()):
            raise ValueError(
                f"the adapter was made for another base model: the weight of {layer.site.name} has norm "
                f"{float(actual[0]):.4g}, the one it was made for {float(saved[0]):.4g}; load that base"
            )
