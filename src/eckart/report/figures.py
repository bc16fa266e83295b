"""Everything that the report shows, as plain numbers: the JSON of the page and of ``--json``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..analysis import LayerSpectrum
from ..analysis.spectra import spectra_of
from ..linalg import rank_for_ratio
from ..models.pairs import Pair, pair
from .advice import Advice, advise, noise_kept
from .difference import differences
from .source import Source

__all__ = ["MAP", "POINTS", "report_figures"]

#: Points that a spectrum is drawn with, fewer where there are very many layers, and at least so many.
POINTS, _ALL_POINTS, _FEWEST = 256, 150_000, 16

#: The figures that the heat map can show: where it stands in a layer's entry, what it is called and what it says.
MAP: tuple[dict[str, Any], ...] = (
    {
        "path": ["kept", "20%"],
        "title": "Energy kept when 20 % is removed",
        "unit": "share",
        "scale": "linear",
        "note": "Share of the squared singular values that the best factors keep when they save 20 % of the numbers. "
        "High: compress here first.",
    },
    {
        "path": ["stable_rank"],
        "title": "Stable rank",
        "unit": "number",
        "scale": "log",
        "note": "Squared Frobenius norm over the largest squared singular value. Low: a few directions dominate.",
    },
    {
        "path": ["effective_share"],
        "title": "Effective rank over size",
        "unit": "share",
        "scale": "linear",
        "note": "Exponential of the entropy of the singular values, over full rank. Low: few directions are in use.",
    },
    {
        "path": ["tail_exponent"],
        "title": "Tail exponent",
        "unit": "number",
        "scale": "linear",
        "note": "Power law of the tail of the squared singular values. Between 2 and 4 is usual for well trained "
        "weights; above 6 the tail is hardly one.",
    },
    {
        "path": ["above_noise"],
        "title": "Values above noise",
        "unit": "count",
        "scale": "linear",
        "note": "Singular values above the edge that pure noise with the same median would have.",
    },
)


@dataclass(frozen=True)
class _Place:
    """Where a weight stands in the map: the name of its block, its list's name, and its kind."""

    block: str
    home: str
    kind: str

    @classmethod
    def of(cls, name: str) -> _Place:
        """From the dotted name: the first number counts the blocks, what follows is the kind."""
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None or at == len(parts) - 1:
            return cls("", "", name)
        return cls(".".join(parts[: at + 1]), ".".join(parts[:at]), ".".join(parts[at + 1 :]))


def report_figures(
    model: Source, against: Source | None = None, *, method: str = "pifa", progress: bool = True
) -> dict[str, Any]:
    """All figures of a report.

    Args:
        model: the model.
        against: the model after a change, with the same weights by name and shape.
        method: which method of compression to suggest.
        progress: show a bar with the time left.

    Returns:
        Plain JSON values; infinite and undefined figures are None.

    Raises:
        ValueError: the two models do not have the same weights, or a weight has NaN or Inf entries; named by layer.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2))
        >>> found = report_figures(Source.of(tiny, "tiny"), progress=False)
        >>> len(found["layers"]), [kind["short"] for kind in found["kinds"]]
        (8, ['c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj'])
    """
    refs = model.selection.linears
    pairs = None if against is None else pair(model.selection, against.selection)
    layers = spectra_of(refs, progress=progress)
    places = [_Place.of(layer.name) for layer in layers]
    blocks = list(dict.fromkeys(place.block for place in places))
    kinds = list(dict.fromkeys(place.kind for place in places))
    points = max(_FEWEST, min(POINTS, _ALL_POINTS // max(1, len(layers))))
    about = model.about(layers)
    advice = None
    if layers and not model.compressed:
        advice = advise(layers, about["bytes"], {ref.name: ref.dtype.itemsize for ref in refs})
    entries = [
        {**_entry(layer, points), "block": blocks.index(place.block), "kind": kinds.index(place.kind)}
        for layer, place in zip(layers, places, strict=True)
    ]
    for entry in entries:
        entry["suggested_rank"] = advice.ranks[entry["name"]] if advice else None
        entry["saved_bytes"] = advice.saved[entry["name"]] if advice else None
    sizes = sorted({min(layer.shape) for layer in layers})
    skipped = model.selection.skipped
    return {
        "eckart": __version__,
        "model": about,
        "map": list(MAP),
        "blocks": _blocks(blocks, places),
        "kinds": _kinds(kinds, entries, advice),
        "points": {str(size): positions(size, points).tolist() for size in sizes},
        "advice": _command(advice, model.name, method),
        "layers": entries,
        "skipped": [asdict(one) for one in skipped],
        "against": None if against is None or pairs is None else _against(against, pairs, points, progress),
    }


def positions(size: int, points: int = POINTS) -> np.ndarray:
    """Ranks, from 1, at which a spectrum of ``size`` values is drawn: dense at both ends, thin in the middle.

    Example:
        >>> positions(5), positions(1000, 8)
        (array([1, 2, 3, 4, 5]), array([   1,    8,   63,  500,  501,  938,  993, 1000]))
    """
    if size <= points:
        return np.arange(1, size + 1)
    steps = np.round(np.geomspace(1, size / 2, points // 2)).astype(int)
    return np.unique(np.concatenate((steps, size + 1 - steps)))


def curves(s: torch.Tensor, points: int) -> dict[str, list[float]]:
    """A spectrum at `positions`, and the share of its energy up to there; five and six digits, for drawing.

    Args:
        s: (p,) singular values, descending.
        points: how many at most.
    """
    at = torch.from_numpy(positions(len(s), points)) - 1
    s = s.double()
    energy = (s / s[0].clamp_min(torch.finfo(s.dtype).tiny)).square().cumsum(0)
    energy = energy / energy[-1] if energy[-1] > 0 else torch.ones_like(s)
    return {
        "values": [float(f"{value:.5g}") for value in s[at].tolist()],
        "energy": [round(value, 6) for value in energy[at].tolist()],
    }


def _entry(layer: LayerSpectrum, points: int) -> dict[str, Any]:
    m, n = layer.shape
    noise = noise_kept((m, n), rank_for_ratio(m, n, 0.2, "pivoted"))
    return {
        **layer.to_dict(),
        "shape": [m, n],
        "effective_share": layer.effective_rank / min(m, n),
        "noise_kept": noise,  # what a random matrix of this shape keeps where the map says what this one does
        "spectrum": curves(layer.singular_values, points),
    }


def _blocks(blocks: list[str], places: list[_Place]) -> list[dict[str, str]]:
    """The rows of the map: the block's number, after what tells its list from others where there are several."""
    homes = {place.block: place.home for place in places}
    several = len({home for home in homes.values() if home}) > 1
    return [
        {"name": block, "label": (f"{homes[block].split('.')[0]} " if several else "") + block.rpartition(".")[2]}
        if block
        else {"name": "", "label": "outside"}
        for block in blocks
    ]


def _kinds(kinds: list[str], entries: list[dict[str, Any]], advice: Advice | None) -> list[dict[str, Any]]:
    """The columns of the map, and how well each kind of weight takes to the suggested ratio."""
    found = []
    for column, (kind, short) in enumerate(zip(kinds, _shortened(kinds), strict=True)):
        members = [entry for entry in entries if entry["kind"] == column]
        found.append(
            {
                "name": kind,
                "short": short,
                "count": len(members),
                "parameters": sum(entry["parameters"] for entry in members),
                "kept": median(entry["kept"]["20%"] for entry in members),
                "noise_kept": median(entry["noise_kept"] for entry in members),
                "saved_bytes": sum(entry["saved_bytes"] for entry in members) if advice else None,
            }
        )
    return found


def _shortened(names: list[str]) -> list[str]:
    """Each name's last parts, as few as tell it from the others.

    Example:
        >>> _shortened(["attn.c_proj", "mlp.c_proj", "mlp.c_fc"])
        ['attn.c_proj', 'mlp.c_proj', 'c_fc']
    """

    def ending(name: str, length: int) -> str:
        return ".".join(name.split(".")[-length:])

    short = []
    for name in names:
        length = 1
        while (
            ending(name, length) != name and sum(ending(other, length) == ending(name, length) for other in names) > 1
        ):
            length += 1
        short.append(ending(name, length))
    return short


def _command(advice: Advice | None, name: str, method: str) -> dict[str, Any] | None:
    if advice is None:
        return None
    out = f"{name.rstrip('/').rpartition('/')[2]}-compressed"
    words = ["eckart", "compress", name, "--method", method, "--ratio", f"{advice.ratio:g}", "--out", out]
    return {"method": method, "command": shlex.join(words), **advice.to_dict()}


def _against(source: Source, pairs: Sequence[Pair], points: int, progress: bool) -> dict[str, Any]:
    layers = spectra_of([both.second for both in pairs], progress=progress)
    entries = [
        {
            **_entry(layer, points),
            "difference": {**change.to_dict(), "spectrum": curves(change.singular_values, points)},
        }
        for layer, change in zip(layers, differences(pairs, progress=progress), strict=True)
    ]
    return {"model": source.about(layers), "layers": entries}
