"""Any of the optimizers in transformers' Trainer."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .. import catalog
from ..models.select import Where
from .groups import low_rank_groups
from .optimizer import ProjectedOptimizer

__all__ = ["for_trainer", "optimizer_class"]


def optimizer_class(method: str, *, bits: int | None = None) -> type[ProjectedOptimizer]:
    """The optimizer class of a method's name in the catalog, `GaLoreAdamW` for "galore".

    Args:
        method: Name in the catalog.
        bits: 32 or 8, of the moments; None for the method's own, 32 in most.

    Raises:
        UnknownMethodError: No optimizer of that name.

    Example:
        >>> optimizer_class("galore").__name__
        'GaLoreAdamW'
    """
    found = catalog.get(method, family="optim").load()
    module = sys.modules[found.__module__]
    wanted = found.bits if bits is None else bits
    classes = [getattr(module, name) for name in module.__all__]
    (one,) = [
        kind
        for kind in classes
        if isinstance(kind, type)
        and issubclass(kind, ProjectedOptimizer)
        and kind.method is found
        and kind.options.keys() <= {"bits"}
        and kind.options.get("bits", found.bits) == wanted
    ]
    return one


def for_trainer(
    method: str, model: nn.Module, rank: int, where: Where | None = None, *, lr: float = 1e-2, **options: Any
) -> tuple[type[ProjectedOptimizer], dict[str, Any]]:
    """What `transformers.Trainer(optimizer_cls_and_kwargs=...)` takes.

    Args:
        method: Name in the catalog, such as "galore".
        model: The one that is trained; its linear maps are told from embeddings and heads.
        rank: r.
        where: Which linear maps, see `low_rank_groups`.
        lr: Peak learning rate; the Trainer's own arguments do not reach an optimizer given in this way.
        **options: Of the optimizer.

    Raises:
        UnknownMethodError: No optimizer of that name.
        ValueError: See `low_rank_groups`.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))})
        >>> kind, keywords = for_trainer("galore", model, rank=2, lr=0.01)
        >>> kind.__name__, keywords["lr"]
        ('GaLoreAdamW', 0.01)
    """
    return optimizer_class(method), {"params": low_rank_groups(model, rank, where), "lr": lr, **options}
