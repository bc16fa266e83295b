"""Options of the commands that train, what becomes of the data they name, and how their figures are printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eckart.cli._options import load_model

if TYPE_CHECKING:
    from eckart.models.training import Schedule

Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the method, as name=value; see `eckart methods NAME`."),
]
Data = Annotated[
    str, typer.Option(help="Training data: JSONL file, text file or hub data set.  [default: Python documentation]")
]
Template = Annotated[
    str, typer.Option(help="For JSONL: 'PROMPT => ANSWER' with field names in braces; only the answer is learnt.")
]
HeldOut = Annotated[
    int, typer.Option(min=0, help="Examples at the end of the data to measure the loss on, not to train on.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")]
Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples a forward pass.")]
Accumulation = Annotated[int, typer.Option(min=1, help="Forward passes a step.")]
TokensEach = Annotated[int, typer.Option("--length", min=8, help="Tokens an example at the most.")]
MixedPrecision = Annotated[str, typer.Option(help="no, bf16 or fp16.")]
Workspace = Annotated[
    Path | None, typer.Option(help="Directory for checkpoints and logs, to resume from.  [default: none kept]")
]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints in the workspace.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the workspace's last checkpoint.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write tensorboard logs to the workspace.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the directory if it exists.")]


def make_schedule(
    *, workspace: Path | None, save_every: int, resume: bool, tensorboard: bool, **others: Any
) -> Schedule:
    """The schedule that the options ask for; see `eckart.models.training.Schedule`.

    Raises:
        ValueError: a number makes no sense, or there is nowhere to resume from or to log to.
    """
    from eckart.models.training import Schedule

    if (resume or tensorboard) and workspace is None:
        raise ValueError("--resume and --tensorboard need --workspace, the directory of checkpoints and logs")
    return Schedule(save_every=save_every if workspace is not None else None, tensorboard=tensorboard, **others)


def load_to_train(model: str, dtype: str, device: str, *, progress: bool) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Raises:
        ValueError: it has no tokenizer.
    """
    loaded, tokenizer = load_model(model, dtype, device, progress=progress)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; add its tokenizer files to the directory")
    return loaded, tokenizer


def read_training_data(data: str, template: str, field: str, tokenizer: Any, length: int) -> list[Any]:
    """Examples of a JSONL file with prompts and answers, or windows of a text."""
    from eckart.models.answers import DEFAULT_TEMPLATE, read_examples, text_examples

    if data.endswith(".jsonl") and (template or field == "text"):
        return read_examples(data, tokenizer, template=template or DEFAULT_TEMPLATE, length=length)
    return text_examples(data or None, tokenizer, field=field, length=length)


def split_off(examples: list[Any], held_out: int) -> tuple[list[Any], list[Any]]:
    """What is learnt, and the last ``held_out`` examples; none of those if there are not more than that."""
    judged = examples[len(examples) - held_out :] if 0 < held_out < len(examples) else []
    return examples[: len(examples) - len(judged)], judged


def print_figures(figures: dict[str, Any]) -> None:
    """Names and values, sizes and shares in their units."""
    from rich.table import Table
    from rich.text import Text

    from eckart.cli._output import console
    from eckart.models.result import format_bytes

    shown = Table.grid(padding=(0, 2, 0, 0))
    for key, value in figures.items():
        if key in ("bytes on disk", "peak memory", "optimizer bytes"):
            text = format_bytes(value)
        elif key == "share of all":
            text = f"{value:.3%}"
        else:
            text = (
                f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
            )
        shown.add_row(key, Text(text))
    console().print(shown)
