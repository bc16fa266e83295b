"""What every command prints in the same way: tables, JSON and one-line errors."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# A pipe has no width of its own; wide enough that nothing we print is cut or wrapped in a file.
_WIDTH_OF_A_PIPE = 300


def console() -> Console:
    """A rich console on standard output, as wide as the terminal or ``COLUMNS``, else very wide."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else _WIDTH_OF_A_PIPE, highlight=False)


def table(*titles: str) -> Table:
    """A table without lines; a column whose title starts with ``>`` is set to the right.

    No cell wraps. Where the terminal is too narrow, what is cut is the text in `shortened` cells.
    """
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        right = title.startswith(">")
        # rich narrows the columns that may wrap before all others, and those are the ones set to the left
        made.add_column(title.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return made


def shortened(text: str, style: str = "") -> Text:
    """A cell that ends in an ellipsis where there is too little room for it."""
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def print_json(value: Any) -> None:
    """Prints JSON to standard output; a float that JSON cannot say (NaN, infinity) becomes null.

    Args:
        value: Dictionaries, lists, tuples, strings, numbers, booleans and ``None``.
    """
    sys.stdout.write(json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_error(message: str) -> None:
    """Prints ``eckart: error: message`` as one line to standard error."""
    print_note("error", message)


def print_note(kind: str, message: str) -> None:
    """Prints ``eckart: kind: message`` as one line to standard error."""
    sys.stderr.write(f"eckart: {kind}: {' '.join(message.split())}\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value
