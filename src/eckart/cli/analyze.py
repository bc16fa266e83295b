"""``eckart analyze``: look at a model with one of the published analyses."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eckart import catalog
from eckart.cli._method import fits
from eckart.cli._options import (
    Device,
    Dtype,
    Field,
    Json,
    Length,
    Model,
    Quiet,
    Where,
    parse_setting,
    prepare,
)
from eckart.cli._output import print_json
from eckart.cli._subject import Inputs, Models
from eckart.cli._training import Setting

if TYPE_CHECKING:
    from eckart.analysis import AnalysisMethod


def command(
    method: Annotated[str, typer.Argument(help="One of the methods above.")],
    model: Model,
    base: Annotated[
        str,
        typer.Option(help="The model to compare with. One of the two may be the directory of an adapter on the other."),
    ] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="A text to look at. May be given several times.")] = None,
    data: Annotated[str, typer.Option(help="Texts to look at: text file, JSONL file or hub data set.")] = "",
    template: Annotated[
        str, typer.Option(help="For JSONL: 'PROMPT => ANSWER' with field names in braces; a line is a text then.")
    ] = "",
    field: Field = "text",
    samples: Annotated[int, typer.Option(min=1, help="Texts that are taken from --data.")] = 32,
    length: Length = None,
    where: Where = None,
    option: Setting = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write everything to, as --json prints it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Look at a model with one of the published analyses; it is not changed."""
    prepare(dtype, device)
    chosen = chosen_analysis(method, option or [])
    name = catalog.get(method).name
    # Everything that can be wrong with the request is found before a model is loaded.
    inputs = Inputs(prompt or [], data, template, field, samples, length)
    inputs.check(name, chosen.needs)
    target = _check_file(out, force=force) if out is not None else None
    models = Models.of(model, base, name, chosen.needs)

    from eckart.analysis import analyze
    from eckart.cli._analysis import print_analysis, worded
    from eckart.report.page import write_pages

    loaded, other, tokenizer, notes = models.load(dtype, device, progress=not quiet)
    batches = inputs.batches(models.model, loaded, tokenizer, answers="labels" in chosen.needs)
    found = analyze(loaded, chosen, base=other, data=batches or None, where=where or None, progress=not quiet)
    found.warnings = notes + found.warnings
    found.rows = worded(found.rows, tokenizer)
    whole = {"model": model, "base": base or None, **found.to_dict()}
    if target is not None:
        with contextlib.redirect_stdout(io.StringIO()) as text:  # so that the file holds what --json prints
            print_json(whole)
        write_pages({target: text.getvalue()})
    if as_json:
        print_json(whole)
        return
    print_analysis(found, model, written=out)


def _listed() -> str:
    """The methods with their titles, as lines of help that are not wrapped again."""
    rows = [row for row in catalog.select(family="analysis") if row.target]
    width = max(len(row.name) for row in rows) + 2
    lines: list[str] = []
    for row in rows:
        lines += textwrap.wrap(
            f"{row.name:<{width}}{row.title}",
            76,
            initial_indent="  ",
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )
    return "\n".join(["\b", "Methods (`eckart methods NAME` shows one with its options):", *lines])


command.__doc__ = f"{command.__doc__}\n\n{_listed()}"


def chosen_analysis(name: str, settings: Sequence[str]) -> AnalysisMethod:
    """The analysis ``name`` with options given as name=value.

    Raises:
        UnknownMethodError: with the nearest names.
        ValueError: it has no such option (with those it has), or a value of another type was given.

    Example:
        >>> chosen_analysis("talking-heads", ["top=3", "order=z"])
        TalkingHeads(top=3, order='z', offset=None)
    """
    from eckart.options import make

    row = catalog.get(name, family="analysis")
    options = dict(parse_setting(pair) for pair in settings)
    for option in fields(row.load()):
        if option.name in options and not fits(options[option.name], option.default):
            wanted = type(option.default).__name__
            raise ValueError(f"--set {option.name}={options[option.name]} is no {wanted}; see `eckart methods {name}`")
    made: AnalysisMethod = make(row, options)
    return made


def _check_file(out: Path, *, force: bool) -> Path:
    """Say where the file will be written, or refuse, before any work is done for it."""
    from eckart.report.page import check_page

    if out.is_dir():
        raise FileExistsError(f"{out} is a directory; give the name of a file, such as {out / 'analysis.json'}")
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists already; choose another path or replace it with --force")
    return check_page(out, force=True)
