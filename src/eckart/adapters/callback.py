"""Drives `on_step` of the adapters from transformers' Trainer, and keeps their state in its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from .tuner import EckartModel

__all__ = ["EckartCallback"]


class EckartCallback(TrainerCallback):
    """Tells the adapters of a model about every optimizer step.

    Only methods with a schedule need it; for a loop of your own call ``model.base_model.on_step(step, total)``.

    Example:
        >>> EckartCallback().on_optimizer_step  # doctest: +ELLIPSIS
        <bound method EckartCallback.on_optimizer_step of ...>
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step, while the gradients are there; the Trainer counts the step afterwards."""
        for tuner in _tuners(kwargs["model"]):
            tuner.on_step(state.global_step + 1, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what a resumed run needs beside the adapter."""
        if state.is_world_process_zero:
            for name, tensors in _states(kwargs["model"]):
                if tensors:
                    directory = _checkpoint(args, state)
                    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / _file(name))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read it back where training goes on from a checkpoint."""
        for name, tensors in _states(kwargs["model"]):
            path = _checkpoint(args, state) / _file(name)
            if state.global_step and path.exists():
                tensors.update(load_file(path))


def _tuners(model: torch.nn.Module) -> list[EckartModel]:
    return [module for module in model.modules() if isinstance(module, EckartModel)]


def _states(model: torch.nn.Module) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for tuner in _tuners(model):
        for name, coordinator in tuner.coordinators().items():
            yield name, coordinator.state


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _file(adapter_name: str) -> str:
    return f"eckart_state_{adapter_name}.safetensors"
