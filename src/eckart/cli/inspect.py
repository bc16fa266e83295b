"""``eckart inspect``: what each weight's singular values say about its rank."""

from __future__ import annotations

from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from eckart.cli._options import Device, Dtype, Json, Model, Quiet, Where, load_model, prepare
from eckart.cli._output import console, print_json, shortened, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eckart.analysis import LayerSpectrum

_LEGEND = """\
stable: energy (sum of squared singular values) over its largest term.
effective: exp of the entropy of the singular values.
10%, 25%, 50%: percentage of the energy in this part of full rank.
break-even: rank from which two plain factors save nothing; pivoted ones save
at every rank below full."""


def command(
    model: Model,
    where: Where = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print what each weight's spectrum says about its rank."""
    prepare(dtype, device)
    from eckart.analysis import spectra
    from eckart.models import block_of, blocks, linears

    loaded, _ = load_model(model, dtype, device, progress=not quiet)
    found = spectra(loaded, where=where or None, progress=not quiet)
    skipped = linears(loaded, where or None).skipped
    if as_json:
        left = [{"name": s.name, "reason": s.reason, "parameters": s.parameters} for s in skipped]
        print_json({"model": model, "layers": [layer.to_dict() for layer in found], "skipped": left})
        return
    repeated = blocks(loaded)
    homes = {layer.name: block_of(layer.name, repeated) for layer in found}
    out = console()
    if found:
        _print_layers(found, {name: block.list_name if block else "" for name, block in homes.items()})
        out.print()
    parameters = sum(layer.shape[0] * layer.shape[1] for layer in found)
    out.print(f"{len(found)} weights, {parameters:,} parameters; figures of the weights alone.")
    out.print(_LEGEND)
    for entry in skipped[:5]:
        line = f"left alone: {entry.name}: {entry.reason} ({entry.parameters:,} parameters)"
        out.print(line, markup=False, soft_wrap=True)
    if len(skipped) > 5:
        out.print(f"left alone: {len(skipped) - 5} more, see --json")


def _print_layers(found: Sequence[LayerSpectrum], home: Mapping[str, str]) -> None:
    """One row a weight under the name of the list that its block is in, then one row a kind."""
    from eckart.analysis import FRACTIONS

    shown = table("layer", ">shape", ">stable", ">effective", *(f">{f:.0%}" for f in FRACTIONS), ">break-even")
    for name, group in groupby(found, key=lambda layer: home[layer.name]):
        shown.add_row(shortened(name or "(outside the blocks)", "bold"))
        for layer in group:
            shown.add_row(shortened(layer.name.removeprefix(f"{name}.")), *_cells([layer]))
    kinds = _kinds(found, home)
    if len(kinds) < len(found):
        shown.add_row()
        shown.add_row(shortened("median of each kind", "bold"))
        for kind, members in kinds:
            shown.add_row(shortened(f"{kind} ({len(members)})"), *_cells(members))
    console().print(shown)


def _kinds(found: Sequence[LayerSpectrum], home: Mapping[str, str]) -> list[tuple[str, list[LayerSpectrum]]]:
    """The weights of one name but for the numbers in it, and of one shape."""
    from eckart.compression.budget import kinds_of

    kinds = kinds_of([layer.name for layer in found])
    several = len(set(home.values())) > 1
    made: dict[tuple[str, tuple[int, int]], list[LayerSpectrum]] = {}
    for layer in found:
        kind = kinds[layer.name] if several else kinds[layer.name].removeprefix(f"{home[layer.name]}.")
        made.setdefault((kind, layer.shape), []).append(layer)
    return [(kind, members) for (kind, _), members in made.items()]


def _cells(layers: Sequence[LayerSpectrum]) -> list[str]:
    """The figures of one weight, or the medians of several of one shape."""
    m, n = layers[0].shape

    def middle(figure: Any) -> float:
        return median(figure(layer) for layer in layers)

    return [
        f"{m}x{n}",
        f"{middle(lambda layer: layer.stable_rank):.1f}",
        f"{middle(lambda layer: layer.effective_rank):.0f}",
        *(f"{100 * middle(lambda layer, i=i: layer.energy[i]):.1f}" for i in range(len(layers[0].energy))),
        str(layers[0].break_even_rank),
    ]
