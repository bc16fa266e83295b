"""What the adapters of one name do together: budgets, draws, schedules and losses that span layers.

A method whose layers are independent of one another has none. One that needs optimizer steps to be counted says so
(`Coordinator.counts_steps`); a training loop that forgets to count them is stopped at its second step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .contract import Adapter

__all__ = ["IGNORED_LABEL", "Coordinator"]

IGNORED_LABEL = -100  # of a token that does not count, in all of transformers


class Coordinator:
    """Sees every adapter of one name, before each forward pass and after each optimizer step.

    Args:
        adapters: The adapters by module name, in the order of the model.
        seed: Of the configuration; what is drawn depends on it and on the step only, so that every process and a
            resumed run draw the same.

    Attributes:
        counts_steps: Whether training without `on_step` is an error.
        needs_reference: Whether `observe_reference` is to be called, which costs a forward pass more. The class or
            the instance says so.
        state: Tensors that a resumed run needs and that the adapters do not hold themselves. They go into the
            Trainer's checkpoints, not into a saved adapter.
    """

    counts_steps: ClassVar[bool] = True
    needs_reference: bool = False

    def __init__(self, adapters: Mapping[str, Adapter], seed: int = 0) -> None:
        self.adapters = dict(adapters)
        self.seed = seed
        self.state: dict[str, Tensor] = {}
        self._steps_seen: int | None = None  # versions of the trained tensors when steps were last counted
        self._has_gradients = False

    def before_forward(self, kwargs: dict[str, Any], training: bool) -> None:
        """Called before the model runs; may read its keyword arguments, and take away what is meant for itself."""

    def observe_reference(self, output: Any) -> None:
        """Given the output of the model without adapters for the same batch, before each training forward pass."""

    def observe(self, loss: Tensor) -> None:
        """Given the loss of each training forward pass, before the penalties are added."""

    def observe_output(self, output: Any, kwargs: dict[str, Any]) -> None:
        """Given the output of each training forward pass and what the model was called with, before `penalty`."""

    def penalty(self) -> Tensor | None:
        """A term that is added to the loss, or None."""
        return None

    def on_step(self, step: int, total: int) -> None:
        """Called after optimizer step ``step`` (the first is 1) of ``total``, gradients still in place."""

    def generator(self, step: int) -> torch.Generator:
        """Source of what is drawn for one step, the same in every process."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def check_counted(self) -> None:
        """Stop a training loop that has made an optimizer step without saying so.

        Raises:
            RuntimeError: There were gradients, trained tensors have changed, and `on_step` was not called.
        """
        if not self.counts_steps:
            return
        versions = self._versions()
        if self._steps_seen is None:
            self._steps_seen = versions
        if self._has_gradients and versions != self._steps_seen:
            raise RuntimeError(
                "this adapter changes during training and has to be told of each step: call "
                "model.base_model.on_step(step, total) after optimizer.step() and before zero_grad(), or pass "
                "callbacks=[eckart.adapters.callback.EckartCallback()] to the Trainer"
            )
        self._has_gradients = torch.is_grad_enabled()

    def counted(self) -> None:
        """Note that the step has been told."""
        self._steps_seen, self._has_gradients = self._versions(), False

    def _versions(self) -> int:
        return sum(p._version for adapter in self.adapters.values() for p in adapter.parameters())
