"""Train an adapter with transformers' Trainer, and say what it cost and gained."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..models.answers import Example
from ..models.evaluate import peak_memory
from ..models.groups import evaluating
from .callback import EckartCallback
from .config import EckartConfig

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Schedule", "Trained", "answer_loss", "train"]


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: Optimizer steps; None for ``epochs``.
        epochs: Passes over the examples, where ``steps`` is None.
        learning_rate: Peak, of AdamW.
        batch_size: Examples in one forward pass.
        accumulation: Forward passes in one step.
        warmup: Steps of linear warm-up, as a fraction of all.
        scheduler: Name of transformers' learning-rate schedule.
        weight_decay: Of AdamW.
        gradient_clip: Largest gradient norm.
        mixed_precision: "no", "bf16" or "fp16".
        save_every: Steps between checkpoints; None for none.
        tensorboard: Whether to write tensorboard logs (needs the package).
        seed: Of the order of the examples.

    Raises:
        ValueError: A number makes no sense.
    """

    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 2e-4
    batch_size: int = 4
    accumulation: int = 1
    warmup: float = 0.03
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    mixed_precision: str = "no"
    save_every: int | None = None
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, not {self.mixed_precision!r}")
        for name in ("learning_rate", "batch_size", "accumulation", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not (self.epochs > 0 if self.steps is None else self.steps > 0):
            raise ValueError("steps or epochs must be positive")


@dataclass(frozen=True)
class Trained:
    """What training did.

    Attributes:
        steps: Optimizer steps made.
        loss_before: Mean loss of the held-out examples (the training ones, if none are held out) at the start.
        loss_after: The same at the end.
        seconds: Of training, without the two evaluations.
        seconds_per_step: Of it, a step.
        peak_memory: Bytes, resident in the process or allocated on the GPU.
        history: (step, training loss) as logged.
    """

    steps: int
    loss_before: float
    loss_after: float
    seconds: float
    seconds_per_step: float
    peak_memory: int
    history: list[tuple[int, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def answer_loss(model: Any, examples: Sequence[Example], collate: Any, *, batch_size: int = 4) -> float:
    """Mean loss over all learnt tokens of the examples, penalties left out."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = collate([dict(example) for example in examples[start : start + batch_size]])
            batch = {key: value.to(device) for key, value in batch.items()}
            learnt = int(batch["labels"][:, 1:].ne(-100).sum())
            total += float(model(**batch).loss) * learnt
            count += learnt
    return total / max(count, 1)


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
    """Train the active adapter.

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
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, ProgressCallback, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = None
    if resume:
        checkpoint = get_last_checkpoint(str(workspace)) if Path(workspace).is_dir() else None
        if checkpoint is None:
            raise ValueError(f"no checkpoint to resume from in {workspace}; leave out resume")
        _check_same_method(model, Path(checkpoint))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    arguments = TrainingArguments(
        output_dir=str(workspace),
        max_steps=schedule.steps or -1,
        num_train_epochs=schedule.epochs,
        learning_rate=schedule.learning_rate,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulation,
        warmup_steps=schedule.warmup,
        lr_scheduler_type=schedule.scheduler,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.gradient_clip,
        bf16=schedule.mixed_precision == "bf16",
        fp16=schedule.mixed_precision == "fp16",
        save_strategy="no" if schedule.save_every is None else "steps",
        save_steps=schedule.save_every or 500,
        save_total_limit=2,
        logging_steps=1,
        report_to=["tensorboard"] if schedule.tensorboard else [],
        disable_tqdm=True,
        seed=schedule.seed,
        data_seed=schedule.seed,
        use_cpu=next(model.parameters()).device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_in_order(model, examples, arguments),
        data_collator=collate,
        callbacks=[EckartCallback(), _Bar(progress)],
    )
    # Theirs write every logged line to standard output, where a command prints its result.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    judged = list(held_out) or list(examples)[:64]
    before = answer_loss(model, judged, collate, batch_size=schedule.batch_size)
    start = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    after = answer_loss(model, judged, collate, batch_size=schedule.batch_size)
    history = [(int(entry["step"]), float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry]
    steps = outcome.global_step
    return Trained(steps, before, after, seconds, seconds / max(steps, 1), peak_memory(), history)


def _in_order(model: PeftModel, examples: Sequence[Example], arguments: Any) -> list[Example]:
    """The examples, in the order of the whole run where the method has one; the Trainer is then told to keep it."""
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = arguments.max_steps
    if steps < 0:
        steps = math.ceil(arguments.num_train_epochs * math.ceil(len(examples) / batch))  # as the Trainer counts
    for name in model.active_adapters:
        config = model.peft_config[name]
        if not isinstance(config, EckartConfig):
            continue
        order = config.build_method().training_order(len(examples), batch, steps, arguments.data_seed)
        if order is not None:
            arguments.max_steps = steps
            arguments.train_sampling_strategy = "sequential"
            return [examples[index] for index in order]
    return list(examples)


class _Bar(TrainerCallback):
    """A bar on standard error with the loss and the time left."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", disable=not self._enabled)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix(loss=logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


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
