"""Parameter groups: which matrices are projected, with which rank, and which parameters decay."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..models.select import Where, linears

__all__ = ["low_rank_groups"]


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
            f"{len(small)} matrices have a side of at most the rank {rank} and are trained with dense moments, such as "
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
