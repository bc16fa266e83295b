"""Train an adapter with transformers' Trainer, and say what it cost and gained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.answers import Example
from ..models.training import Schedule, Trained
from ..models.training import train as train_model
from .callback import EckartCallback
from .config import EckartConfig

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["train"]


def train(
    model: PeftModel,
    tokenizer: Any,
    examples: Sequence[Example],
    workspace: str | Path,
    schedule: Schedule,
    *,
    held_out: Sequence[Example] = (),
    resume: bool = False,
    progress: bool = True,
) -> Trained:
    """Train the active adapter; see `eckart.models.training.train`.

    Args:
        model: What `eckart.adapt` gave.
        tokenizer: Its padding token fills up short examples.
        examples: What to learn, see `eckart.models.answers`.
        workspace: Directory for the Trainer's checkpoints and logs.
        schedule: How.
        held_out: Examples to measure the loss on; the first 64 training ones if there are none.
        resume: Go on from the last checkpoint in the workspace.
        progress: Show a bar with the time left.

    Returns:
        Steps, losses, time and memory.

    Raises:
        ValueError: ``resume`` without a checkpoint, or one that another method wrote.
    """

    def order(count: int, batch: int, steps: int, seed: int) -> list[int] | None:
        for name in model.active_adapters:
            config = model.peft_config[name]
            if isinstance(config, EckartConfig):
                found = config.build_method().training_order(count, batch, steps, seed)
                if found is not None:
                    return found
        return None

    return train_model(
        model,
        tokenizer,
        examples,
        workspace,
        schedule,
        held_out=held_out,
        resume=resume,
        progress=progress,
        callbacks=[EckartCallback()],
        order=order,
        check=lambda checkpoint: _check_same_method(model, checkpoint),
    )


def _check_same_method(model: PeftModel, checkpoint: Path) -> None:
    from peft import PeftConfig

    (name,) = model.active_adapters
    saved: Any = PeftConfig.from_pretrained(str(checkpoint))
    wanted: Any = model.peft_config[name]
    theirs, ours = (getattr(config, "method", config.peft_type) for config in (saved, wanted))
    if theirs != ours or getattr(saved, "r", None) != wanted.r:
        raise ValueError(
            f"the checkpoint {checkpoint} is of {theirs} with r={getattr(saved, 'r', '?')}, not of {ours} with "
            f"r={wanted.r}; use another workspace, or leave out resume"
        )
