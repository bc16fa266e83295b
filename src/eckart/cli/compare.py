"""``eckart compare``: what lies between two models of the same weights, and the published repair of the second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eckart.cli._layers import GAP, Column, by_kind, fitting, home, print_skipped, shape
from eckart.cli._options import Json, Quiet, Where, load_model, one_of, prepare
from eckart.cli._output import console, print_json, shortened, table

if TYPE_CHECKING:
    from rich.console import Console

    from eckart.analysis import Comparison, LayerDifference, Reduction

_FORMS = ("dense", "adapter", "same-rank")
# From left to right; the numbers say which are dropped first for want of room.
_COLUMNS = (
    (0, Column("change", lambda one: 100 * one.change, 2, "change: size of the difference, percent of the first.")),
    (2, Column("stable", lambda one: one.stable_rank, 1, "stable: energy of the difference over its largest term.")),
    (8, Column("effective", lambda one: one.effective_rank, 0, "effective: its exp of entropy, a rank.")),
    (7, Column("first 8", lambda one: 100 * one.energy[1], 1, "first 8: percent of its energy in 8 directions.")),
    (
        3,
        Column(
            "out",
            lambda one: 100 * one.output_overlap,
            1,
            "out, in: percent of it inside the first's leading output, input directions.",
        ),
    ),
    (4, Column("in", lambda one: 100 * one.input_overlap, 1, "")),
    (
        5,
        Column(
            "turn out",
            lambda one: math.degrees(one.output_angle),
            0,
            "turn: largest angle between the leading directions of the two, degrees.",
        ),
    ),
    (6, Column("turn in", lambda one: math.degrees(one.input_angle), 0, "")),
    (
        1,
        Column(
            "intruders",
            lambda one: one.intruders,
            0,
            "intruders: leading output directions of the second that the first has nowhere.",
        ),
    ),
)


def command(
    a: Annotated[str, typer.Argument(help="The first model, such as the base: a directory, a hub name, or `demo`.")],
    b: Annotated[str, typer.Argument(help="The second: the same, or the directory of an adapter on the first.")],
    where: Where = None,
    top: Annotated[int, typer.Option(min=1, help="How many leading directions of each weight are looked at.")] = 10,
    threshold: Annotated[float, typer.Option(help="Cosine below which a direction is an intruder.")] = 0.5,
    reduce: Annotated[
        float | None,
        typer.Option(
            metavar="SCALE",
            help="Write the second model with its intruders times this: 1 changes nothing, 0 removes them.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write the reduced model to.")] = None,
    form: Annotated[
        str,
        typer.Option(
            help="What to write: a dense model, an exact adapter on the first model, or one of the second's rank "
            "(dense, adapter, same-rank)."
        ),
    ] = "dense",
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it holds a model.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print how two models of the same weights differ; neither is changed."""
    one_of("--form", form, _FORMS)
    if (reduce is None) != (out is None):
        raise ValueError("--reduce and --out go together: how much of the intruders is left, and where to write that")
    prepare("auto", "cpu")
    from eckart.analysis import IntruderDimensions, compare
    from eckart.models import check_target

    options = IntruderDimensions(top=top, threshold=threshold)
    if out is not None:
        check_target(out, force=force)
    found = compare(a, b, where=where or None, options=options, progress=not quiet)
    written: dict[str, Any] = {}
    if reduce is not None and out is not None:
        done = _reduce(a, b, reduce, out, options, where, form, force=force, quiet=quiet)
        written = {"out": str(out), "form": form, "scale": reduce, "intruders": done.intruders, "layers": done.rows}
    if as_json:
        print_json({"a": a, "b": b, **found.to_dict(), **({"reduced": written} if written else {})})
        return
    screen = console()
    legend = _print_layers(screen, found.layers)
    _print_summary(screen, found, threshold)
    for line in legend:
        screen.print(line)
    for line in found.warnings:
        screen.print(f"note: {line}", markup=False, soft_wrap=True)
    print_skipped(screen, found.skipped)
    if written:
        line = f"wrote {out}: {written['intruders']} intruders times {reduce:g}, {form}"
        screen.print(line, markup=False, soft_wrap=True)


def _reduce(
    a: str, b: str, scale: float, out: Path, options: Any, where: Any, form: Any, *, force: bool, quiet: bool
) -> Reduction:
    """Load the two as a whole, reduce the intruders of the second, and write it whole or not at all."""
    from eckart.analysis import reduce_intruders
    from eckart.models import atomic_directory, save
    from eckart.models.adapter_files import is_adapter, load_adapter

    base, tokenizer = load_model(a, "auto", "cpu", progress=not quiet)
    if is_adapter(b):
        model, base = load_adapter(base, b), None
    else:
        model, own = load_model(b, "auto", "cpu", progress=not quiet)
        tokenizer = own or tokenizer
    done = reduce_intruders(
        model,
        base,
        scale,
        form=form,
        top=options.top,
        threshold=options.threshold,
        where=where or None,
        progress=not quiet,
    )
    if form == "dense":
        save(done.model, out, tokenizer, force=force)
    else:
        with atomic_directory(out, force=force) as directory:
            done.model.save_pretrained(str(directory))
    return done


def _print_layers(out: Console, found: Sequence[LayerDifference]) -> list[str]:
    """One row a weight under the name of the list that its block is in, then one a kind; what the columns mean."""
    labels = {layer.name: layer.name.removeprefix(f"{home(layer.name)}.") for layer in found}
    kinds = by_kind(found)
    shapes = max(len(shape(layer)) for layer in found)
    room = out.width - max(map(len, [*labels.values(), *kinds, "median of each kind"])) - shapes
    order = [column.title for _, column in sorted(_COLUMNS, key=lambda pair: pair[0])]
    columns = fitting([column for _, column in _COLUMNS], order, room - 2 * GAP)
    shown = table("layer", ">shape", *(f">{column.title}" for column in columns))
    for name, group in groupby(found, key=lambda layer: home(layer.name)):
        shown.add_row(shortened(name or "(outside the blocks)", "bold"))
        for layer in group:
            shown.add_row(shortened(labels[layer.name]), *_cells(columns, [layer]))
    if len(kinds) < len(found):
        shown.add_row()
        shown.add_row(shortened("median of each kind", "bold"))
        for kind, members in kinds.items():
            shown.add_row(shortened(kind), *_cells(columns, members))
    out.print(shown)
    out.print()
    return [column.legend for column in columns if column.legend]


def _print_summary(out: Console, found: Comparison, threshold: float) -> None:
    figures = found.figures
    out.print(f"{figures['weights']} weights, {figures['changed']} changed; {figures['intruders']} intruders")
    robust = figures["robust_intruders"]
    out.print(f"below a cosine of {threshold:g}, {robust} if near-equal singular values count as one.")
    pairs = zip(found.thresholds, figures["counts"], strict=True)
    out.print("by threshold: " + ", ".join(f"{at:g}: {count}" for at, count in pairs))


def _cells(columns: Sequence[Column], layers: Sequence[LayerDifference]) -> list[str]:
    """The figures of one weight, or the medians of several of one shape."""
    figures = [(median(column.figure(layer) for layer in layers), column.digits) for column in columns]
    return [shape(layers[0]), *("-" if math.isinf(value) else f"{value:.{digits}f}" for value, digits in figures)]
