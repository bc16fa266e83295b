"""What a model would answer without its adapters: the pretrained model, for methods that stay near it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..models.kinds import is_four_bit

__all__ = ["reference_output"]


def reference_output(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Output of a model with every adapter off, in evaluation mode and without gradients.

    The model's ``forward`` is run itself, not its hooks, so this may be called from one of them. Modules trained and
    saved whole, such as a head, answer as they were at the start too. Everything is put back, also after an error.

    Args:
        model: The model inside the tuner.
        args: Its positional arguments.
        kwargs: Its keyword arguments. Labels are left out, for no loss is wanted, except for an encoder-decoder, which
            makes the input of its decoder of them.

    Raises:
        ValueError: The adapters are merged into the weights, or a cache is given, which this pass would write into.
    """
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise ValueError("the adapters are merged into the weights, where nothing trains them; unmerge_adapter() first")
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "the model is run once more without adapters, which would write into past_key_values; train without them"
        )
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
    with torch.no_grad(), _pretrained(model):
        output = model.forward(*args, **kwargs)
    # In torch 2.9 autocast keeps the weights it has rounded here, with no way back for the gradients of the next pass.
    torch.clear_autocast_cache()
    return output


@contextmanager
def _pretrained(model: nn.Module) -> Iterator[None]:
    """Adapters off and evaluation mode, for the time of a forward pass."""
    modes = {module: module.training for module in model.modules()}
    switches = {
        module: module._disable_adapters
        for module in modes
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    try:
        for module in modes:
            # Run in evaluation mode, bitsandbytes reorders four-bit weights so that no gradient passes any more.
            module.training = module.training and is_four_bit(module)
        for module in switches:
            module._disable_adapters = True  # enable_adapters(False) would also change what asks for gradients
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, switch in switches.items():
            module._disable_adapters = switch
