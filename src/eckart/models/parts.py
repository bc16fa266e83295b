"""The parts of a block that can change their inner widths: attention with separate projections, and MLPs.

Found by structure, as everything in this family: roles by where attention reads (`heads.head_axes`), an MLP's inputs
by where they lead, and whether coordinates of a head or inner channels can go by trying it (`trials`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .groups import evaluating
from .heads import HeadAxis, Role, head_axes
from .select import LinearRef, Skipped
from .sublayers import sublayers
from .trials import Heads, rotation_of

__all__ = ["AttentionPart", "MLPPart", "parts"]

_Four = tuple[LinearRef, LinearRef, LinearRef, LinearRef]
_ROLES: tuple[Role, ...] = ("query", "key", "value", "output")


@dataclass(frozen=True)
class AttentionPart:
    """Attention whose queries, keys, values and output have a linear each.

    Attributes:
        name: full name of the module.
        module: the module.
        query: W (heads * head_dim, d).
        key: W (kv_heads * head_dim, d).
        value: W (kv_heads * head_dim, d).
        output: W (d, heads * head_dim).
        head_dim: width of a head.
        rotary: whether queries and keys are rotated, coordinate i with i + head_dim / 2; None if its heads cannot lose
            coordinates, because they are normalised or rotated in another way, say.
    """

    name: str
    module: nn.Module
    query: LinearRef
    key: LinearRef
    value: LinearRef
    output: LinearRef
    head_dim: int
    rotary: bool | None

    @property
    def linears(self) -> tuple[LinearRef, ...]:
        """Its linears: queries, keys, values, output."""
        return self.query, self.key, self.value, self.output

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.out_features // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads; query heads in a row share one."""
        return self.key.out_features // self.head_dim


@dataclass(frozen=True)
class MLPPart:
    """An MLP: y = W_out h, where channel i of h depends on row i of each input linear only.

    Attributes:
        name: full name of the module that holds the linears.
        module: the module.
        inputs: W (width, d): the gate and the up projection, or the only one.
        output: W (d, width).
    """

    name: str
    module: nn.Module
    inputs: tuple[LinearRef, ...]
    output: LinearRef

    @property
    def linears(self) -> tuple[LinearRef, ...]:
        """Its linears: inputs, then the output."""
        return *self.inputs, self.output

    @property
    def width(self) -> int:
        """Number of inner channels."""
        return self.output.in_features


def parts(model: nn.Module, members: Sequence[LinearRef]) -> tuple[list[AttentionPart | MLPPart], list[Skipped]]:
    """The parts that the selected linears make up, in the order of the selection, and the linears that fit in none.

    Args:
        model: a transformers model for text, on a real device.
        members: the selected linears; a part is found only if all its linears are among them.

    Returns:
        The parts, and each linear that is in none with the reason.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from .select import linears
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model = LlamaForCausalLM(config)
        >>> found, left = parts(model, linears(model).linears)
        >>> [(part.name, part.head_dim if isinstance(part, AttentionPart) else part.width) for part in found], left
        ([('model.layers.0.self_attn', 4), ('model.layers.0.mlp', 12)], [])
    """
    refs = {ref.name: ref for ref in members if ref.kind != "structure"}
    found: list[AttentionPart | MLPPart] = [*_attentions(model, refs), *_mlps(model, refs)]
    order = {ref.name: place for place, ref in enumerate(members)}
    found.sort(key=lambda part: min(order[ref.name] for ref in part.linears))
    taken = {ref.name for part in found for ref in part.linears}
    reason = "is no part of attention with separate projections, or of an MLP with separable channels"
    left = [Skipped(ref.name, reason, ref.in_features * ref.out_features) for ref in members if ref.name not in taken]
    return found, left


def _attentions(model: nn.Module, refs: dict[str, LinearRef]) -> list[AttentionPart]:
    holders: dict[str, dict[str, HeadAxis]] = {}
    for axis in head_axes(model):
        holders.setdefault(axis.name.rpartition(".")[0], {})[axis.role] = axis
    kinds: dict[tuple[type[nn.Module], int], list[tuple[str, _Four]]] = {}
    for name, axes in holders.items():
        if set(axes) != {"query", "key", "value", "output"} or any(axis.name not in refs for axis in axes.values()):
            continue
        module, width = model.get_submodule(name), axes["query"].head_dim
        query, key, value, output = (refs[axes[role].name] for role in _ROLES)
        if key.out_features == value.out_features:
            four = (query, key, value, output)
            kinds.setdefault((type(module), width), []).append((name, four))
    found = []
    for (_, width), alike in kinds.items():
        heads = [
            Heads(model.get_submodule(name), query.module, key.module, value.module, output.module, width)
            for name, (query, key, value, output) in alike
        ]
        rotary = rotation_of(model, heads)
        found += [
            AttentionPart(name, model.get_submodule(name), query, key, value, output, width, rotary)
            for name, (query, key, value, output) in alike
        ]
    return found


def _mlps(model: nn.Module, refs: dict[str, LinearRef]) -> list[MLPPart]:
    found = []
    for layer in sublayers(model):
        if layer.kind != "mlp" or layer.output not in refs:
            continue
        output, holder = refs[layer.output], layer.output.rpartition(".")[0]
        inputs = tuple(
            ref
            for name, ref in refs.items()
            if name.rpartition(".")[0] == holder and name != layer.output and ref.out_features == output.in_features
        )
        module = model.get_submodule(holder)
        if inputs and _separable(module, inputs, output):
            found.append(MLPPart(holder, module, inputs, output))
    return found


def _separable(module: nn.Module, inputs: tuple[LinearRef, ...], output: LinearRef) -> bool:
    """Whether the MLP runs with some inner channels only, in another order, and these are as they were among all."""
    weight, width = inputs[0].weight, output.in_features
    kept = list(range(width))[::-2]
    x = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device).reshape(1, 3, -1).to(weight.dtype)
    seen: list[Tensor] = []

    def watch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0])
        return (nn.functional.pad(args[0], (0, width - args[0].shape[-1])),)

    hooks = [output.module.register_forward_pre_hook(watch)]
    try:
        with evaluating(module), torch.no_grad():
            module(x)
            hooks += [ref.module.register_forward_hook(lambda _m, _a, y: y[..., kept]) for ref in inputs]
            module(x)
    except (TypeError, RuntimeError, ValueError):
        return False  # a norm over the channels, say; or more than an MLP: its forward wants more than one tensor
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 2:
        return False
    # Vectorised functions round the last few of a row in another way.
    tolerance = 8 * float(torch.finfo(seen[0].dtype).eps) * float(seen[0].abs().max())
    return bool(torch.allclose(seen[0][..., kept], seen[1], rtol=0, atol=tolerance))
