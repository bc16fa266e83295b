"""What a model adds to its hidden states whatever its inputs are, and gradients by that alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .backbone import pretrained_models

__all__ = ["additive", "only_additive"]


def additive(model: nn.Module) -> list[nn.Parameter]:
    """What a model adds to its hidden states: biases, and embeddings other than those of its inputs.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> [name for name, p in model.named_parameters() if any(p is one for one in additive(model))][:3]
        ['wpe.weight', 'h.0.ln_1.bias', 'h.0.attn.c_attn.bias']
    """
    inputs = {id(one.get_input_embeddings()) for one in pretrained_models(model).values()}
    found = {
        id(p): p
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if p.is_floating_point()
        and (name.endswith("bias") or (isinstance(module, nn.Embedding) and id(module) not in inputs))
    }
    return list(found.values())


@contextlib.contextmanager
def only_additive(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let no parameter record gradients but those of :func:`additive`, which are given; restored afterwards."""
    found = additive(model)
    wanted = {id(p) for p in found}
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            if p.is_floating_point():
                p.requires_grad_(id(p) in wanted)
        yield found
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
