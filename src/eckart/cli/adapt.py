"""``eckart adapt``: fine-tune a model through an adapter, and show what that cost and gained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli._options import Device, Dtype, Field, Json, Model, Quiet, Where, load_model, parse_setting, prepare
from eckart.cli._output import console, print_json


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the adapter to.")],
    method: Annotated[str, typer.Option(help="See `eckart methods --family adapters`.")] = "pissa",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="The update is scaled by alpha / rank.  [default: the rank]")
    ] = None,
    where: Where = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the method, as name=value; see `eckart methods NAME`."),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Training data: JSONL file, text file or hub data set.  [default: Python documentation]")
    ] = "",
    template: Annotated[
        str,
        typer.Option(help="For JSONL: 'PROMPT => ANSWER' with field names in braces; only the answer is learnt."),
    ] = "",
    field: Field = "text",
    held_out: Annotated[
        int, typer.Option(min=0, help="Examples at the end of the data to measure the loss on, not to train on.")
    ] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a forward pass.")] = 4,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes a step.")] = 1,
    length: Annotated[int, typer.Option(min=8, help="Tokens an example at the most.")] = 512,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    workspace: Annotated[
        Path | None, typer.Option(help="Directory for checkpoints and logs, to resume from.  [default: none kept]")
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints in the workspace.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the workspace's last checkpoint.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write tensorboard logs to the workspace.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it holds an adapter.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model through an adapter with transformers' Trainer, and save the adapter."""
    prepare(dtype, device)
    from eckart.adapters.config import EckartConfig
    from eckart.adapters.train import Schedule, train
    from eckart.models import check_target
    from eckart.models.files import atomic_directory

    options = dict(parse_setting(pair) for pair in option or [])
    config = EckartConfig(method=method, r=rank, options=options)
    if (resume or tensorboard) and workspace is None:
        raise ValueError("--resume and --tensorboard need --workspace, the directory of checkpoints and logs")
    schedule = Schedule(
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        mixed_precision=mixed_precision,
        save_every=save_every if workspace is not None else None,
        tensorboard=tensorboard,
        seed=seed,
    )
    check_target(out, force=force)
    loaded, tokenizer = load_model(model, dtype, device, progress=not quiet)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; add its tokenizer files to the directory")
    examples = _examples(data, template, field, tokenizer, length)
    judged = examples[len(examples) - held_out :] if 0 < held_out < len(examples) else []
    learnt = examples[: len(examples) - len(judged)]
    adapted, seconds = _adapted(loaded, config, alpha, where, learnt, seed, quiet)
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(
            adapted, tokenizer, learnt, workspace or scratch, schedule, held_out=judged, resume=resume,
            progress=not quiet,
        )  # fmt: skip
    with atomic_directory(out, force=force) as directory:
        adapted.save_pretrained(str(directory))
    trainable, total = adapted.get_nb_trainable_parameters()
    figures: dict[str, Any] = {
        "model": model,
        "out": str(out),
        "method": config.method,
        "rank": rank,
        "trainable parameters": trainable,
        "share of all": trainable / total,
        "bytes on disk": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "seconds to initialize": seconds,
        **{key.replace("_", " "): value for key, value in trained.to_dict().items() if key != "history"},
    }
    print_json({**figures, "history": trained.history}) if as_json else _print(figures)


def _examples(data: str, template: str, field: str, tokenizer: Any, length: int) -> list[Any]:
    from eckart.models.answers import DEFAULT_TEMPLATE, read_examples, text_examples

    if data.endswith(".jsonl") and (template or field == "text"):
        return read_examples(data, tokenizer, template=template or DEFAULT_TEMPLATE, length=length)
    return text_examples(data or None, tokenizer, field=field, length=length)


def _adapted(
    model: Any, config: Any, alpha: float | None, where: list[str] | None, learnt: list[Any], seed: int, quiet: bool
) -> tuple[Any, float]:
    """The model with its adapter, started from the first examples where the method wants data."""
    import time

    import torch

    from eckart.adapters import adapt

    batches = [{"input_ids": torch.tensor([example["input_ids"]])} for example in learnt[:64]]
    start = time.perf_counter()
    adapted = adapt(
        model,
        config.method,
        config.r,
        alpha=alpha,
        where=where or None,
        data=batches if config.build_method().needs else None,
        options=config.options,
        seed=seed,
        progress=not quiet,
        task_type="CAUSAL_LM",
    )
    return adapted, time.perf_counter() - start


def _print(figures: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from eckart.models.result import format_bytes

    shown = Table.grid(padding=(0, 2, 0, 0))
    for key, value in figures.items():
        if key in ("bytes on disk", "peak memory"):
            text = format_bytes(value)
        elif key == "share of all":
            text = f"{value:.3%}"
        else:
            text = (
                f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
            )
        shown.add_row(key, Text(text))
    console().print(shown)
