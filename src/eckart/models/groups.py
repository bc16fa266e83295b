"""Which linear maps receive the same input tensor, and so share one Gram matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import is_four_bit
from .select import Where, linears
from .topology import InputTracker, block_of, blocks, example_inputs

__all__ = ["evaluating", "input_groups", "only_gradients_of"]


def input_groups(
    model: nn.Module, where: Where | None = None, batch: Mapping[str, Any] | None = None
) -> list[list[str]]:
    """Group the selected linear maps by the input tensor that they share.

    The model runs once on a small batch, and the input of every selected layer is watched. Query, key and
    value come out together, gate and up too, and the keys and values of cross attention, for any family.

    Args:
        model: a model whose forward takes ``batch`` as keyword arguments.
        where: which linear maps, as in :func:`~eckart.models.linears`.
        batch: what to run it on; default :func:`~eckart.models.example_inputs`.

    Returns:
        Lists of names in the order of execution. A group never crosses a block, so a model can be treated
        block by block. A layer that did not run on this batch (an expert without tokens) is alone, at the end.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=6,
        ...                                      num_hidden_layers=1, num_attention_heads=1))
        >>> for group in input_groups(model): print([name.split(".")[-1] for name in group])
        ['q_proj', 'k_proj', 'v_proj']
        ['o_proj']
        ['gate_proj', 'up_proj']
        ['down_proj']
    """
    selected = linears(model, where).linears
    inputs = example_inputs(model) if batch is None else batch
    tracker = InputTracker()
    seen: dict[str, list[int]] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            assert isinstance(x, Tensor)
            seen.setdefault(name, []).append(tracker.key(x))

        return hook

    handles = [ref.module.register_forward_pre_hook(watch(ref.name), with_kwargs=True) for ref in selected]
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()

    found = blocks(model)
    groups: dict[tuple[Any, ...], list[str]] = {}
    # A layer that runs several times (shared by the blocks) shares an input only if it does so every time.
    for name, keys in seen.items():
        block = block_of(name, found)
        groups.setdefault((block and block.name, *keys), []).append(name)
    return [*groups.values(), *([ref.name] for ref in selected if ref.name not in seen)]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and afterwards every module back into the mode that it was in.

    Four-bit layers of bitsandbytes are put into training mode, see `eckart.models.kinds.is_four_bit`.
    """
    # By name: holding the modules would keep every layer that is replaced meanwhile in memory.
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    for module in model.modules():
        if is_four_bit(module):
            module.training = True
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)


@contextlib.contextmanager
def only_gradients_of(model: nn.Module, parameters: Iterable[Tensor] = ()) -> Iterator[None]:
    """Let none of the model's parameters record gradients but these; afterwards all are as they were."""
    wanted = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
