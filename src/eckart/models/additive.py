"""What a model adds to its hidden states whatever its inputs are."""

from __future__ import annotations

from torch import nn

from .backbone import pretrained_models

__all__ = ["additive"]


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
