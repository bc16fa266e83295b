"""What each attention head reads from the residual stream and writes to it, as thin matrices.

    q = Q x,  k = K x,  v = V x   (h, d) each,   added to the stream: O v,   O (d, h)

Norm gains between the stream and the projections, at the heads, and between the output projection and the stream are
folded in. Where a norm takes the mean away (LayerNorm), rows of Q, K, V and columns of O are centred: the direction of
all ones carries nothing there. Biases are left out: they are constants that no head can change.

Nothing is known by name. The model runs once on a small batch; what attention is given and gives must be what the thin
matrices say, up to a length for each token and head (norms) and a rotation of queries and keys by position, which is
measured. A layer for which it is not is left out with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import is_adapted
from .attention import Projection, attention_projections
from .attention_states import AttentionCall, watching_attention
from .groups import evaluating
from .head_layer import PARTS, HeadLayer, HeadMaps, Part
from .head_rotation import find_rotation
from .kinds import is_norm
from .norm_gain import norm_gain
from .select import LinearRef, Where, linears
from .sublayers import sublayers
from .topology import block_of, blocks, example_inputs, same_input

__all__ = ["HeadLayer", "HeadMaps", "attention_layers"]


def attention_layers(
    model: nn.Module, where: Where | None = None, batch: Mapping[str, Any] | None = None
) -> tuple[list[HeadLayer], dict[str, str]]:
    """Find the self-attention layers of a model whose heads are linear maps of one residual stream.

    Args:
        model: a transformers model, see :func:`~eckart.models.attention.attention_projections`.
        where: take the layers whose output projection this selects, as in :func:`~eckart.models.linears`.
        batch: what to run it on; default :func:`~eckart.models.example_inputs`.

    Returns:
        The layers in the order of execution, and the reason for each that was left out, by name.

    Raises:
        ValueError: there is no layer to be had, with the reason; or the model has adapters.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
        ...                                      num_attention_heads=4, num_key_value_heads=2))
        >>> [layer], _ = attention_layers(model)
        >>> layer.name, tuple(layer.maps().key.shape), layer.rotation.pairing
        ('model.layers.0.self_attn.o_proj', (2, 2, 8), 'half')
    """
    if is_adapted(model):
        raise ValueError("heads are read from plain weights, and the model has adapters; merge_and_unload() first")
    inputs = example_inputs(model) if batch is None else batch
    ends, own = _ends(model, inputs), {ref.name for ref in linears(model, where).linears}
    refs = {ref.name: ref for ref in linears(model, "*", quantized=False).linears}
    seen = _run(model, inputs, {name for end in ends for name in end.names})
    found: list[HeadLayer] = []
    reasons: dict[str, str] = {}
    for end in ends:
        if end.output not in own:
            continue
        made = end.reason or _layer(end, refs, seen)
        if isinstance(made, str):
            reasons[end.output] = made
        else:
            found.append(made)
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no attention was seen"
        raise ValueError(f"{type(model).__name__} has no attention heads that can be read as thin maps ({why})")
    return found, reasons


@dataclass
class _End:
    """A sub-layer of attention: its output projection and what feeds it."""

    output: str
    stack: str
    projections: dict[Part, Projection]
    reason: str = ""

    @property
    def names(self) -> list[str]:
        return [self.output, *(one.name for one in self.projections.values())]


def _ends(model: nn.Module, inputs: Mapping[str, Any]) -> list[_End]:
    """The attention sub-layers of all blocks, each with its projections, both in the order of execution."""
    found = blocks(model)
    calls: dict[str, list[list[Projection]]] = {}
    for one in attention_projections(model, inputs):
        block = block_of(one.name, found)
        if block is not None:
            own = calls.setdefault(block.name, [])
            if one.query or not own:
                own.append([])
            own[-1].append(one)
    parts = [part for part in sublayers(model, batch=inputs) if part.kind != "mlp"]
    ends: list[_End] = []
    for block in found:
        here = [part for part in parts if block_of(part.output, [block])]
        own = calls.get(block.name, [])
        for index, part in enumerate(here):
            end = _End(part.output, block.list_name, {})
            if len(own) != len(here):
                end.reason = "its queries, keys and values were not found"
            elif part.kind == "cross-attention":
                end.reason = "it reads another stream"
            else:
                for role in PARTS:
                    makers = [one for one in own[index] if getattr(one, role)]
                    if len(makers) == 1:
                        end.projections[role] = makers[0]
                if len(end.projections) < len(PARTS) or any(one.overlaps for one in own[index]):
                    end.reason = "its queries, keys or values are not each made by rows of one linear map"
            ends.append(end)
    return ends


@dataclass
class _Seen:
    """What went through a model: inputs and outputs of linear maps and norms, and the calls of attention."""

    linear: dict[str, tuple[Tensor, Tensor]]
    norms: list[tuple[nn.Module, Tensor, Tensor]]
    calls: list[AttentionCall]


def _run(model: nn.Module, inputs: Mapping[str, Any], names: set[str]) -> _Seen:
    seen = _Seen({}, [], [])

    def linear(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            seen.linear[name] = (args[0] if args else next(iter(kwargs.values())), output)

        return hook

    def norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, Tensor):
            seen.norms.append((module, x, output))

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            hook = linear(name) if name in names else norm if is_norm(module) else None
            if hook is not None:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())  # after it: leaving inference mode turns gradients on
        stack.enter_context(watching_attention(model, seen.calls.append))
        model(**inputs)
    return seen


def _layer(end: _End, refs: Mapping[str, LinearRef], seen: _Seen) -> HeadLayer | str:
    """A layer that is what its attention was seen to be, or why it is not."""
    if missing := [name for name in end.names if name not in refs or name not in seen.linear]:
        return f"{missing[0]} is not a plain linear map that ran"
    output, (given, written) = refs[end.output], seen.linear[end.output]
    call = next((one for one in seen.calls if one.output.shape[:2] == given.shape[:2] and _equal(one, given)), None)
    if call is None:
        return "something comes between attention and its output projection"
    projections = {part: (refs[one.name], _rows(getattr(one, part))) for part, one in end.projections.items()}
    if any(ref.in_features != output.out_features for ref, _ in projections.values()):
        return "it does not read the residual stream itself"
    reads, at_heads, turned = {}, {}, {}
    for part, (ref, rows) in projections.items():
        x, y = seen.linear[ref.name]
        reads[part] = next((norm_gain(m, ref.in_features) for m, _, out in seen.norms if same_input(out, x)), None)
        gain = next((g for m, a, _ in seen.norms if (g := _head_gain(m, a, y, rows)) is not None), None)
        if gain is not None:
            at_heads[part] = gain
        state: Tensor = getattr(call, part)
        # Not y itself, in which a hook may have had a hand.
        made = nn.functional.linear(x, ref.weight.detach()[rows.to(x.device)]).double()
        if ref.bias is not None:
            made = made + ref.bias.detach()[rows.to(x.device)]
        pre = made.unflatten(-1, (-1, state.shape[-1]))
        if gain is not None:
            pre = pre * gain.to(pre).view(-1, state.shape[-1])
        turned[part] = pre, state.transpose(1, 2)[:, :, :: max(1, state.shape[1] // pre.shape[2])].double()
    loose = 1e-3 if call.query.element_size() > 2 else 0.05
    if any(pre.shape != post.shape for pre, post in turned.values()) or not _same(*turned["value"], loose):
        return "attention is not given what its projections make"
    turning = [turned["query"], turned["key"]]
    rotation = None
    if not all(_same(*pair, loose, scaled=True) for pair in turning):
        rotation = find_rotation(turning, loose)
        if rotation is None:
            return "its queries and keys are no rotations by position of what its projections make"
    after = next((norm_gain(m, output.out_features) for m, x, _ in seen.norms if same_input(x, written)), None)
    if after is not None and after[1]:
        return "what it writes is centred by a norm of its own"
    first = reads["query"]
    return HeadLayer(
        end.output,
        end.stack,
        output,
        call.query.shape[1],
        turned["key"][0].shape[2],
        output.out_features,
        rotation,
        first is not None and first[1],
        None if after is None else after[0],
        projections,
        reads,
        at_heads,
    )


def _equal(call: AttentionCall, given: Tensor) -> bool:
    flat = call.output.flatten(2)
    return flat.shape == given.shape and torch.equal(flat, given)


def _same(pre: Tensor, post: Tensor, loose: float, scaled: bool = False) -> bool:
    """Whether two (batch, tokens, heads, width) are equal, up to a length for each token and head if ``scaled``."""
    if scaled:
        pre = pre * (post.norm(dim=-1, keepdim=True) / pre.norm(dim=-1, keepdim=True).clamp(min=1e-30))
    return bool((post - pre).norm() <= loose * post.norm())


def _rows(ranges: Any) -> Tensor:
    return torch.cat([torch.arange(*ends) for ends in ranges])


def _head_gain(norm: nn.Module, x: Tensor, made: Tensor, rows: Tensor) -> Tensor | None:
    """The gain of a norm that reads these rows of what a projection made, if it does: a part of the same memory."""
    if x.untyped_storage()._cdata != made.untyped_storage()._cdata:
        return None
    start = (x.storage_offset() - made.storage_offset()) % made.shape[-1]
    if start not in rows or x.shape[-1] not in (len(rows), *_divisors(len(rows))):
        return None
    gain, centred = norm_gain(norm, x.shape[-1])
    return None if centred else gain.flatten()


def _divisors(size: int) -> list[int]:
    return [one for one in range(1, size) if size % one == 0]
