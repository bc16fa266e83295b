"""Drives `on_step` of the adapters from transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .tuner import EckartModel

__all__ = ["EckartCallback"]


class EckartCallback(TrainerCallback):
    """Tells the adapters of a model about every optimizer step.

    Only methods with a schedule need it; for a loop of your own call ``model.base_model.on_step(step, total)``.

    Example:
        >>> EckartCallback().on_step_end  # doctest: +ELLIPSIS
        <bound method EckartCallback.on_step_end of ...>
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        for module in kwargs["model"].modules():
            if isinstance(module, EckartModel):
                module.on_step(state.global_step, state.max_steps)
