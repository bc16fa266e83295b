"""``eckart methods``: the catalog, or one method with its paper, equation and options."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from typing import Annotated, Any

import typer

from eckart import catalog
from eckart.cli import _docstring
from eckart.cli._output import console, print_json


def command(
    name: Annotated[str, typer.Argument(help="Show this method alone, in full.")] = "",
    family: Annotated[str, typer.Option(help="Only methods of this family, for instance compression.")] = "",
    status: Annotated[str, typer.Option(help=f"Only methods of this status: {', '.join(catalog.STATUSES)}.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the published methods, or show one with its paper, equation and options."""
    if name:
        page = describe(catalog.get(name, family=family or None))
        print_json(page) if as_json else _print_page(page)
        return
    rows = catalog.select(family=family or None, status=status or None)
    print_json([dataclasses.asdict(row) for row in rows]) if as_json else _print_table(rows)


def describe(method: catalog.Method) -> dict[str, Any]:
    """Everything there is to say about one method; a planned one has no code to read it from."""
    page = {**dataclasses.asdict(method), "summary": "", "equation": "", "options": []}
    if method.target is not None:
        target = method.load()
        doc = sys.modules[target.__module__].__doc__
        page |= {
            "summary": _docstring.summary(doc),
            "equation": _docstring.equation(doc),
            "options": _options(target),
        }
    return page


def _options(target: Any) -> list[dict[str, Any]]:
    """The fields of a method's options, which are a dataclass."""
    meanings: dict[str, str] = {}
    for ancestor in reversed(target.__mro__):
        meanings |= _docstring.entries(ancestor.__doc__)
    return [
        {
            "name": field.name,
            "type": str(field.type),
            "default": _default(field),
            "meaning": meanings.get(field.name, ""),
        }
        for field in dataclasses.fields(target)
        if field.init
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


def _print_table(rows: tuple[catalog.Method, ...]) -> None:
    from rich.text import Text

    out = console()
    width = max((len(row.name) for row in rows), default=0)
    family = ""
    for row in rows:
        if row.family != family:
            family = row.family
            out.print(Text(family, style="bold"))
        facts = f"{row.status:<12}  {row.year or '':<4}  {row.arxiv or '':<10}"
        # not a rich table: that would shorten every column on a narrow terminal, here the title alone is cut
        out.print(Text(f"  {row.name:<{width}}  {facts}  {row.title}"), no_wrap=True, overflow="ellipsis")
    counts = Counter(row.status for row in rows)
    parts = ", ".join(f"{counts[status]} {status}" for status in catalog.STATUSES if counts[status])
    out.print(f"\n{len(rows)} methods: {parts}" if rows else "no such methods")


def _print_page(page: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    out.print(f"[bold]{page['name']}[/bold]  {page['family']}, {page['status']}\n")
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_row("Paper", Text(page["title"]))
    facts.add_row("Year", str(page["year"] or "unknown"))
    facts.add_row("arXiv", page["arxiv"] or "none")
    if page["reference"]:
        facts.add_row("Reference", Text(page["reference"]))
    if page["target"]:
        facts.add_row("Needs", ", ".join(page["needs"]) or "no calibration data")
        facts.add_row("Code", page["target"])
    out.print(facts)
    if page["summary"]:
        out.print("\n" + page["summary"], markup=False)
    if page["equation"]:
        out.print("\n" + "\n".join("    " + line for line in page["equation"].splitlines()), markup=False)
    if page["options"]:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("Option", "Type", "Default", "Meaning"):
            table.add_column(heading)
        for option in page["options"]:
            # Text, because a type such as list[str] would be read as markup
            table.add_row(*(Text(option[key]) for key in ("name", "type", "default", "meaning")))
        out.print()
        out.print(table)
    if not page["target"]:
        out.print("\nPlanned: no code yet.")
