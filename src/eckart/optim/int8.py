"""Weights that are stored and trained in eight bits.

    W ≈ diag(s) C,   C (m, n) int8, s (m,),   written back as ⌊W / s + u⌋, u uniform in [0, 1), so that the mean is W

The tensor is torchao's `Int8QuantizedTrainingLinearWeight`, with a scale for each row. Rounding to nearest would leave
a weight where it is while its update is below half of s.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.select import Where, linears

__all__ = ["float_weights", "int8_weights"]


def int8_weights(model: nn.Module, where: Where | None = None) -> list[str]:
    """Store weights in eight bits, to be trained by any optimizer of `eckart.optim`; done before it is made.

    Gradients are as large as before, and the layer computes in the dtype of its input. Scales have the dtype of the
    weights: float32 is best, as the largest weight of a row is 127 scales, and a bfloat16 scale does not follow small
    updates.

    Args:
        model: Changed in place.
        where: Which linear maps, see `eckart.models.linears`; None for all in the repeated blocks.

    Returns:
        Names of the modules.

    Raises:
        ImportError: torchao is missing.
        ValueError: See `eckart.models.linears`.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))})
        >>> int8_weights(model)
        ['layers.0.0', 'layers.1.0']
        >>> model["layers"][0][0].weight.int_data.dtype
        torch.int8
        >>> float_weights(model)
        ['layers.0.0', 'layers.1.0']
    """
    try:
        from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight
    except ImportError as error:
        raise ImportError("weights of eight bits need torchao: pip install 'eckart[quantized]'") from error
    chosen = [ref for ref in linears(model, where).linears if ref.kind == "linear"]
    for ref in chosen:
        weight = ref.module.get_parameter("weight")
        small = Int8QuantizedTrainingLinearWeight.from_float(weight)
        ref.module.weight = nn.Parameter(small, requires_grad=weight.requires_grad)
    return [ref.name for ref in chosen]


def float_weights(model: nn.Module) -> list[str]:
    """Undo `int8_weights`, for saving or for other tools; the weights are the rounded ones.

    Args:
        model: Changed in place.

    Returns:
        Names of the modules.
    """
    found = []
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "int_data"):
            module.weight = nn.Parameter(weight.detach().dequantize(), requires_grad=weight.requires_grad)
            found.append(name)
    return found
