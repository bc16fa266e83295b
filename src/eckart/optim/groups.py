"""Parameter groups: which matrices are projected, with which rank, and which parameters decay."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..models.heads import Role, head_axes
from ..models.select import Where, linears

__all__ = ["head_groups", "low_rank_groups"]


def low_rank_groups(
    model: nn.Module, rank: int, where: Where | None = None, *, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups of named parameters for the optimizers of `eckart.optim`.

    Args:
        model: Its trainable parameters are taken, each once.
        rank: r, of the projected matrices.
        where: Which linear maps are projected, see `eckart.models.linears`; None for all in the repeated blocks, so
            that embeddings and heads are trained in full, as in the papers.
        weight_decay: Of everything but biases and norms; None for the optimizer's own.

    Returns:
        The matrices to project, other matrices, and the parameters of other than two axes, which do not decay.

    Raises:
        ValueError: rank below 1, or nothing to project.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))})
        >>> [(group.get("rank"), len(group["params"])) for group in low_rank_groups(model, rank=2)]
        [(2, 2), (None, 2)]
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    chosen = {
        id(ref.module.get_parameter("weight")) for ref in linears(model, where).linears if ref.kind != "structure"
    }
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    projected = [(name, p) for name, p in trained.items() if id(p) in chosen and min(p.shape) > rank]
    small = [name for name, p in trained.items() if id(p) in chosen and min(p.shape) <= rank]
    if not projected:
        raise ValueError(f"no trainable matrix has both sides above the rank {rank}; choose a smaller one")
    if small:
        warnings.warn(
            f"{len(small)} matrices have a side of at most the rank {rank} and are treated as those outside, such as "
            f"{small[0]}",
            stacklevel=2,
        )
    taken = {name for name, _ in projected}
    matrices = [(name, p) for name, p in trained.items() if name not in taken and p.ndim == 2]
    vectors = [(name, p) for name, p in trained.items() if p.ndim != 2]
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": projected, "rank": rank, **decay},
        {"params": matrices, "rank": None, **decay},
        {"params": vectors, "rank": None, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def head_groups(
    model: nn.Module,
    rank: int,
    where: Where | None = None,
    *,
    roles: Sequence[Role] = ("query", "key", "value", "output"),
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Groups as `low_rank_groups` makes them, with the heads of attention marked for `GaLorePlusAdamW`.

    Args:
        model: A transformers model; it runs once on a few tokens, before it is sharded or compiled.
        rank: r, of the projected matrices.
        where: Which linear maps are projected, see `low_rank_groups`.
        roles: Of the projections whose heads share a subspace. Rotations and norms make the heads of queries and keys
            less alike than those of values.
        weight_decay: Of everything but biases and norms; None for the optimizer's own.

    Returns:
        For each side and width of heads a group with ``side`` and ``head_dim``, and the others.

    Raises:
        ValueError: See `low_rank_groups`, or no matrix of one of ``roles`` is projected.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> [(group.get("side"), len(group["params"])) for group in head_groups(model, rank=2)]
        [('right', 6), ('left', 2), (None, 6), (None, 2), (None, 5)]
    """
    projected, *others = low_rank_groups(model, rank, where, weight_decay=weight_decay)
    sides = {
        id(model.get_submodule(found.name).get_parameter("weight")): ("left" if found.axis else "right", found.head_dim)
        for found in head_axes(model)
        if found.role in roles
    }
    marked: dict[tuple[str, int] | None, list[Any]] = {}
    for name, parameter in projected["params"]:
        marked.setdefault(sides.get(id(parameter)), []).append((name, parameter))
    plain = marked.pop(None, [])
    if not marked:
        raise ValueError(
            f"no projected matrix is {', '.join(roles)} of attention alone; use low_rank_groups, or give side and "
            "head_dim by hand"
        )
    heads = [
        {**projected, "params": parameters, "side": mark[0], "head_dim": mark[1]}
        for mark, parameters in marked.items()
        if mark is not None
    ]
    return [*heads, *([{**projected, "params": plain}] if plain else []), *others]
