"""Any adapter as a plain LoRA, for servers and libraries that know nothing else.

Δ (out, in) = left right,   B A = the best approximation of Δ of rank r,   error ||Δ - B A||_F
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..linalg import qr, svd
from ..models.files import atomic_directory
from ..models.kinds import linear_kind
from .contract import Adapter
from .layer import EckartLayer, base_weight
from .pissa import split_evenly

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Conversion", "best_factors", "lora_factors", "to_lora"]


@dataclass(frozen=True)
class Conversion:
    """What `to_lora` wrote.

    Attributes:
        rank: Rank of the LoRA.
        exact_rank: Smallest rank that would make no error.
        errors: Module name -> ||Δ - B A||_F / ||Δ||_F.
        parameters: Numbers in the file.
    """

    rank: int
    exact_rank: int
    errors: dict[str, float]
    parameters: int

    @property
    def largest_error(self) -> float:
        """Over all layers."""
        return max(self.errors.values(), default=0.0)


def lora_factors(adapter: Adapter, weight: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """B (out, r) and A (r, in) with B A nearest to the adapter's Δ, and the relative error made.

    Through the small core of the adapter's own factors where it has them, so no dense SVD is needed.

    Args:
        adapter: With values.
        weight: (out, in) float32, the weight under it.
        rank: r; None for the smallest that makes no error, min(out, in) for an adapter without factors.

    Returns:
        B, A, and ||Δ - B A||_F / ||Δ||_F, 0 for Δ = 0.

    Example:
        >>> from eckart.adapters.pissa import PiSSA
        >>> from eckart.adapters.site import Site
        >>> adapter, weight = PiSSA().build(Site("layer", "linear", 8, 6), 2, 1.0), torch.eye(8, 6)
        >>> adapter.initialize(weight, None, torch.Generator())
        >>> adapter.left.data += 0.5
        >>> b, a, error = lora_factors(adapter, weight)
        >>> b.shape, a.shape, torch.allclose(b @ a, adapter.delta(weight), atol=1e-6)
        (torch.Size([8, 4]), torch.Size([4, 6]), True)
    """
    with torch.no_grad():
        return best_factors(adapter.low_rank() or adapter.delta(weight), rank)


def best_factors(delta: Tensor | tuple[Tensor, Tensor], rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """B (out, r) and A (r, in) with B A nearest to Δ, and the relative error made.

    Args:
        delta: Δ (out, in), or left (out, k) and right (k, in) with Δ = left right, for which no dense SVD is needed.
        rank: r; None for the smallest that makes no error: k, or min(out, in).

    Example:
        >>> left, right = torch.ones(3, 1), torch.ones(1, 2)
        >>> b, a, error = best_factors((left, right))
        >>> torch.allclose(b @ a, torch.ones(3, 2)), error
        (True, 0.0)
    """
    if isinstance(delta, tuple) and delta[0].shape[1] >= min(delta[0].shape[0], delta[1].shape[1]):
        delta = delta[0].double() @ delta[1].double()
    if isinstance(delta, tuple):
        left, right = (factor.double() for factor in delta)
        outer, inner = qr(left), qr(right.mT)
        core = svd(outer.r @ inner.r.mT, driver="exact")
        u, s, vh = outer.q @ core.u, core.s, core.vh @ inner.q.mT
    else:
        u, s, vh, _ = svd(delta.double(), driver="exact")
    kept = s.shape[0] if rank is None else min(rank, s.shape[0])
    b, a = split_evenly(u[:, :kept], s[:kept], vh[:kept])
    size, lost = float(s.square().sum().sqrt()), float(s[kept:].square().sum().sqrt())
    return b.float(), a.float(), lost / size if size > 0 else 0.0


def to_lora(
    model: PeftModel, out: str | Path, rank: int | None = None, *, adapter_name: str = "default", force: bool = False
) -> Conversion:
    """Write an adapter of ours as a PEFT LoRA on the same base model, with what it trains whole.

    Args:
        model: What `eckart.adapt` or `PeftModel.from_pretrained` gave.
        out: Directory to write; whole or not at all.
        rank: Rank of the LoRA; None for the smallest that makes no error.
        adapter_name: Which adapter.
        force: Whether ``out`` may be replaced.

    Returns:
        Rank and error of every layer.

    Raises:
        ValueError: The model has no such adapter, or the rank is below 1.
        FileExistsError: ``out`` exists and ``force`` is not given.
    """
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, EckartLayer) and adapter_name in module.eckart_adapters
    }
    if not layers:
        raise ValueError(f"the model has no Eckart adapter named {adapter_name!r}")
    exact = {name: _exact_rank(layer.adapters([adapter_name])[0]) for name, layer in layers.items()}
    chosen = rank or max(exact.values())
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    pattern: dict[str, int] = {}
    for name, layer in layers.items():
        (adapter,) = layer.adapters([adapter_name])
        b, a, errors[name] = lora_factors(adapter, base_weight(layer.site, layer).cpu(), chosen)
        if b.shape[1] != chosen:
            pattern[name] = b.shape[1]
        tensors |= _named(f"base_model.model.{name}", layer, b, a)
    theirs: Any = model.peft_config[adapter_name]
    if theirs.modules_to_save:
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        tensors |= {key: value for key, value in state.items() if ".eckart_adapters." not in key}
    config = LoraConfig(
        modules_to_save=theirs.modules_to_save,
        r=chosen,
        lora_alpha=chosen,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),  # alpha / r stays 1
        target_modules=sorted(layers),
        fan_in_fan_out=any(linear_kind(layer.get_base_layer()) == "conv1d" for layer in layers.values()),
        task_type=theirs.task_type,
        base_model_name_or_path=theirs.base_model_name_or_path,
        inference_mode=True,
    )
    with atomic_directory(out, force=force) as directory:
        save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "adapter_model.safetensors")
        config.save_pretrained(str(directory))
    parameters = sum(value.numel() for value in tensors.values())
    return Conversion(chosen, max(exact.values()), errors, parameters)


def _exact_rank(adapter: Adapter) -> int:
    factors = adapter.low_rank()
    largest = adapter.site.largest_rank
    return largest if factors is None else min(factors[0].shape[1], largest)


def _named(prefix: str, layer: EckartLayer, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    """The two factors under PEFT's names and in its shapes."""
    base: Any = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return {f"{prefix}.lora_embedding_A": a, f"{prefix}.lora_embedding_B": b}
    if layer.site.kernel is not None:
        a, b = a.unflatten(1, (-1, *layer.site.kernel)), b[:, :, None, None]
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
