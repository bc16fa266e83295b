"""Text as Markdown: docstrings are written for a terminal, so what Markdown would take for a mark is escaped."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from html import escape

from eckart.cli import _docstring

_SPECIAL = str.maketrans({character: f"&#{ord(character)};" for character in "&<>*_[]{}`|#\\~^$"})
_MARKS = re.compile(
    r"(?::\w+:)?(?P<ticks>`{1,2})(?P<code>.+?)(?P=ticks)"
    r"|(?P<arxiv>arXiv[: ]?\s?(?P<id>\d{4}\.\d{4,5}))"
    r"|(?P<url>https?://[^\s<>()]*[^\s<>().,;:])"
)


def prose(text: str) -> str:
    """Running text: code between backticks, arXiv identifiers and addresses stay what they are."""
    text, found, end = " ".join(text.split()), "", 0
    for match in _MARKS.finditer(text):
        found += text[end : match.start()].translate(_SPECIAL)
        end = match.end()
        if match["code"]:
            found += code(match["code"])
        elif match["id"]:
            found += f"[{match['arxiv']}](https://arxiv.org/abs/{match['id']})"
        else:
            found += f"<{match['url']}>"
    return found + text[end:].translate(_SPECIAL)


def code(text: str) -> str:
    """A code span that may stand in a cell of a table."""
    return f"<code>{escape(text, quote=False).translate(str.maketrans({'|': '&#124;', '`': '&#96;'}))}</code>"


def paragraphs(doc: str | None) -> str:
    """A docstring: paragraphs, lists, and what is indented in a block of its own."""
    found = []
    for displayed, text in _docstring.parts(doc):
        if displayed:
            found.append(fenced(text, "{ .text .no-copy }"))  # the button would lie over the equation
        elif text.startswith("- "):
            found.append("\n".join("- " + prose(item) for item in re.split(r"(?:^|\n)- ", text)[1:]))
        else:
            found.append(prose(text))
    return "\n\n".join(found)


def fenced(text: str, language: str) -> str:
    """A block of code, in a fence that does not occur in it."""
    fence = "`" * (max([2, *map(len, re.findall(r"`+", text))]) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table.

    Args:
        head: Names of the columns.
        rows: Cells, Markdown already.
        right: Columns of figures, which are set to the right.
    """
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])
