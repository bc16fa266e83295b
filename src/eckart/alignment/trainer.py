"""A regulariser in transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..models.cut import recorded
from .contract import RegularizerMethod

__all__ = ["RegularizedTrainer"]


class RegularizedTrainer(transformers.Trainer):
    """The Trainer, with a penalty added to its loss in training; evaluation is as it was.

    The pass of the loss is used; the penalty adds one run to the cut and one of the whole model a probe. What is drawn
    depends on the seed of the arguments, the step and the batch within it alone, so a resumed run goes on alike. Logs
    have "penalty", the last one. Padding counts for nothing.

    Args:
        method: The penalty.
        cut: Name of the module of which the output is z, such as "model.layers.3".
        source: Name of the module of which the output is x; None for the input embeddings.
        arguments: Of the Trainer.

    Raises:
        ValueError: The model has no such module, or no input embeddings.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from eckart.alignment import JacobianNuclearNorm
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), report_to="none")
        >>> trainer = RegularizedTrainer(method=JacobianNuclearNorm(eta=1e-4), cut="model.layers.0",
        ...                              model=LlamaForCausalLM(config), args=arguments)
    """

    def __init__(self, *, method: RegularizerMethod, cut: str, source: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.method, self.cut, self.source = method, cut, source
        for name in filter(None, (cut, source)):
            if name not in dict(self.accelerator.unwrap_model(self.model).named_modules()):
                raise ValueError(f"{type(self.model).__name__} has no module {name!r}; see its named_modules()")
        self._last: float | None = None
        self._drawn = (-1, 0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss and, in training, the penalty."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain = self.accelerator.unwrap_model(model)
        with recorded(plain, self.cut, inputs, self.source) as finish:
            loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        cut, x = finish(outputs)
        found = self.method.penalty(cut, x, self._generator(), self._mask(inputs, x))
        self._last = float(found.value.detach())
        value = found.value
        if self._loss_is_over_all_batches(num_items_in_batch):
            value = value / self.current_gradient_accumulation_steps
        loss = loss + value.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """The Trainer's, with the penalty beside the loss."""
        if "loss" in logs and self._last is not None:
            logs["penalty"] = self._last
        super().log(logs, *arguments, **keywords)

    def _mask(self, inputs: dict[str, Any], x: Tensor) -> Tensor | None:
        mask = inputs.get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.shape == x.shape[:2] else None

    def _generator(self) -> torch.Generator:
        step, batch = self._drawn
        batch = batch + 1 if step == self.state.global_step else 0
        self._drawn = step, batch = self.state.global_step, batch
        mixed = 0
        for number in (self.args.seed, step, batch, self.args.process_index):
            mixed = (mixed * 1_000_003 + number) % (1 << 63)
        return torch.Generator().manual_seed(mixed)

    def _loss_is_over_all_batches(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is divided by the tokens of all accumulated batches already, and not by their number."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or self.compute_loss_func is not None)
