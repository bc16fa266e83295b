"""Whether a model's attention still works when its heads lose coordinates, found by trying it.

Names do not say which coordinates a rotation pairs, or whether a forward takes the width of a head from its weights.
So queries, keys and values are cut on their way, and attention runs.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .geometry import Geometry, remove_geometry, set_geometry
from .groups import evaluating
from .topology import example_inputs

__all__ = ["Heads", "head_coordinates", "rotation_of"]


@dataclass(frozen=True)
class Heads:
    """The four linears of attention, as modules, and the width of a head.

    Attributes:
        module: attention itself.
        query: makes the queries.
        key: makes the keys.
        value: makes the values.
        output: reads the heads.
        head_dim: width of a head.
    """

    module: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    head_dim: int


def head_coordinates(kept: Sequence[int], heads: int, head_dim: int) -> list[int]:
    """The rows of a projection that make these coordinates of every head.

    Example:
        >>> head_coordinates([0, 2], heads=2, head_dim=4)
        [0, 2, 4, 6]
    """
    return [head * head_dim + coordinate for head in range(heads) for coordinate in kept]


def rotation_of(model: nn.Module, attentions: Sequence[Heads]) -> bool | None:
    """Whether queries and keys are rotated, coordinate i with i + head_dim / 2; None if heads cannot lose coordinates.

    Three trials of each attention on a few tokens: all coordinates of queries and keys in reverse (the same output:
    nothing is rotated); the pairs in reverse, and the cosines with them (the same output: they are pairs); half of all
    coordinates gone (the same output as with zeros in their places: no norm, and no scale taken from the width of a
    head, looks at them). On a copy in float64, since the rounding of a deep model would hide small differences.

    Args:
        model: a transformers model for text; it runs once.
        attentions: all of one kind.
    """
    if any(getattr(one.module, "head_dim", None) != one.head_dim for one in attentions):
        return None  # their forward takes the width of a head from elsewhere
    calls = _calls(model, attentions)
    with torch.no_grad():
        found = [_rotation(*_in_double(one, *calls[one.module])) if one.module in calls else None for one in attentions]
    # A layer without positions among those with them may lose pairs too.
    return None if None in found else True in found


def _calls(model: nn.Module, attentions: Sequence[Heads]) -> dict[nn.Module, tuple[Any, Any]]:
    """What each attention is called with: arguments by place and by keyword."""
    calls: dict[nn.Module, tuple[Any, Any]] = {}
    with contextlib.ExitStack() as stack:
        for one in attentions:

            def see(module: nn.Module, args: Any, kwargs: Any) -> None:
                calls[module] = args, kwargs

            stack.callback(one.module.register_forward_pre_hook(see, with_kwargs=True).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        model(**example_inputs(model, tokens=5), **cache)
    return calls


def _in_double(one: Heads, args: Any, kwargs: Any) -> tuple[Heads, Callable[[], Tensor]]:
    """A copy of attention in float64 on the CPU, which not every device knows, and what runs it on these arguments."""
    module = copy.deepcopy(one.module).to("cpu", torch.float64).eval()
    config: Any = getattr(module, "config", None)  # the copy's own
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        config._attn_implementation_internal = "sdpa"  # fused kernels are for half precision
    copies = dict(zip(one.module.modules(), module.modules(), strict=True))
    query, key, value, output = (copies[layer] for layer in (one.query, one.key, one.value, one.output))
    args, kwargs = _double(args), {name: _double(value) for name, value in kwargs.items()}

    def run() -> Tensor:
        made = module(*args, **kwargs)
        found: Tensor = made if isinstance(made, Tensor) else made[0]
        return found

    return Heads(module, query, key, value, output, one.head_dim), run


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
    return tuple(map(_double, value)) if isinstance(value, tuple) else value


def _rotation(one: Heads, run: Callable[[], Tensor]) -> bool | None:
    """`rotation_of` for one attention that ``run`` runs."""
    width, half = one.head_dim, one.head_dim // 2

    def same(kept: list[int], expected: Tensor, *, rotary: bool, values: bool = False) -> bool:
        with _coordinates(one, kept, rotary=rotary, values=values):
            try:
                found = run()
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
                return False  # attention gets its cosines in some other way, or for part of a head only
        # Some steps are in float32 whatever comes in.
        return bool(torch.allclose(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max())))

    whole = run()
    pairs = [*range(half)][::-1]
    if same([*range(width)][::-1], whole, rotary=False):
        rotary, kept = False, list(range(max(1, half)))
    elif width % 2 == 0 and same([*pairs, *(half + pair for pair in pairs)], whole, rotary=True):
        rotary, kept = True, [i for i in range(width) if i % half < max(1, half // 2)]
    else:
        return None
    with contextlib.ExitStack() as stack:
        for layer in (one.query, one.key, one.value):
            stack.callback(layer.register_forward_hook(_blank(kept, width)).remove)
        zeros = run()
    return rotary if same(kept, zeros, rotary=rotary, values=True) else None


@contextlib.contextmanager
def _coordinates(one: Heads, kept: list[int], *, rotary: bool, values: bool) -> Iterator[None]:
    """For a while, heads have these coordinates only, of queries and keys, and of values if ``values``."""
    narrow = Geometry({"head_dim": len(kept)} if values else {}, rotary=tuple(kept) if rotary else None)
    with contextlib.ExitStack() as stack:
        set_geometry(one.module, narrow)
        stack.callback(_restore, one)
        for layer in (one.query, one.key, *([one.value] if values else [])):
            stack.callback(layer.register_forward_hook(_cut(kept, one.head_dim)).remove)
        if values:
            stack.callback(one.output.register_forward_pre_hook(_fill(kept, one.head_dim)).remove)
        yield


def _restore(one: Heads) -> None:
    remove_geometry(one.module)
    one.module.head_dim = one.head_dim  # type: ignore[assignment]


def _cut(kept: list[int], head_dim: int) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        heads = output.unflatten(-1, (-1, head_dim))
        return heads[..., kept].flatten(-2)

    return hook


def _blank(kept: list[int], head_dim: int) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        mask = output.new_zeros(head_dim)
        mask[kept] = 1
        return (output.unflatten(-1, (-1, head_dim)) * mask).flatten(-2)

    return hook


def _fill(kept: list[int], head_dim: int) -> Callable[..., tuple[Tensor]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        heads = args[0].unflatten(-1, (-1, len(kept)))
        whole = heads.new_zeros(*heads.shape[:-1], head_dim)
        whole[..., kept] = heads
        return (whole.flatten(-2),)

    return hook
