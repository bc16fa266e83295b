"""Gradients of attention's projections as thin factors, one example at a time; no gradient of a weight is formed.

dL/dW = D^T X        W (m, n);  D (T, m) gradients of the outputs, X (T, n) inputs, one row a token
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..structures.base import wide
from .attention import Rows, attention_projections
from .groups import only_gradients_of
from .heads import Role
from .select import Where, linears
from .sublayers import sublayers
from .topology import block_of, blocks

__all__ = [
    "AttentionPart",
    "Factors",
    "attention_parts",
    "gradient_factors",
    "in_float32",
    "neighbours",
]

Factors = tuple[Tensor, Tensor]
_PARTNER: dict[Role, Role] = {"query": "output", "output": "query", "key": "value", "value": "key"}


@dataclass(frozen=True)
class AttentionPart:
    """One of the four projections of an attention, which may be rows of a fused layer.

    Attributes:
        name: Full name of the linear map.
        role: "query", "key", "value" or "output".
        rows: Those of W (out, in) that belong to it, as ranges [start, stop).
        inputs: Columns of W.
        attention: Which attention, as (list of blocks, number within the block, number of the block).
    """

    name: str
    role: Role
    rows: Rows
    inputs: int
    attention: tuple[str, int, int]

    @property
    def outputs(self) -> int:
        """How many rows."""
        return sum(stop - start for start, stop in self.rows)


def attention_parts(model: nn.Module, where: Where | None = None) -> list[AttentionPart]:
    """The projections of every attention in the repeated blocks, by what attention reads and what it writes.

    Args:
        model: A transformers model.
        where: Which linear maps, as in :func:`~eckart.models.linears`; all by default.

    Returns:
        Attention by attention in the order of execution: queries, keys, values and output.

    Raises:
        ValueError: ``where`` matches nothing, or there is no projection among what is selected.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=2))
        >>> for part in attention_parts(model): print(part.role, part.name, part.rows)
        query transformer.h.0.attn.c_attn ((0, 4),)
        key transformer.h.0.attn.c_attn ((4, 8),)
        value transformer.h.0.attn.c_attn ((8, 12),)
        output transformer.h.0.attn.c_proj ((0, 4),)
    """
    selected = {ref.name: ref for ref in linears(model, where, quantized=True).linears}
    found, every = blocks(model), [ref.name for ref in linears(model, quantized=True).linears]
    home = {name: block for name in {*every, *selected} if (block := block_of(name, found)) is not None}
    number = {block.name: int(block.name.rpartition(".")[2]) for block in found}
    readers: dict[tuple[str, str], list[tuple[str, Role, Rows]]] = {}  # by block, and by the module around them
    for one in attention_projections(model):
        if one.name in home:
            key = home[one.name].name, one.name.rpartition(".")[0]
            rows: dict[Role, Rows] = {"query": one.query, "key": one.key, "value": one.value}
            readers.setdefault(key, []).extend((one.name, role, part) for role, part in rows.items() if part)
    writers: dict[str, list[str]] = {}
    for part in sublayers(model, every):
        if part.kind != "mlp":
            writers.setdefault(home[part.output].name, []).append(part.output)
    parts: list[AttentionPart] = []
    seen: dict[str, int] = {}
    for (around, _), group in readers.items():
        index = seen[around] = seen.get(around, -1) + 1
        if index < len(writers.get(around, [])):
            output = writers[around][index]
            whole = ((0, selected[output].out_features),) if output in selected else ()
            group = [*group, (output, "output", whole)]
        place = home[group[0][0]].list_name, index, number[around]
        parts += [
            AttentionPart(name, role, rows, selected[name].in_features, place)
            for name, role, rows in group
            if name in selected
        ]
    if not parts:
        raise ValueError(
            f"no projection of an attention is among the chosen layers of {type(model).__name__}; "
            "choose others with where"
        )
    return parts


def neighbours(parts: Sequence[AttentionPart]) -> list[tuple[int | None, int | None]]:
    """Of each part the place of its partner (queries and output, keys and values) and of its like in the next block."""
    at = {(part.role, *part.attention): i for i, part in enumerate(parts)}
    found: list[tuple[int | None, int | None]] = []
    for part in parts:
        stack, index, block = part.attention
        found.append((at.get((_PARTNER[part.role], stack, index, block)), at.get((part.role, stack, index, block + 1))))
    return found


def gradient_factors(
    model: nn.Module, parts: Sequence[AttentionPart], batch: Mapping[str, Tensor]
) -> tuple[float, list[Factors]]:
    """One example's loss, and of each projection D and X, so that the gradient of its rows of W is D^T X.

    The weights may be frozen or quantized: gradients run through the layers and not into them.

    Args:
        model: A transformers model that returns its own loss.
        parts: From :func:`attention_parts`.
        batch: One example with labels.

    Returns:
        The loss, and (T, m), (T, n) in the dtype of the activations for each of ``parts``, T rows for every time that
        the layer runs. No rows for a projection that the loss does not depend on.

    Raises:
        ValueError: The model returns no loss, or one that is not finite.
    """
    calls: dict[str, list[Factors]] = {}
    names = {part.name for part in parts}

    def tap(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        y = y if y.requires_grad else y.detach().requires_grad_()
        calls.setdefault(name, []).append((x.detach(), y))
        return y.clone()  # what follows may be done in place, and then y would be something else

    handles = [model.get_submodule(name).register_forward_hook(partial(tap, name), with_kwargs=True) for name in names]
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        with torch.inference_mode(False), torch.enable_grad(), only_gradients_of(model):
            inputs = {key: wide(t) if t.is_floating_point() else t for key, t in batch.items()}
            loss = getattr(model(**inputs, **extra), "loss", None)
            if loss is None:
                raise ValueError(f"{type(model).__name__} returned no loss; give batches with `labels`")
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss of {type(model).__name__} is {float(loss.detach())}; check the labels")
            taps = [y for name in calls for _, y in calls[name]]
            grads = iter(torch.autograd.grad(loss, taps, allow_unused=True))
    finally:
        for handle in handles:
            handle.remove()
    whole: dict[str, list[Factors]] = {}
    for name, pairs in calls.items():
        for (x, _), grad in zip(pairs, grads, strict=False):
            if grad is not None:
                whole.setdefault(name, []).append((_flat(grad), _flat(x)))
    return float(loss.detach()), [_of(part, whole.get(part.name, []), loss) for part in parts]


def _of(part: AttentionPart, pairs: list[Factors], like: Tensor) -> Factors:
    if not pairs:
        return like.new_zeros(0, part.outputs), like.new_zeros(0, part.inputs)
    d, x = (torch.cat(sides) if len(sides) > 1 else sides[0] for sides in zip(*pairs, strict=True))
    taken = [d[:, start:stop] for start, stop in part.rows]
    return (torch.cat(taken, dim=1) if len(taken) > 1 else taken[0]), x


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model of half precision compute in float32; afterwards it has its very tensors back.

    Its memory trebles meanwhile: the originals stay, and float32 takes twice their size.
    """
    half = (torch.float16, torch.bfloat16)
    parameters = [(p, p.data) for p in model.parameters() if p.dtype in half]
    buffers = [(m, key, b) for m in model.modules() for key, b in m._buffers.items() if b is not None]
    buffers = [(module, key, buffer) for module, key, buffer in buffers if buffer.dtype in half]
    try:
        for parameter, data in parameters:
            parameter.data = data.float()
        for module, key, buffer in buffers:
            module._buffers[key] = buffer.float()
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, key, buffer in buffers:
            module._buffers[key] = buffer
