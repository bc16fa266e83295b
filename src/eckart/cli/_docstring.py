"""Reads a method's page out of its source: the displayed equation and what each option means."""

from __future__ import annotations

import inspect
import re

_ENTRY = re.compile(r"(\*{0,2}\w+)(?:\s*\([^)]*\))?:\s+(.*)")


def summary(doc: str | None) -> str:
    r"""The first paragraph of a docstring, on one line.

    Example:
        >>> summary("Keeps the largest part.\n\n    y = x\n")
        'Keeps the largest part.'
    """
    return " ".join(inspect.cleandoc(doc or "").partition("\n\n")[0].split())


def equation(doc: str | None) -> str:
    r"""The first indented block of a docstring, without its indentation; empty where there is none.

    Example:
        >>> print(equation("Keeps the largest part.\n\n    W_k = U_k diag(s_k) V_k^T\n\nThe paper says."))
        W_k = U_k diag(s_k) V_k^T
    """
    block: list[str] = []
    for line in inspect.cleandoc(doc or "").splitlines():
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line)
        elif block:
            break
    return inspect.cleandoc("\n" + "\n".join(block)).rstrip()


def entries(doc: str | None) -> dict[str, str]:
    r"""What the ``Args`` and ``Attributes`` sections of a docstring say of each name.

    Example:
        >>> entries("Options.\n\nAttributes:\n    rank: How many\n        directions stay.\n")
        {'rank': 'How many directions stay.'}
    """
    found: dict[str, str] = {}
    inside, current = False, ""
    for line in inspect.cleandoc(doc or "").splitlines():
        if line and not line.startswith(" "):
            inside, current = line.strip() in ("Args:", "Attributes:"), ""
        elif inside and (match := _ENTRY.match(line.strip())) and len(line) - len(line.lstrip()) <= 4:
            current = match[1].lstrip("*")
            found[current] = match[2].strip()
        elif inside and current and line.strip():
            found[current] += " " + line.strip()
    return found
