"""An analysis for people: its figures, its rows group by group, and the directions of locally linear maps in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eckart.cli._layers import GAP
from eckart.cli._output import console, shortened, table
from eckart.cli._training import print_figures

if TYPE_CHECKING:
    from rich.console import Console

    from eckart.analysis import Analysis

Row = dict[str, Any]

# What rows are grouped by, where two of them share it on average.
_HEADINGS = ("text", "map", "kind", "layer")
# Shown before all others where there is too little room.
_FIRST = ("ratio", "change", "degree", "logit")
# Token ids, which stand there as words, and what the name of a pair of heads says already.
_LEFT_OUT = ("id", "predicted", "outputs", "inputs", "writer_layer", "writer_head", "component", "reader_layer")
_SHORT = 4  # a longer list is no cell
_WORDS = 24  # characters that a cell of words is given at least


def worded(rows: list[Row], tokenizer: Any) -> list[Row]:
    """Rows with the words of their token ids, where they have any: those of locally linear maps.

    Args:
        rows: as in ``Analysis.rows``.
        tokenizer: None for a model without.

    Example:
        >>> worded([{"layer": "a", "intruders": 0}], None)
        [{'layer': 'a', 'intruders': 0}]
    """
    if not rows or tokenizer is None or "predicted" not in rows[0]:
        return rows
    from eckart.analysis.locally_linear import with_strings

    return [{**row, "predicted word": tokenizer.decode([row["predicted"]])} for row in with_strings(rows, tokenizer)]


def print_analysis(found: Analysis, model: str, *, written: Path | None = None) -> None:
    """Print everything that fits, a table for each group of figures.

    Args:
        found: with rows as :func:`worded` gives them.
        model: what the user called the model.
        written: the file that everything was written to.
    """
    out = console()
    out.print(f"{model}, {found.method}\n", style="bold", markup=False, soft_wrap=True)
    print_figures({name: _joined(value) if isinstance(value, list) else value for name, value in found.figures.items()})
    in_words = bool(found.rows) and "word" in found.rows[0]
    if found.rows:
        _print_rows(out, [_in_words(row) for row in found.rows] if in_words else found.rows)
    if in_words:
        _print_directions(out, found)
    out.print()
    for line in found.warnings:
        out.print(f"note: {line}", markup=False, soft_wrap=True)
    out.print(f"{found.seconds:.1f} s" + (f"; wrote {written}" if written else ""), markup=False, soft_wrap=True)


def _print_rows(out: Console, rows: Sequence[Row]) -> None:
    """A table for the rows that belong together, all with the same columns."""
    headings = _shared(rows)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in headings), []).append(row)
    names = [name for name in rows[0] if name not in (*headings, *_LEFT_OUT)]
    shown = _fitting(rows, [name for name in names if _is_cell(rows, name)], out.width)
    for values, members in groups.items():
        out.print()
        if headings:
            label = ", ".join(map(_label, headings, values))
            out.print(label, style="bold", markup=False, soft_wrap=True)
        made = table(*(name if _is_text(rows, name) else f">{name}" for name in shown))
        for row in members:
            made.add_row(*(shortened(_cell(row[name])) for name in shown))
        out.print(made)
    if len(shown) < len(names):
        out.print(f"{len(names) - len(shown)} more figures a row: --json")


def _label(name: str, value: Any) -> str:
    """A heading: a number with what it counts, or the name of a thing alone."""
    return f"{name} {value}" if isinstance(value, int) else str(value)


def _print_directions(out: Console, found: Analysis) -> None:
    """The leading singular directions of each whole map, in the words that they write and read."""
    for row in found.rows:
        if row["token"] != "all":
            continue
        values = found.tensors[f"s {row['text']}: {row['map']}"].tolist()
        label = f"text {row['text']}, {row['map']}: the model's next token is {row['predicted word']!r}"
        out.print(f"\n{label}", style="bold", markup=False, soft_wrap=True)
        made = table(">direction", ">singular value", "output words", "input words")
        for index, (written, read) in enumerate(zip(row["output words"], row["input words"], strict=True)):
            cells = (shortened(_quoted(words)) for words in (written, read))
            made.add_row(str(index + 1), _cell(values[index]), *cells)
        out.print(made)


def _in_words(row: Row) -> Row:
    """A row of a locally linear map as it is shown: names, words of its first direction, figures."""
    names = {key: row[key] for key in ("text", "map", "token")}
    words = {"word": "" if row["word"] is None else repr(row["word"]), "output words": _quoted(row["output words"][0])}
    figures = {key: value for key, value in row.items() if isinstance(value, float)}
    return {**names, **words, **figures}


def _quoted(words: Sequence[str]) -> str:
    return " ".join(map(repr, words))


def _shared(rows: Sequence[Row]) -> list[str]:
    """The columns that rows are grouped by: those that leave two rows a group on average."""
    taken: list[str] = []
    for name in _HEADINGS:
        if name in rows[0] and 2 * len({tuple(row[key] for key in (*taken, name)) for row in rows}) <= len(rows):
            taken.append(name)
    return taken


def _fitting(rows: Sequence[Row], names: Sequence[str], width: int) -> list[str]:
    """The columns that fit in so many characters, in their order; the first one is always there."""
    from rich.cells import cell_len

    taken: set[str] = set()
    for name in dict.fromkeys([*names[:1], *(name for name in _FIRST if name in names), *names]):
        longest = max(cell_len(_cell(row[name])) for row in rows)
        if _is_text(rows, name):
            longest = min(longest, _WORDS)
        width -= GAP + max(cell_len(name), longest)
        if width < 0 and taken:
            break
        taken.add(name)
    return [name for name in names if name in taken]


def _is_text(rows: Sequence[Row], name: str) -> bool:
    return any(isinstance(row[name], str) for row in rows)


def _is_cell(rows: Sequence[Row], name: str) -> bool:
    """Whether the values of a column are short enough for one."""
    return all(not isinstance(row[name], list) or len(row[name]) <= _SHORT for row in rows)


def _cell(value: Any) -> str:
    """A value in few characters.

    Example:
        >>> [_cell(value) for value in (1234, 0.123456, None, [0, 1], "a")]
        ['1,234', '0.1235', '-', '0, 1', 'a']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, list):
        return _joined(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _joined(values: Sequence[Any]) -> str:
    return ", ".join(map(_cell, values))
