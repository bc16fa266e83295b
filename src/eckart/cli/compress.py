"""``eckart compress``: make a model's weights smaller, show what that cost and gained, save it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from eckart.cli._compare import Comparison, measure, weights_on_disk
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
    load_model,
    one_of,
    parse_bytes,
    prepare,
)
from eckart.cli._output import print_json, print_note
from eckart.cli._texts import Texts

if TYPE_CHECKING:
    from eckart.compression import WeightMethod


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write the compressed model to.")],
    method: Annotated[str, typer.Option(help="See `eckart methods --family compression`.")] = "pifa",
    ratio: Annotated[
        float | None, typer.Option(help="Fraction of the selected parameters to remove, 0 to 1.  [default: 0.2]")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="The same rank for every matrix, instead of a ratio.")] = None,
    size: Annotated[str, typer.Option("--bytes", help="Size of the whole model, such as 400MB, instead.")] = "",
    energy: Annotated[float | None, typer.Option(help="Share of squared singular values to keep, instead.")] = None,
    where: Where = None,
    allocation: Annotated[
        str, typer.Option(help="How one ratio is shared: uniform, threshold, svd-llm-v2 or welore.")
    ] = "uniform",
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
    stream: Annotated[
        bool, typer.Option("--stream", help="Read, compress and write block by block; for models larger than memory.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it holds a model.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a model's weights smaller under a budget, show what that cost and gained, and save it."""
    prepare(dtype, device)
    from eckart.compression import Budget
    from eckart.linalg.allocate import Policy
    from eckart.linalg.rank import Form
    from eckart.models import check_target, resolve

    # Everything that can be wrong with the request is found before a model is loaded.
    budget = Budget.of(ratio=ratio, rank=rank, bytes=parse_bytes(size) if size else None, energy=energy)
    one_of("--allocation", allocation, get_args(Policy))
    one_of("--form", form, get_args(Form))
    chosen = chosen_method(method, option or [])
    if stream and (dtype != "auto" or device != "cpu"):
        raise ValueError("--stream works on the CPU in the checkpoint's own type; leave out --dtype and --device")
    check_target(out, force=force)
    texts = Texts(data, eval_data, field, samples, length, batch_size)
    texts.check()
    needs_text = chosen.gathers or (chosen.surveys if budget.needs_spectra(cast(Policy, allocation)) else ())
    job = _Job(
        model=model,
        source=resolve(model),
        out=out,
        force=force,
        method=chosen,
        settings={
            budget.unit: budget.value,
            "where": where[0] if where and len(where) == 1 else where or None,
            "allocation": allocation,
            "form": form,
            "progress": not quiet,
        },
        texts=texts,
        needs_text=bool(needs_text),
    )
    comparison = job.streamed() if stream else job.in_memory(dtype, device, measured=measured)
    print_json(comparison.to_dict()) if as_json else comparison.print()
    for message in comparison.result.warnings:
        print_note("warning", message)


@dataclass(frozen=True)
class _Job:
    """A request that has been checked.

    Attributes:
        model: what the user called the model.
        source: its directory.
        out: directory to write.
        force: whether ``out`` may be replaced.
        method: how to compress.
        settings: everything else that `eckart.compress` takes.
        texts: what to calibrate on and to judge by.
        needs_text: whether there is anything to calibrate.
    """

    model: str
    source: Path
    out: Path
    force: bool
    method: WeightMethod
    settings: dict[str, Any]
    texts: Texts
    needs_text: bool

    def in_memory(self, dtype: str, device: str, *, measured: bool) -> Comparison:
        """Load, compress, save; with figures before and after if they are wanted and the model has them."""
        from eckart.compression import compress
        from eckart.models import save
        from eckart.models.progress import waiting

        progress = self.settings["progress"]
        on_disk = weights_on_disk(self.source)
        model, tokenizer = load_model(self.source, dtype, device, progress=progress)
        _check(model, self.settings["where"])
        data = self.texts.to_calibrate(self.model, model.config, tokenizer) if self.needs_text else []
        reason = _why_not(model, tokenizer) if measured else ""
        held_out = self.texts.to_judge(model.config, tokenizer) if measured and not reason else []
        before = measure(model, held_out, progress=progress) if held_out else None
        with _kept_for_the_end():
            result = compress(model, self.method, data=data, **self.settings)
        after = measure(model, held_out, progress=progress) if held_out else None
        with waiting("saving", enabled=progress):
            save(model, self.out, tokenizer, force=self.force)
        return Comparison(
            self.model, self.out, result, (on_disk, weights_on_disk(self.out)), before, after, not_measured=reason
        )

    def streamed(self) -> Comparison:
        """Compress from disk to disk."""
        from transformers import AutoConfig

        from eckart.compression import compress_checkpoint
        from eckart.models import load_tokenizer

        on_disk = weights_on_disk(self.source)
        tokenizer = load_tokenizer(self.source)
        config = AutoConfig.from_pretrained(self.source)
        data = self.texts.to_calibrate(self.model, config, tokenizer) if self.needs_text else []
        with _kept_for_the_end():
            result = compress_checkpoint(
                self.source, self.out, self.method, data=data, tokenizer=tokenizer, force=self.force, **self.settings
            )
        reason = f"the model was streamed; try: eckart eval {self.out}"
        return Comparison(self.model, self.out, result, (on_disk, weights_on_disk(self.out)), not_measured=reason)


def _check(model: Any, where: Any) -> None:
    """Find out, before anything is measured for it, whether the model can be compressed at all."""
    from eckart.compression.checks import check_untouched, inside_blocks
    from eckart.models import blocks, linears
    from eckart.models.finite import check_finite

    check_untouched(model)
    inside_blocks(linears(model, where), blocks(model))
    check_finite(model)


def _why_not(model: Any, tokenizer: Any) -> str:
    """Why perplexity cannot be measured; empty if it can."""
    from eckart.models.evaluate import is_causal

    if tokenizer is None:
        return "the model has no tokenizer"
    return "" if is_causal(model) else f"{type(model).__name__} is no causal language model"


@contextlib.contextmanager
def _kept_for_the_end() -> Iterator[None]:
    """The result carries every warning, and they are printed once, below the table."""
    from eckart.structures import EckartWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        yield
