"""What every command prints in the same way: tables, JSON and one-line errors."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# A pipe has no width of its own; wide enough that nothing we print is cut or wrapped in a file.
_WIDTH_OF_A_PIPE = 300


def console() -> Console:
    """A rich console on standard output, as wide as the terminal or ``COLUMNS``, else very wide."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else _WIDTH_OF_A_PIPE, highlight=False)


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
