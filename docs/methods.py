"""Pages of the methods, made from the catalog, the docstrings, the options and the measured rows."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any, Literal, get_args, get_origin

import measured
from examples import shown, source
from markdown_text import code, fenced, paragraphs, prose, table

from eckart import catalog
from eckart.catalog import Method
from eckart.cli import _docstring
from eckart.cli.methods import describe

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Examples|Yields|Note):\s*$", re.MULTILINE)


def built() -> list[Method]:
    """The methods that have code."""
    return [method for method in catalog.METHODS if method.target is not None]


def families() -> list[str]:
    """The families of these."""
    return list(dict.fromkeys(method.family for method in built()))


def page(method: Method) -> str:
    """The page of a method.

    Raises:
        DocsError: It has no example, or is neither measured nor has a reason.
    """
    target = method.load()
    file = f"src/{target.__module__.replace('.', '/')}.py"
    text = inspect.getsource(sys.modules[target.__module__])
    lines = [
        f"# {method.name}",
        _paper(method),
        f"- Family: [{method.family}](index.md)\n- Status: {method.status}\n- Needs: {_needs(method)}\n"
        f"- Class: {code(f'{target.__module__}.{target.__name__}')}\n"
        f"- In a terminal: {code(f'eckart methods {method.name}')}",
        "## The method",
        paragraphs(sys.modules[target.__module__].__doc__),
        "## Options",
        paragraphs(_SECTION.split(inspect.cleandoc(target.__doc__ or ""))[0]),
        _options(method, target),
        "## Example",
        *(fenced(source(test), "pycon") for test in shown(method)),
        "## Measured",
        measured.of_method(method.name),
        "## Source { data-search-exclude }",
        f'??? note "{file}"\n\n' + "\n".join(f"    {line}".rstrip() for line in fenced(text, "python").splitlines()),
    ]
    return "\n\n".join(lines) + "\n"


def family_page(family: str) -> str:
    """The page of a family: its methods, and those that are planned."""
    rows = catalog.select(family=family)
    listed = [
        [f"[{method.name}]({method.name}.md)", prose(_docstring.summary(_module_doc(method))), str(method.year or "")]
        for method in rows
        if method.target is not None
    ]
    planned = [[code(method.name), _paper(method).replace("\n\n", " ")] for method in rows if method.target is None]
    room = importlib.import_module(f"eckart.{family}").__doc__
    lines = [f"# {family}", paragraphs(room), table(["method", "in one sentence", "year"], listed, right=(2,))]
    if planned:
        lines += ["## Planned", "These have no code yet.", table(["method", "paper"], planned)]
    return "\n\n".join(line for line in lines if line) + "\n"


def index() -> str:
    """The page that lists the families."""
    everything = built()
    rows = []
    for family in families():
        names = [method.name for method in everything if method.family == family]
        links = ", ".join(f"[{name}]({family}/{name}.md)" for name in names)
        rows.append([f"[{family}]({family}/index.md)", str(len(names)), links])
    return (
        "\n\n".join(
            [
                "# Methods",
                f"{len(everything)} published methods in {len(rows)} families. Every page has the paper, the equation "
                "with its shapes, the options, an example that was run when this page was made, and what was measured.",
                table(["family", "methods", "names"], rows, right=(1,)),
            ]
        )
        + "\n"
    )


def _module_doc(method: Method) -> str | None:
    return sys.modules[method.load().__module__].__doc__


def _paper(method: Method) -> str:
    facts = [f"**{prose(method.title)}**"]
    if method.arxiv:
        facts.append(f"[arXiv:{method.arxiv}](https://arxiv.org/abs/{method.arxiv})")
    if method.year:
        facts.append(str(method.year))
    if method.reference and not method.arxiv:
        facts.append(prose(method.reference))
    also = f"\n\nAlso: {prose(method.reference)}" if method.reference and method.arxiv else ""
    return ", ".join(facts) + also


def _needs(method: Method) -> str:
    return ", ".join(map(code, method.needs)) or "no data"


def _options(method: Method, target: type) -> str:
    rows = [
        [code(option["name"]), code(_spelled_out(target, option)), code(option["default"]), prose(option["meaning"])]
        for option in describe(method)["options"]
    ]
    return table(["option", "type", "default", "meaning"], rows) if rows else "It has no options."


def _spelled_out(target: type, option: dict[str, Any]) -> str:
    """The type of an option, with the choices in place of a `Literal`'s name."""
    owner = next(kind for kind in target.__mro__ if option["name"] in vars(kind).get("__annotations__", {}))
    known = vars(sys.modules[owner.__module__])

    def spelled(match: re.Match[str]) -> str:
        alias = known.get(match[0])
        return " | ".join(map(repr, get_args(alias))) if get_origin(alias) is Literal else match[0]

    return re.sub(r"\b[A-Z]\w*\b", spelled, option["type"])
