"""Train with transformers' Trainer, and say what it cost and gained; adapters and optimizers share it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .answers import Example
from .evaluate import peak_memory
from .groups import evaluating

__all__ = ["Order", "Schedule", "Trained", "answer_loss", "train"]

Order = Callable[[int, int, int, int], "list[int] | None"]


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: Optimizer steps; None for ``epochs``.
        epochs: Passes over the examples, where ``steps`` is None.
        learning_rate: Peak.
        batch_size: Examples in one forward pass.
        accumulation: Forward passes in one step.
        warmup: Steps of linear warm-up, as a fraction of all.
        scheduler: Name of transformers' learning-rate schedule.
        weight_decay: Decoupled, of AdamW.
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
        optimizer_bytes: What the optimizer keeps beside the weights.
        history: (step, training loss) as logged.
    """

    steps: int
    loss_before: float
    loss_after: float
    seconds: float
    seconds_per_step: float
    peak_memory: int
    optimizer_bytes: int
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
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    workspace: str | Path,
    schedule: Schedule,
    *,
    held_out: Sequence[Example] = (),
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    order: Order | None = None,
    check: Callable[[Path], None] | None = None,
) -> Trained:
    """Train whatever of a model is trainable.

    Args:
        model: A causal language model, or a PEFT model of one.
        tokenizer: Its padding token fills up short examples.
        examples: What to learn, see `eckart.models.answers`.
        workspace: Directory for the Trainer's checkpoints and logs.
        schedule: How.
        held_out: Examples to measure the loss on; the first 64 training ones if there are none.
        resume: Go on from the last checkpoint in the workspace.
        progress: Show a bar with the time left.
        callbacks: For the Trainer, beside the bar.
        optimizer: Class and keywords, as `transformers.Trainer` takes them; AdamW if left out.
        order: Given the numbers of examples, of examples a step, of steps, and a seed: the index of the example at each
            place of the run, or None for any order.
        check: Raises if the checkpoint to resume from is another run's.

    Returns:
        Steps, losses, time and memory.

    Raises:
        ValueError: ``resume`` without a checkpoint, or one that ``check`` refuses.
    """
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, ProgressCallback, Trainer
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = None
    if resume:
        checkpoint = get_last_checkpoint(str(workspace)) if Path(workspace).is_dir() else None
        if checkpoint is None:
            raise ValueError(f"no checkpoint to resume from in {workspace}; leave out resume")
        if check is not None:
            check(Path(checkpoint))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    arguments = _arguments(schedule, workspace, cpu=next(model.parameters()).device.type == "cpu")
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_in_order(order, examples, arguments),
        data_collator=collate,
        callbacks=[*callbacks, _Bar(progress)],
        optimizer_cls_and_kwargs=optimizer,
    )
    if optimizer is not None and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.create_optimizer()  # what is wrong with its options shows before the first evaluation
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
    return Trained(steps, before, after, seconds, seconds / max(steps, 1), peak_memory(), _bytes(trainer), history)


def _arguments(schedule: Schedule, workspace: str | Path, *, cpu: bool) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
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
        use_cpu=cpu,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _bytes(trainer: Any) -> int:
    """Of the tensors that the optimizer keeps here."""
    states = trainer.optimizer.state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))


def _in_order(order: Order | None, examples: Sequence[Example], arguments: Any) -> list[Example]:
    """The examples, in the order of the whole run where there is one; the Trainer is then told to keep it."""
    if order is None:
        return list(examples)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = arguments.max_steps
    if steps < 0:
        steps = math.ceil(arguments.num_train_epochs * math.ceil(len(examples) / batch))  # as the Trainer counts
    indices = order(len(examples), batch, steps, arguments.data_seed)
    if indices is None:
        return list(examples)
    arguments.max_steps = steps
    arguments.train_sampling_strategy = "sequential"
    return [examples[index] for index in indices]


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
