"""Which axis of which weight of a model is cut into attention heads, and how wide a head is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .attention import Projection, attention_projections
from .select import LinearRef, linears

__all__ = ["HeadAxis", "Role", "head_axes"]

Role = Literal["query", "key", "value", "output"]

_WIDTHS = ("head_dim", "attention_head_size", "head_size")


@dataclass(frozen=True)
class HeadAxis:
    """A linear map whose outputs or inputs are heads side by side.

    Attributes:
        name: full name of the module.
        role: what it makes of or from the heads.
        axis: of the stored weight, that the heads are spread over.
        head_dim: width of a head.
    """

    name: str
    role: Role
    axis: int
    head_dim: int


def head_axes(model: nn.Module, batch: Mapping[str, Any] | None = None) -> list[HeadAxis]:
    """Find the linear maps that belong to one of queries, keys, values and attention's output alone.

    Fused projections are left out: their rows are heads of more than one kind. The output projection is looked for in
    the module that holds the queries' one, by its number of inputs.

    Args:
        model: a transformers model, see :func:`~eckart.models.attention.attention_projections`.
        batch: what to run it on once; default :func:`~eckart.models.example_inputs`, four tokens of text.

    Raises:
        ValueError: there is no example batch for the model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=2))
        >>> for found in head_axes(model): print(found)
        HeadAxis(name='transformer.h.0.attn.c_proj', role='output', axis=0, head_dim=2)
    """
    projections = attention_projections(model, batch)
    refs = {ref.name: ref for ref in linears(model, "*").linears if ref.kind != "structure"}
    taken = {one.name for one in projections}
    found: list[HeadAxis] = []
    for one in projections:
        width = _head_dim(model, one.name)
        if width is None or one.name not in refs:
            continue
        candidates: list[tuple[LinearRef, Role]] = []
        if (role := _only_role(one)) is not None:
            candidates.append((refs[one.name], role))
        if one.query:
            inside = [ref for name, ref in refs.items() if name not in taken and _parent(name) == _parent(one.name)]
            outputs = [ref for ref in inside if ref.in_features == _count(one.query)]
            candidates += [(ref, "output") for ref in outputs if len(outputs) == 1]
        for ref, role in candidates:
            size = ref.in_features if role == "output" else ref.out_features
            if size % width == 0:
                found.append(HeadAxis(ref.name, role, int((role == "output") != (ref.kind == "conv1d")), width))
    return found


def _only_role(one: Projection) -> Role | None:
    """Of which of the three a projection makes heads, if of one, with all its rows."""
    parts: dict[Role, Any] = {"query": one.query, "key": one.key, "value": one.value}
    roles = [role for role, rows in parts.items() if rows]
    return roles[0] if len(roles) == 1 and _count(parts[roles[0]]) == one.out_features else None


def _count(rows: Any) -> int:
    return sum(stop - start for start, stop in rows)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _head_dim(model: nn.Module, name: str) -> int | None:
    """The width of a head, as the nearest module around a projection states it, or its configuration."""
    while name:
        name = _parent(name)
        module = model.get_submodule(name)
        config = getattr(module, "config", None)
        for holder in (module, config):
            for key in _WIDTHS:
                if isinstance(width := getattr(holder, key, None), int):
                    return width
        heads, size = (getattr(config, key, None) for key in ("num_attention_heads", "hidden_size"))
        if isinstance(heads, int) and isinstance(size, int):
            return size // heads
    return None
