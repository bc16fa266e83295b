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


def parts(doc: str | None) -> list[tuple[bool, str]]:
    r"""The paragraphs of a docstring in order, each with whether it is displayed, that is indented.

    Lines that are displayed lose their indentation; a blank line inside a displayed block stays.

    Example:
        >>> parts("One\nline.\n\n    a = b\n\n    c = d\n\nThe paper.")
        [(False, 'One\nline.'), (True, 'a = b\n\nc = d'), (False, 'The paper.')]
    """
    found: list[tuple[bool, list[str]]] = []
    fresh = True
    for line in inspect.cleandoc(doc or "").splitlines():
        displayed = line.startswith("    ")
        if not line.strip():
            fresh = True
        elif found and found[-1][0] == displayed and (displayed or not fresh):
            found[-1][1].extend([""] * fresh + [line])
            fresh = False
        else:
            found.append((displayed, [line]))
            fresh = False
    return [(displayed, inspect.cleandoc("\n" + "\n".join(lines))) for displayed, lines in found]


def equation(doc: str | None) -> str:
    r"""The first indented block of a docstring, without its indentation; empty where there is none.

    Example:
        >>> print(equation("Keeps the largest part.\n\n    W_k = U_k diag(s_k) V_k^T\n\nThe paper says."))
        W_k = U_k diag(s_k) V_k^T
    """
    return next((text for displayed, text in parts(doc) if displayed), "")


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
