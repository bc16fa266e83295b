"""From figures to one HTML file that loads nothing from anywhere, written whole or not at all."""

from __future__ import annotations

import contextlib
import html
import json
import os
import secrets
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

__all__ = ["check_page", "encode", "render", "write_pages"]

_SCRIPTS = ("charts.js", "map.js", "details.js", "report.js")
# What every report begins with, and every file of its figures: the mark by which one may be replaced.
_MARKS = ("<!doctype html>\n<!-- Eckart report -->", '{"eckart":')


def encode(figures: Mapping[str, Any]) -> str:
    r"""The figures as JSON that may stand inside a script element: no ``<``, which could end it.

    Example:
        >>> encode({"name": "</script>"})
        '{"name":"\\u003c/script>"}'
    """
    return json.dumps(figures, separators=(",", ":"), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")


def render(figures: Mapping[str, Any]) -> str:
    """The page.

    Args:
        figures: what `report_figures` returns.
    """
    assets = files(__package__) / "assets"
    text = {name: (assets / name).read_text(encoding="utf-8") for name in ("template.html", "style.css", *_SCRIPTS)}
    return Template(text["template.html"]).substitute(
        version=html.escape(figures["eckart"]),
        title=html.escape(figures["model"]["name"]),
        style=text["style.css"],
        figures=encode(figures),
        script="\n".join(text[name] for name in _SCRIPTS),
    )


def check_page(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Say where a report will be written, or refuse, before any work is done for it.

    Args:
        path: the file to write.
        force: replace whatever file is there; without it, only a report is replaced.

    Returns:
        The absolute path.

    Raises:
        FileExistsError: there is another file or a directory.
        FileNotFoundError: there is no such directory.
        PermissionError: nothing can be written there.
    """
    target = Path(path).expanduser().resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {target.parent}; choose another path")
    if target.is_dir():
        raise FileExistsError(f"{path} is a directory; give the name of a file, such as {path}/report.html")
    if target.exists() and not force and not _is_report(target):
        raise FileExistsError(f"{path} exists and is no report; choose another path or replace it with --force")
    return target


def write_pages(texts: Mapping[Path, str]) -> None:
    """Write files, all of them whole or none: they get their names once all are on disk.

    Raises:
        OSError: the operating system refused (no permission, no space); files that were there are as before.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_pages({folder / "report.html": "<!doctype html>"})
        >>> [file.name for file in folder.iterdir()]
        ['report.html']
    """
    partial = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial") for path in texts}
    try:
        for path, text in texts.items():
            partial[path].write_text(text, encoding="utf-8")
        for path, made in partial.items():
            os.replace(made, path)
    finally:
        for made in partial.values():
            with contextlib.suppress(OSError):
                made.unlink(missing_ok=True)


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(64)
    return any(start.startswith(mark.encode()) for mark in _MARKS)
