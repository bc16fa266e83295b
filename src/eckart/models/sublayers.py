"""Which linear maps write to the residual stream: the last of attention and of the MLP, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .groups import evaluating
from .select import linears
from .topology import block_of, blocks, example_inputs

__all__ = ["Sublayer", "sublayers"]


@dataclass(frozen=True)
class Sublayer:
    """A part of a block whose output is added to the residual stream.

    Attributes:
        output: Full name of its last linear map.
        kind: "attention" if it mixes positions (recurrent layers too), "cross-attention" if it mixes in another
            stream, "mlp" if it treats each position alone.
    """

    output: str
    kind: Literal["attention", "cross-attention", "mlp"]


def sublayers(
    model: nn.Module, layers: Iterable[str] | None = None, batch: Mapping[str, Any] | None = None
) -> list[Sublayer]:
    """Find the sub-layers of the repeated blocks by running the model once on a small batch.

    A linear map writes to the residual stream if its output reaches the output of its block, which is as wide, along
    a path without another linear map.

    Args:
        model: a model whose forward takes ``batch`` as keyword arguments.
        layers: full names of the modules that count as linear maps; default all that :func:`~eckart.models.linears`
            selects.
        batch: what to run it on; default :func:`~eckart.models.example_inputs`.

    Returns:
        Sub-layers in the order of execution. Experts that are one fused parameter have no linear map to be found.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> for part in sublayers(model): print(part.output, part.kind)
        transformer.h.0.attn.c_proj attention
        transformer.h.0.mlp.c_proj mlp
    """
    found = blocks(model)
    names = [ref.name for ref in linears(model, quantized=True).linears] if layers is None else list(layers)
    places = {name: block for name in names if (block := block_of(name, found)) is not None}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}  # outputs of blocks

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            inputs[name] = args[0] if args else next(iter(kwargs.values()))
            outputs[name] = _Mark.apply(y if y.requires_grad else y.detach().requires_grad_(), name)
            return outputs[name]

        return hook

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            streams[name] = output if isinstance(output, Tensor) else next(iter(output))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True) for name in places]
    handles += [block.module.register_forward_hook(note(block.name)) for block in found]
    try:
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            model(**(example_inputs(model) if batch is None else batch))
    finally:
        for handle in handles:
            handle.remove()

    def kind(name: str) -> Literal["attention", "cross-attention", "mlp"]:
        feeders = [feeder for feeder in _nearest(inputs[name]) if places[feeder].name == places[name].name]
        if not feeders or not _mixes(inputs[name], [outputs[feeder] for feeder in feeders]):
            return "mlp"
        own = places[name].list_name
        foreign = [{places[far].list_name for far in _nearest(inputs[feeder])} - {own} for feeder in feeders]
        return "attention" if all(lists == foreign[0] for lists in foreign) else "cross-attention"

    writers = {
        name
        for block, stream in streams.items()
        for name in _nearest(stream)
        if places[name].name == block and outputs[name].shape[-1] == stream.shape[-1]
    }
    return [Sublayer(name, kind(name)) for name in outputs if name in writers]


class _Mark(torch.autograd.Function):
    """A copy whose node in the graph bears the name of a layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: str) -> Tensor:
        ctx.layer = layer
        return x.clone()  # not a view, which a model could not change in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def _nearest(x: Tensor) -> Iterator[str]:
    """Marked layers that x depends on with no other marked layer between."""
    waiting: list[Any] = [x.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        layer = getattr(node, "layer", None)
        if layer is not None:
            yield layer
        else:
            waiting += [before for before, _ in node.next_functions]


@torch.enable_grad()
def _mixes(x: Tensor, feeders: list[Tensor]) -> bool:
    """Whether the last position of x depends on another position of the feeders."""
    gradients = torch.autograd.grad(x.flatten(0, -2)[-1].sum(), feeders, retain_graph=True, materialize_grads=True)
    return any(bool(gradient.flatten(0, -2)[:-1].any()) for gradient in gradients)
