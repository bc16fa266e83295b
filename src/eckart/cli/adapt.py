"""``eckart adapt``: fine-tune a model through an adapter, and show what that cost and gained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli._options import Device, Dtype, Field, Json, Model, Quiet, Where, parse_setting, prepare
from eckart.cli._output import print_json
from eckart.cli._training import (
    Accumulation,
    BatchSize,
    Data,
    Epochs,
    Force,
    HeldOut,
    MixedPrecision,
    Resume,
    SaveEvery,
    Seed,
    Setting,
    Steps,
    Template,
    Tensorboard,
    TokensEach,
    Workspace,
    load_to_train,
    make_schedule,
    print_figures,
    read_training_data,
    split_off,
)


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the adapter to.")],
    method: Annotated[str, typer.Option(help="See `eckart methods --family adapters`.")] = "pissa",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="The update is scaled by alpha / rank.  [default: the rank]")
    ] = None,
    where: Where = None,
    option: Setting = None,
    data: Data = "",
    template: Template = "",
    field: Field = "text",
    held_out: HeldOut = 64,
    steps: Steps = None,
    epochs: Epochs = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-4,
    batch_size: BatchSize = 4,
    accumulation: Accumulation = 1,
    length: TokensEach = 512,
    mixed_precision: MixedPrecision = "no",
    workspace: Workspace = None,
    save_every: SaveEvery = 100,
    resume: Resume = False,
    tensorboard: Tensorboard = False,
    seed: Seed = 0,
    force: Force = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model through an adapter with transformers' Trainer, and save the adapter."""
    prepare(dtype, device)
    from eckart.adapters.config import EckartConfig
    from eckart.adapters.train import train
    from eckart.models import check_target
    from eckart.models.files import atomic_directory

    options = dict(parse_setting(pair) for pair in option or [])
    config = EckartConfig(method=method, r=rank, options=options)
    schedule = make_schedule(
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        mixed_precision=mixed_precision,
        workspace=workspace,
        save_every=save_every,
        resume=resume,
        tensorboard=tensorboard,
        seed=seed,
    )
    check_target(out, force=force)
    loaded, tokenizer = load_to_train(model, dtype, device, progress=not quiet)
    examples = read_training_data(data, template, field, tokenizer, length)
    learnt, judged = split_off(examples, held_out)
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
    print_json({**figures, "history": trained.history}) if as_json else print_figures(figures)


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
