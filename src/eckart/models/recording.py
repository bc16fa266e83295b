"""One prompt's forward pass with its graph: input embeddings, the state before every block, and the last output."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .additive import additive
from .backbone import backbone_blocks, pretrained_models
from .detach import Gating, detached
from .evaluate import check_context, is_causal
from .groups import evaluating, only_gradients_of
from .kinds import is_norm

__all__ = ["Recording", "input_table", "output_scores", "recorded", "rewritten"]


@dataclass(frozen=True)
class Recording:
    """Tensors of one prompt of T tokens, all in one graph of autograd.

    Attributes:
        embeddings: (T, d) what the ids were looked up as.
        states: (1, T, d) each: what enters every block, and what leaves the last.
        output: (d,) the hidden state of the last token, after the final norm.
        additive: What was added on the way, see `eckart.models.additive`.
    """

    embeddings: Tensor
    states: list[Tensor]
    output: Tensor
    additive: list[nn.Parameter]


@contextlib.contextmanager
def recorded(model: nn.Module, ids: Tensor, gating: Gating | None = "gate") -> Iterator[Recording]:
    """Run a prompt, in eval mode and without a cache, and keep the graph while the block lasts.

    Memory: the activations of one pass, and the attention weights, T^2 a head and layer.

    Args:
        model: A causal language model of transformers, or one with such a model in it.
        ids: (T,) token ids, no padding.
        gating: Gradients as in :func:`~eckart.models.detach.detached`; None for the ordinary ones.

    Raises:
        ValueError: Not a causal language model that takes embeddings, or more tokens than its context.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=2))
        >>> with recorded(model, torch.tensor([1, 2, 3])) as found:
        ...     print(found.embeddings.shape, len(found.states), found.output.shape)
        torch.Size([3, 4]) 3 torch.Size([4])
    """
    whole = _language_model(model)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"ids must be one prompt, (tokens,) and not empty, not {tuple(ids.shape)}")
    check_context(whole, len(ids))
    backbone: Any = whole.base_model
    accepted = inspect.signature(backbone.forward).parameters
    if "inputs_embeds" not in accepted:
        raise ValueError(f"{type(backbone).__name__} takes no inputs_embeds, so no gradients for embeddings")
    found = backbone_blocks(model)
    entering: dict[str, Tensor] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        entering[""] = output if isinstance(output, Tensor) else output[0]

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(only_gradients_of(model, added := additive(model)))
        with contextlib.ExitStack() as passing:
            e = whole.get_input_embeddings()(ids.to(whole.device)).detach().requires_grad_()
            for block in found:
                handle = block.module.register_forward_pre_hook(enter(block.name), with_kwargs=True)
                passing.callback(handle.remove)
            passing.callback(found[-1].module.register_forward_hook(leave).remove)
            # Fused attention has no second derivative, which products with the Jacobian are made of.
            passing.enter_context(detached(model, gating) if gating else sdpa_kernel(SDPBackend.MATH))
            output = backbone(inputs_embeds=e[None], **({"use_cache": False} if "use_cache" in accepted else {}))
        states = [*(entering[block.name] for block in found), entering[""]]
        yield Recording(e, states, output.last_hidden_state[0, -1], added)


@contextlib.contextmanager
def rewritten(model: nn.Module, layer: int, function: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let ``function`` of the input embeddings and the hidden states, each (batch, T, d), enter block ``layer``.

    Every pass has to see its whole input: no cache.

    Raises:
        ValueError: There is no such block.
    """
    found = backbone_blocks(model)
    if not 0 <= layer < len(found):
        raise ValueError(f"layer must be from 0 to {len(found) - 1}, not {layer}")
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[:] = [output]

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (function(seen[0], args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": function(seen[0], kwargs["hidden_states"])}

    embeddings: nn.Module = _language_model(model).get_input_embeddings()
    handles = [
        embeddings.register_forward_hook(look),
        found[layer].module.register_forward_pre_hook(replace, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def output_scores(model: nn.Module, vectors: Tensor, *, final: bool = True) -> Tensor:
    """What the head makes of hidden states (n, d), without its bias: (n, vocabulary).

    Args:
        model: With a head.
        vectors: (n, d).
        final: Whether they are behind the final norm already; else they go through it.

    Raises:
        ValueError: There is no head.
    """
    whole = _language_model(model)
    head: Any = whole.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(whole).__name__} has no head to decode with; load it as a causal language model")
    norms = [child for child in whole.base_model.children() if is_norm(child)]
    vectors = vectors.to(whole.get_input_embeddings().weight)
    x = vectors if final or not norms else norms[-1](vectors)
    scores: Tensor = head(x) - head(torch.zeros_like(x))
    return scores


def input_table(model: nn.Module) -> Tensor:
    """The input embeddings, (vocabulary, d)."""
    weight: Tensor = _language_model(model).get_input_embeddings().weight
    return weight.detach()


def _language_model(model: nn.Module) -> Any:
    found = list(pretrained_models(model).values())
    if not found or not is_causal(found[0]) or not backbone_blocks(model):
        raise ValueError(f"{type(model).__name__} is no causal language model, which predicts from a prompt")
    return found[0]
