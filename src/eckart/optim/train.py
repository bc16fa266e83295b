"""Train every weight of a model with one of the optimizers, in transformers' Trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..models.answers import Example
from ..models.select import Where
from ..models.training import Schedule, Trained
from ..models.training import train as train_model
from .trainer import for_trainer

__all__ = ["train"]

_FILE = "eckart_optimizer.json"


def train(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    workspace: str | Path,
    schedule: Schedule,
    *,
    method: str | None = "galore",
    rank: int = 128,
    where: Where | None = None,
    bits: int | None = None,
    options: dict[str, Any] | None = None,
    held_out: Sequence[Example] = (),
    resume: bool = False,
    progress: bool = True,
) -> Trained:
    """Pre-train or fine-tune a model in full; see `eckart.models.training.train`.

    Args:
        model: A causal language model; every parameter that asks for a gradient is trained.
        tokenizer: Its padding token fills up short examples.
        examples: What to learn, see `eckart.models.answers`.
        workspace: Directory for the Trainer's checkpoints and logs.
        schedule: How.
        method: Name in the catalog; None for the Trainer's AdamW.
        rank: r.
        where: Which linear maps are projected, see `eckart.optim.low_rank_groups`.
        bits: Of each moment, 32 or 8; None for the method's own.
        options: Of the method.
        held_out: Examples to measure the loss on; the first 64 training ones if there are none.
        resume: Go on from the last checkpoint in the workspace.
        progress: Show a bar with the time left.

    Returns:
        Steps, losses, time and memory.

    Raises:
        UnknownMethodError: No optimizer of that name.
        ValueError: A bad option, ``resume`` without a checkpoint, or one of another optimizer.
    """
    optimizer = None
    if method is not None:
        given = {"weight_decay": schedule.weight_decay, "seed": schedule.seed, **(options or {})}
        given |= {} if bits is None else {"bits": bits}
        optimizer = for_trainer(method, model, rank, where, lr=schedule.learning_rate, **given)
    written = {"method": method, "rank": rank if method else None, "bits": bits if method else None}
    return train_model(
        model,
        tokenizer,
        examples,
        workspace,
        schedule,
        held_out=held_out,
        resume=resume,
        progress=progress,
        callbacks=[_Note(written)],
        optimizer=optimizer,
        check=lambda checkpoint: _check_same(written, checkpoint),
    )


class _Note(TrainerCallback):
    """Writes into each checkpoint which optimizer it is of."""

    def __init__(self, written: dict[str, Any]) -> None:
        self.written = written

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (directory / _FILE).write_text(json.dumps(self.written) + "\n", encoding="utf-8")


def _check_same(written: dict[str, Any], checkpoint: Path) -> None:
    path = checkpoint / _FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found != written:
        raise ValueError(
            f"the checkpoint {checkpoint} is of {found.get('method', 'another run')} with rank {found.get('rank')} and "
            f"{found.get('bits')} bits, not of {written['method']} with {written['rank']} and {written['bits']}; use "
            "another workspace, or leave out resume"
        )
