"""``eckart compress``: make a model's weights smaller, show what that cost and gained, save it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from eckart.cli._compress_job import Job, Recovery
from eckart.cli._method import chosen_method
from eckart.cli._options import (
    Device,
    Dtype,
    Field,
    Json,
    Length,
    Model,
    Quiet,
    Where,
    one_of,
    parse_bytes,
    prepare,
)
from eckart.cli._output import print_json, print_note
from eckart.cli._texts import Texts


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the compressed model to.")],
    method: Annotated[
        str,
        typer.Option(help="See `eckart methods --family compression`; auto tries several and keeps the best."),
    ] = "pifa",
    ratio: Annotated[
        float | None, typer.Option(help="Fraction of the selected parameters to remove, 0 to 1.  [default: 0.2]")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="The same rank for every matrix, instead of a ratio.")] = None,
    size: Annotated[str, typer.Option("--bytes", help="Size of the whole model, such as 400MB, instead.")] = "",
    energy: Annotated[float | None, typer.Option(help="Share of squared singular values to keep, instead.")] = None,
    where: Where = None,
    allocation: Annotated[
        str,
        typer.Option(
            help="How one ratio is shared: uniform, threshold, svd-llm-v2, welore, fisher, block-influence, lorap or "
            "search.  [default: the method's own]"
        ),
    ] = "",
    evaluations: Annotated[
        int, typer.Option(min=1, help="Compressions that --allocation search tries before the real one.")
    ] = 16,
    form: Annotated[
        str, typer.Option(help="pivoted (fewer numbers at the same rank) or plain (two factors).")
    ] = "pivoted",
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the method, as name=value; see `eckart methods NAME`."),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Calibration text: file, JSONL or hub data set.  [default: Python documentation]")
    ] = "",
    eval_data: Annotated[
        str, typer.Option(help="Text to measure perplexity on.  [default: another part of the Python documentation]")
    ] = "",
    field: Field = "text",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    length: Length = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Calibration windows a batch.")] = 8,
    measured: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Measure perplexity and speed before and after.")
    ] = True,
    recover: Annotated[
        int, typer.Option(min=0, help="Then train the small weights for so many steps on the calibration text.")
    ] = 0,
    recover_with: Annotated[
        str,
        typer.Option(
            help="What recovery trains: factors, sequential (one factor after the other), or an adapter that is saved "
            "beside the model, such as lora; see `eckart methods --family adapters`."
        ),
    ] = "factors",
    recover_rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the adapter that recovery trains.  [default: 16]")
    ] = None,
    recover_from: Annotated[
        str,
        typer.Option(
            help="What recovery learns to predict: text, the calibration text itself, or original, what the model said "
            "of it before, for text unlike what the model is for; both models are in memory then."
        ),
    ] = "text",
    recover_rate: Annotated[float, typer.Option(help="Peak learning rate of recovery.")] = 2e-4,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read, compress and write block by block; for models larger than memory.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --stream: go on after the last block that an earlier run finished.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(help="Who factorises: local, or ray: with --stream, on all cores of a Ray cluster."),
    ] = "local",
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it holds a model.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a model's weights smaller under a budget, show what that cost and gained, and save it."""
    prepare(dtype, device)
    from eckart.compression import Budget
    from eckart.compression.engine import EngineName, Ray
    from eckart.compression.policies import Policy
    from eckart.compression.work import needs_data
    from eckart.linalg.rank import Form
    from eckart.models import check_target, resolve
    from eckart.models.journal import check_unfinished

    # Everything that can be wrong with the request is found before a model is loaded.
    budget = Budget.of(ratio=ratio, rank=rank, bytes=parse_bytes(size) if size else None, energy=energy)
    if allocation:
        one_of("--allocation", allocation, get_args(Policy))
    one_of("--form", form, get_args(Form))
    automatic = method == "auto"
    if automatic and (option or allocation or budget.unit != "ratio"):
        raise ValueError("--method auto chooses method and allocation itself under a ratio; leave out the rest")
    chosen = None if automatic else chosen_method(method, option or [])
    if stream and (automatic or recover):
        raise ValueError("--stream holds a few blocks at a time; auto and --recover need the whole model")
    one_of("--recover-from", recover_from, ("text", "original"))
    recovery = Recovery.of(recover, recover_with, recover_rate, recover_rank, from_original=recover_from == "original")
    if stream and (dtype != "auto" or device != "cpu"):
        raise ValueError("--stream works on the CPU in the checkpoint's own type; leave out --dtype and --device")
    one_of("--engine", engine, get_args(EngineName))
    if not stream and (resume or engine == "ray"):
        raise ValueError("--resume and --engine ray work block by block: add --stream, or leave them (--engine local)")
    if engine == "ray":
        Ray.check(chosen, method)
    check_target(out, force=force)
    if stream:
        check_unfinished(out, force=force, resume=resume)
    texts = Texts(data, eval_data, field, samples, length, batch_size)
    texts.check()
    policy = cast(Policy | None, allocation or None)
    job = Job(
        model=model,
        source=resolve(model),
        out=out,
        force=force,
        method=chosen,
        settings={
            budget.unit: budget.value,
            "where": where[0] if where and len(where) == 1 else where or None,
            "allocation": policy,
            "evaluations": evaluations,
            "form": form,
            "progress": not quiet,
        },
        texts=texts,
        needs_text=bool(recover) or chosen is None or needs_data(chosen, budget, policy),
        recovery=recovery if recover else None,
    )
    if stream:
        comparison = job.streamed(cast(EngineName, engine), resume=resume)
    else:
        comparison = job.in_memory(dtype, device, measured=measured)
    print_json(comparison.to_dict()) if as_json else comparison.print()
    for message in comparison.result.warnings:
        print_note("warning", message)
