"""Fine-tuning a compressed model through its factors alone: the second half of WeLore.

    W ≈ B A (m, n) in the layers that compression has factored: B and A are trained;   all other weights stay

A. Jaiswal, L. Yin, Z. Zhang, S. Liu, J. Zhao, Y. Tian, Z. Wang, "From GaLore to WeLore: How Low-Rank Weights
Non-uniformly Emerge from Low-Rank Gradients", 2024, arXiv:2407.11239. Code: github.com/VITA-Group/WeLore. Which layers
are factored, and to which rank, is the first half and belongs to compression: any method and any allocation of ranks
will do. The norms are trained as in the official code; they are a small part.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.structured import norm_parameters, only_gradients_for, structured_parameters

__all__ = ["factor_groups"]


def factor_groups(model: nn.Module, *, norms: bool = True, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Freeze a compressed model but for its structured layers, and give groups of named parameters to train.

    For any optimizer; those of this package train the factors with dense moments, which are small already.

    Args:
        model: With structured layers, such as `eckart.compress` and `eckart.load` give. ``requires_grad`` of every
            parameter is set.
        norms: Whether the parameters of norms are trained too.
        weight_decay: Of the factors; None for the optimizer's own.

    Returns:
        The factors and biases of structured layers, and the norms, which do not decay.

    Raises:
        ValueError: No layer is structured; nothing is changed.

    Example:
        >>> import torch
        >>> from eckart.models import replace
        >>> from eckart.structures import LowRank
        >>> model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
        >>> _ = replace(model, "a", LowRank.from_factors(torch.ones(8, 2), torch.ones(2, 8), form="plain"))
        >>> [[name for name, _ in group["params"]] for group in factor_groups(model)]
        [['a.up_transposed', 'a.down_transposed'], ['norm.weight', 'norm.bias']]
        >>> model["b"].weight.requires_grad
        False
    """
    structured, scales = structured_parameters(model), norm_parameters(model) if norms else {}
    only_gradients_for(model, [*structured.values(), *scales.values()])
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": list(structured.items()), "rank": None, **decay},
        {"params": list(scales.items()), "rank": None, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
