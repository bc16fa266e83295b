"""Queries, keys and values as attention gets them, after norms and rotations, seen without changing what it computes.

The attention function of a model's configuration stays in use: for the time of the watching its entry in transformers'
table calls it and shows what came in and out, so masks, dropout and soft caps are those of the model.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["AttentionCall", "watching_attention"]


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention.

    Attributes:
        module: The attention module that makes it.
        query: (batch, heads, tokens, width).
        key: (batch, groups, tokens, width); query head i reads key head i // (heads // groups).
        value: (batch, groups, tokens, width of the values).
        output: (batch, tokens, heads, width of the values).
        scaling: What q k^T is multiplied by before the softmax.
        causal: Whether a query reads only itself and what comes before it.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scaling: float
    causal: bool


See = Callable[[AttentionCall], None]

_lock = threading.Lock()
_watchers: dict[object, tuple[frozenset[int], See]] = {}  # modules of a model, and who wants to see their attention
_installed: dict[str, tuple[int, Callable[..., Any] | None]] = {}  # watchers of an entry, and what stood there locally


@contextlib.contextmanager
def watching_attention(model: nn.Module, see: See) -> Iterator[None]:
    """Show every call of attention in a model to ``see``.

    Args:
        model: whose attention goes through `transformers.AttentionInterface`, as in all but a few.
        see: gets each call after it was computed; it must not change the tensors.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=2))
        >>> with watching_attention(model, lambda call: print(tuple(call.key.shape), call.causal)):
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        (1, 2, 3, 2) True
    """
    modules = list(model.modules())
    configs = [c for m in modules if isinstance(c := getattr(m, "config", None), PreTrainedConfig)]
    names = {c._attn_implementation_internal or "eager" for c in configs}
    token = object()
    with _lock:
        _watchers[token] = frozenset(map(id, modules)), see
        for name in names:
            _install(name)
    try:
        yield
    finally:
        with _lock:
            del _watchers[token]
            for name in names:
                _remove(name)


def _install(name: str) -> None:
    """Put a function that shows its calls in the place of one entry of transformers' table, once for all watchers."""
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    count, before = _installed.get(name, (0, local.get(name)))
    _installed[name] = count + 1, before
    if count:
        return
    original = ALL_ATTENTION_FUNCTIONS.get(name)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Eager attention is no entry of the table: each family has its own, in the file of its modules.
        function = original or sys.modules[type(module).__module__].eager_attention_forward
        result = function(module, query, key, value, *args, **kwargs)
        wanted = [see for modules, see in list(_watchers.values()) if id(module) in modules]
        if wanted:
            scaling = kwargs.get("scaling")
            causal = kwargs.get("is_causal")
            call = AttentionCall(
                module,
                query,
                key,
                value,
                result[0],
                query.shape[-1] ** -0.5 if scaling is None else float(scaling),
                bool(getattr(module, "is_causal", True) if causal is None else causal),
            )
            for see in wanted:
                see(call)
        return result

    ALL_ATTENTION_FUNCTIONS[name] = attend


def _remove(name: str) -> None:
    count, before = _installed.pop(name)
    if count > 1:
        _installed[name] = count - 1, before
        return
    del ALL_ATTENTION_FUNCTIONS[name]
    if before is not None:
        ALL_ATTENTION_FUNCTIONS[name] = before
