"""``eckart inspect``: what each weight's singular values say about its rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from eckart.cli._layers import GAP, Column, by_kind, fitting, home, print_skipped, shape
from eckart.cli._options import Device, Dtype, Json, Model, Quiet, Where, load_model, prepare
from eckart.cli._output import console, print_json, shortened, table
from eckart.cli._sparkline import sparkline

if TYPE_CHECKING:
    from rich.console import Console

    from eckart.analysis import LayerSpectrum, SubspaceOverlaps
    from eckart.models import Selection


def _columns() -> tuple[list[Column], list[str]]:
    """All of them from left to right, and the titles in the order in which they are dropped for want of room, last."""
    from eckart.analysis import FRACTIONS, RATIOS

    parts = [
        Column(f"{f:.0%}", lambda layer, i=i: 100 * layer.energy[i], 1)  # type: ignore[misc]
        for i, f in enumerate(FRACTIONS)
    ]
    parts[0] = parts[0]._replace(legend="10%, 25%, 50%: percentage of the energy in this part of full rank.")
    keeps = [
        Column(f"keep {r:.0%}", lambda layer, key=f"{r:.0%}": 100 * layer.kept[key], 1)  # type: ignore[misc]
        for r in RATIOS
    ]
    keeps[1] = keeps[1]._replace(
        legend="keep 20%: percentage of the energy left when pivoted factors save 20 %.",
    )
    columns = [
        Column("stable", lambda one: one.stable_rank, 1, "stable: energy (sum of squares) over its largest term."),
        Column("entropy", lambda one: one.entropy_rank, 0, "entropy: exp of the entropy of the energies, a rank."),
        Column("effective", lambda one: one.effective_rank, 0, "effective: exp of the entropy of the singular values."),
        Column("condition", lambda one: one.condition, 0, "condition: largest over smallest singular value."),
        Column("alpha", lambda one: one.tail_exponent, 1, "alpha: exponent of the power law in the tail."),
        Column("KS", lambda one: one.tail_distance, 2, "KS: distance of the tail from that power law."),
        Column("noise", lambda one: one.above_noise, 0, "noise: singular values above the edge of noise."),
        *parts,
        *keeps,
        Column(
            "break-even",
            lambda one: one.break_even_rank,
            0,
            "break-even: rank from which two plain factors save nothing.",
        ),
    ]
    first = ["entropy", "alpha", "noise", "keep 20%", "stable", "effective", "KS", "condition"]
    return columns, [*first, *(column.title for column in columns if column.title not in first)]


def command(
    model: Model,
    where: Where = None,
    overlaps: Annotated[
        bool, typer.Option("--overlaps", help="Also how far layers of one kind share their leading subspaces.")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="Dimension of these subspaces.")] = 16,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print what each weight's spectrum says about its rank; the weights are read one by one."""
    prepare(dtype, device)
    from eckart.analysis.overlaps import subspace_overlaps_of
    from eckart.analysis.spectra import spectra_of

    chosen = _selection(model, where or None, dtype, device, progress=not quiet)
    found = spectra_of(chosen.linears, progress=not quiet)
    shared = subspace_overlaps_of(chosen.linears, rank, progress=not quiet) if overlaps else []
    if as_json:
        print_json(
            {
                "model": model,
                "layers": [layer.to_dict() for layer in found],
                **({"overlaps": [one.to_dict() for one in shared]} if overlaps else {}),
                "skipped": [asdict(one) for one in chosen.skipped],
            }
        )
        return
    out = console()
    legend = _print_layers(out, found) if found else []
    if overlaps:
        legend += _print_overlaps(out, shared)
    parameters = sum(layer.parameters for layer in found)
    out.print(f"{len(found)} weights, {parameters:,} parameters; figures of the weights alone.")
    for line in legend:
        out.print(line, soft_wrap=True)
    print_skipped(out, chosen.skipped)


def _selection(model: str, where: Any, dtype: str, device: str, *, progress: bool) -> Selection:
    """The weights of a checkpoint, read one by one if they can be and need not be converted or moved."""
    from eckart.models import linears, resolve
    from eckart.models.stored import LayoutError, has_safetensors, stored_linears

    path = resolve(model)
    if has_safetensors(path) and (dtype, device) == ("auto", "cpu"):
        try:
            return stored_linears(path, where)
        except LayoutError:
            pass  # transformers converts the tensors while it loads the model
    return linears(load_model(path, dtype, device, progress=progress)[0], where)


def _print_layers(out: Console, found: Sequence[LayerSpectrum]) -> list[str]:
    """One row a weight under the name of the list that its block is in, then one row a kind; what the columns mean."""
    kinds = by_kind(found)
    labels = [layer.name.removeprefix(f"{home(layer.name)}.") for layer in found]
    bars = 12 if out.width >= 120 else 8
    shapes = max(len(shape(layer)) for layer in found)
    room = out.width - max(map(len, [*labels, *kinds, "median of each kind"])) - bars - shapes
    columns = fitting(*_columns(), room - 2 * GAP)
    cells = _Cells(columns, bars, out.options.ascii_only)
    shown = table("layer", "spectrum", ">shape", *(f">{column.title}" for column in columns))
    for name, group in groupby(zip(labels, found, strict=True), key=lambda row: home(row[1].name)):
        shown.add_row(shortened(name or "(outside the blocks)", "bold"))
        for label, layer in group:
            shown.add_row(shortened(label), *cells.of([layer]))
    if len(kinds) < len(found):
        shown.add_row()
        shown.add_row(shortened("median of each kind", "bold"))
        for kind, members in kinds.items():
            shown.add_row(shortened(kind), *cells.of(members))
    out.print(shown)
    out.print()
    meaning = "spectrum: singular values over the largest, from the first to the last."
    return [meaning, *(column.legend for column in columns if column.legend)]


def _print_overlaps(out: Console, shared: Sequence[SubspaceOverlaps]) -> list[str]:
    """One row a kind: outputs, then inputs, each with the next layer, all others, and by chance; what that means."""
    if not shared:
        out.print("No two weights of one kind to compare.\n")
        return []
    homes = {home(name) for one in shared for name in one.names}
    shown = table("overlap of each kind", ">rank", ">out", ">all", ">random", ">in", ">all", ">random")
    for one in shared:
        kind = one.kind.removeprefix(f"{next(iter(homes))}.") if len(homes) == 1 else one.kind
        sides = zip(one.adjacent(), one.mean(), one.chance, strict=True)
        figures = [f"{figure:.3f}" for near, mean, chance in sides for figure in (median(near), mean, chance)]
        shown.add_row(shortened(f"{kind} ({len(one.names)})"), str(one.rank), *figures)
    out.print(shown)
    out.print()
    return [
        "out, in: share of the leading output, input directions that the next of its",
        "kind has, median; all: any other, mean; random: by chance.",
    ]


class _Cells(NamedTuple):
    """How a row is written."""

    columns: Sequence[Column]
    width: int
    ascii_only: bool

    def of(self, layers: Sequence[LayerSpectrum]) -> list[str]:
        """The figures of one weight, or the medians of several of one shape."""
        line = sparkline([layer.singular_values for layer in layers], self.width, ascii_only=self.ascii_only)
        figures = [(median(column.figure(layer) for layer in layers), column.digits) for column in self.columns]
        return [line, shape(layers[0]), *(_written(value, digits) for value, digits in figures)]


def _written(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1e}" if math.isfinite(value) and value >= 1e6 else f"{value:.{digits}f}"
