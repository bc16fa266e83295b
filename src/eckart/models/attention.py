"""Which rows of which linear maps make the queries, keys and values of a model's attention.

A projection may be a layer of its own, rows of a fused one, or rows of each head in turn; names do not say. So the
model runs once on a small batch: the output of every linear map is cut from the graph, and where attention is computed
the gradients of its three arguments tell which of those outputs, row by row, they were made from. Rotations and norms
between the two do not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from .groups import evaluating
from .kinds import linear_kind
from .topology import example_inputs

__all__ = ["Projection", "Rows", "attention_projections"]

Rows = tuple[tuple[int, int], ...]  # ranges [start, stop), ascending

_ROLES = ("query", "key", "value")


@dataclass(frozen=True)
class Projection:
    """A linear map that attention reads.

    Attributes:
        name: full name of the module.
        out_features: its rows.
        query: rows that make queries, as ranges [start, stop).
        key: rows that make keys.
        value: rows that make values.
    """

    name: str
    out_features: int
    query: Rows
    key: Rows
    value: Rows

    @property
    def overlaps(self) -> bool:
        """Whether a row serves for two of the three."""
        rows = [row for part in (self.query, self.key, self.value) for ends in part for row in range(*ends)]
        return len(rows) > len(set(rows))


def attention_projections(model: nn.Module, batch: Mapping[str, Any] | None = None) -> list[Projection]:
    """Find the linear maps that make queries, keys and values, for any family of transformers.

    Args:
        model: a transformers model whose attention goes through `transformers.AttentionInterface`, as in all but a few.
            On the meta device, where nothing has a value, a layer that makes more than one of the three counts with
            all of its rows for each.
        batch: what to run it on; default :func:`~eckart.models.example_inputs`, four tokens of text.

    Returns:
        The projections in the order of execution. Empty if no attention was seen, or none that reads linear maps.

    Raises:
        ValueError: there is no example batch for the model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=2))
        >>> for found in attention_projections(model): print(found.name, found.query, found.key, found.value)
        transformer.h.0.attn.c_attn ((0, 4),) ((4, 8),) ((8, 12),)
    """
    inputs = example_inputs(model, tokens=4) if batch is None else batch
    watch = _Watch()
    linear = [(name, module) for name, module in model.named_modules() if linear_kind(module)]
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        for name, module in linear:
            stack.callback(module.register_forward_hook(watch.cut(name)).remove)
        # A masked autoencoder draws its mask: the caller's random numbers stay as they are.
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(evaluating(model))
        stack.enter_context(_attending_by(watch.attend, model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        model(**inputs)
    return [
        Projection(name, len(next(iter(masks.values()))), *(_ranges(masks.get(role)) for role in _ROLES))
        for name, masks in watch.found.items()
    ]


class _Watch:
    """Cuts the outputs of linear maps from the graph, and finds out at each attention which of them it reads.

    Attributes:
        found: Name -> role -> mask (out,) on the CPU.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Tensor]] = {}
        self._outputs: list[tuple[str, Tensor]] = []  # since the last attention

    def cut(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """A hook for the forward pass of the linear map ``name``."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            self._outputs.append((name, leaf))
            return leaf.clone()  # what follows may be done in place, which a leaf does not allow

        return hook

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Stands in for attention: what it gives, zeros (batch, tokens, heads, width), does not matter."""
        for role, tensor in zip(_ROLES, (query, key, value), strict=True):
            self._trace(role, tensor)
        self._outputs.clear()
        batch, heads, tokens, _ = query.shape
        return query.new_zeros(batch, tokens, heads, value.shape[-1]), None

    def _trace(self, role: str, tensor: Tensor) -> None:
        leaves = [leaf for _, leaf in self._outputs]
        if not (leaves and tensor.requires_grad):
            return
        # Unequal weights, none of them zero: under a norm the gradient of a plain sum would vanish.
        weights = torch.arange(tensor.numel(), dtype=torch.float32, device=tensor.device).cos()
        weights = weights.view(tensor.shape).to(tensor.dtype)
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(
            tensor, leaves, weights, retain_graph=True, allow_unused=True
        )
        for (name, _), grad in zip(self._outputs, grads, strict=True):
            if grad is None:
                continue
            mask = torch.ones(grad.shape[-1], dtype=torch.bool)
            if not grad.is_meta:
                mask = (grad != 0).flatten(0, -2).any(dim=0).cpu()
            masks = self.found.setdefault(name, {})
            masks[role] = masks.get(role, torch.zeros_like(mask)) | mask


def _ranges(mask: Tensor | None) -> Rows:
    """The runs of a mask (out,).

    Example:
        >>> _ranges(torch.tensor([True, False, True, True]))
        ((0, 1), (2, 4))
    """
    if mask is None:
        return ()
    edge = torch.zeros(1, dtype=torch.int8)
    steps = torch.diff(mask.to(torch.int8), prepend=edge, append=edge)
    starts, stops = ((steps == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return tuple(zip(starts, stops, strict=True))


@contextlib.contextmanager
def _attending_by(function: Callable[..., Any], model: nn.Module) -> Iterator[None]:
    """Have a model compute attention by ``function``."""
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    before: list[tuple[Any, Any]] = [(c, c._attn_implementation_internal) for c in configs.values()]
    key = f"eckart_{id(function)}"  # no other thread's
    AttentionInterface.register(key, function)
    try:
        for config, _ in before:
            config._attn_implementation_internal = key
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        AttentionInterface._global_mapping.pop(key)
