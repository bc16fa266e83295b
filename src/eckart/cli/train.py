"""``eckart train``: pre-train or fully fine-tune a model with any of the optimizers, from a recipe if wanted."""

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


def _read_recipe(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take a file's values as the defaults of the options; what is typed counts more."""
    if path is None:
        return None
    import yaml

    known = {parameter.name for parameter in ctx.command.params} - {"recipe"}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} is no list of 'option: value'")
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if isinstance(settings := named.pop("set", None), dict):
        named["option"] = [f"{key}={value}" for key, value in settings.items()]
    if unknown := sorted(named.keys() - known):
        raise typer.BadParameter(f"{path} has {unknown[0]!r}, which is no option of this command")
    ctx.default_map = {**(ctx.default_map or {}), **named}
    return path


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the model to.")],
    recipe: Annotated[
        Path | None,
        typer.Option(callback=_read_recipe, is_eager=True, help="YAML file with 'option: value' for any of these."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="See `eckart methods --family optim`; adamw for the Trainer's own.")
    ] = "galore",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the projected gradients.")] = 128,
    bits: Annotated[
        int | None, typer.Option(help="Of each stored moment, 32 or 8.  [default: the method's own]")
    ] = None,
    where: Where = None,
    option: Setting = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Start from random weights: only the model's configuration is used.")
    ] = False,
    data: Data = "",
    template: Template = "",
    field: Field = "text",
    held_out: HeldOut = 64,
    steps: Steps = None,
    epochs: Epochs = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0, help="Decoupled weight decay.")] = 0.0,
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
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Pre-train or fully fine-tune a model with transformers' Trainer and an optimizer that needs less memory."""
    prepare(dtype, device)
    from eckart import catalog, save
    from eckart.models import check_target
    from eckart.optim.train import train
    from eckart.options import make

    options = dict(parse_setting(pair) for pair in option or [])
    if method != "adamw":
        make(catalog.get(method, family="optim"), options | ({} if bits is None else {"bits": bits}))
    schedule = make_schedule(
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        weight_decay=weight_decay,
        mixed_precision=mixed_precision,
        workspace=workspace,
        save_every=save_every,
        resume=resume,
        tensorboard=tensorboard,
        seed=seed,
    )
    check_target(out, force=force)
    loaded, tokenizer = load_to_train(model, dtype, device, progress=not quiet)
    if from_scratch:
        loaded = _untrained(loaded, seed)
    learnt, judged = split_off(read_training_data(data, template, field, tokenizer, length), held_out)
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(
            loaded, tokenizer, learnt, workspace or scratch, schedule, method=None if method == "adamw" else method,
            rank=rank, where=where or None, bits=bits, options=options, held_out=judged, resume=resume,
            progress=not quiet,
        )  # fmt: skip
    save(loaded, out, tokenizer, force=force)
    figures: dict[str, Any] = {
        "model": model,
        "out": str(out),
        "method": method,
        "rank": rank,
        "trained parameters": sum(p.numel() for p in loaded.parameters() if p.requires_grad),
        **{key.replace("_", " "): value for key, value in trained.to_dict().items() if key != "history"},
    }
    print_json({**figures, "history": trained.history}) if as_json else print_figures(figures)


def _untrained(model: Any, seed: int) -> Any:
    """The same architecture with the weights that its class draws."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
    return fresh.to(device=model.device, dtype=model.dtype)
