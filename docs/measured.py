"""What the benchmarks found, as Markdown: the rows of one method, and a page for every job."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples import DocsError
from markdown_text import paragraphs, prose, table

from eckart import catalog
from eckart.cli import _docstring

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METHOD_NAMES = {method.name for method in catalog.METHODS}
# how a row was made: said once below a table, not in a column
CIRCUMSTANCES = ("benchmark", "calibration", "evaluation", "command", "versions", "hardware")
SEARCHED = ("tried", "by rate", "by seed")  # names of figures that a choice was made by
LONGEST = 5  # figures by step or by epoch that are shown one by one; more of them are a curve


def jobs() -> dict[str, Any]:
    """What the result files hold, by the name of their benchmark."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}


def reasons() -> dict[str, str]:
    """Why a method has no measured row, by its name."""
    return tomllib.loads((ROOT / "benchmarks" / "not_measured.toml").read_text(encoding="utf-8"))


def of_method(name: str) -> str:
    """The measured rows of a method as Markdown, or the reason why there are none.

    Raises:
        DocsError: Neither.
    """
    found = [section for job, data in jobs().items() if (section := _section(job, list(_rows_of(data, name, ""))))]
    if found:
        return "\n\n".join(found)
    if name not in reasons():
        raise DocsError(f"{name}: no row in benchmarks/results and no reason in benchmarks/not_measured.toml; add one")
    return f"Not measured: {prose(reasons()[name])}."


def job_page(job: str, data: Any) -> str:
    """The page of a benchmark: what it does, its picture, every row, and how to run it again.

    Raises:
        DocsError: The benchmark has no script, or its file holds neither rows nor figures.
    """
    summary, text = _introduction(job)
    dashed = job.replace("_", "-")
    lines = [f"# {dashed}", prose(summary)]
    if (ROOT / "docs" / f"{dashed}.md").exists():
        lines.append(f"What it says, in words: [{dashed}](../{dashed}.md).")
    if (ROOT / "docs" / "images" / f"{dashed}.png").exists():
        lines.append(f"![{prose(summary)}](../images/{dashed}.png)")
    rows = _all_rows(data)
    if not rows:
        raise DocsError(f"benchmarks/results/{job}.json holds neither `rows` nor `figures`; write one of them")
    lines += ["## Rows", _rows(rows, with_method=True), "## How it was measured", paragraphs(text)]
    lines.append(_circumstances(job, rows[0][1]))
    return "\n\n".join(line for line in lines if line) + "\n"


def index() -> str:
    """The page that lists every benchmark with results, and every method without."""
    listed = [[f"[{job.replace('_', '-')}]({job}.md)", prose(_introduction(job)[0])] for job in jobs()]
    missing = [[f"`{name}`", prose(reason)] for name, reason in reasons().items()]
    lines = [
        "# Measured",
        "Every figure was written by a script in `benchmarks/`, with versions, hardware and the command. Rows that "
        "lose stay, and a method without a row has a reason. Speeds depend on the machine: compare within one table.",
        table(["benchmark", "what it measures"], listed),
    ]
    if missing:
        lines += ["## Not measured", table(["method", "reason"], missing)]
    return "\n\n".join(lines) + "\n"


def _introduction(job: str) -> tuple[str, str]:
    """Summary and text of a benchmark's docstring; the last lines of it, how it is called, stay out."""
    script = ROOT / "benchmarks" / f"{job}.py"
    if not script.exists():
        raise DocsError(f"benchmarks/results/{job}.json has no benchmarks/{job}.py that wrote it")
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    rest = [part for part in doc.split("\n\n")[1:] if not part.startswith("python benchmarks/")]
    return _docstring.summary(doc), "\n\n".join(rest)


def _all_rows(data: Any) -> list[tuple[str, dict[str, Any]]]:
    """Every row of a benchmark, with its key where it has one; figures without rows are one row."""
    if isinstance(data, dict) and "figures" in data:
        return [("", data)]
    rows = data.get("rows", []) if isinstance(data, dict) else data
    return list(rows.items()) if isinstance(rows, dict) else [("", row) for row in rows]


def _rows_of(data: Any, name: str, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a method at any depth, each with the key that it stands under."""
    if isinstance(data, dict):
        if data.get("method") == name:
            yield label, data
            return
        for key, value in data.items():
            yield from _rows_of(value, name, key)
    elif isinstance(data, list):
        for value in data:
            yield from _rows_of(value, name, label)


def _section(job: str, rows: list[tuple[str, dict[str, Any]]]) -> str:
    if not rows:
        return ""
    dashed = job.replace("_", "-")
    lines = [f"### {dashed}", f"{prose(_introduction(job)[0])} [All rows](../../measured/{job}.md)"]
    return "\n\n".join([*lines, _rows(rows, with_method=False), _circumstances(job, rows[0][1])])


def _rows(rows: list[tuple[str, dict[str, Any]]], *, with_method: bool) -> str:
    """One row upright, several as a table without the columns in which they agree."""
    flat = [_cells(row) for _, row in rows]
    if len(flat) == 1:
        return table(["figure", "value"], [[prose(key), value] for key, value in flat[0].items()], right=(1,))
    own = [row.get("method") in METHOD_NAMES for _, row in rows]
    names = [prose(label or str(row.get("name") or row.get("method", ""))) for label, row in rows]
    names = [name if mine else f"*{name}*" for name, mine in zip(names, own, strict=True)]
    keys = list(dict.fromkeys(key for cells in flat for key in cells if key not in ("name", "case", "baseline")))
    same = [key for key in keys if len({cells.get(key) for cells in flat}) == 1]
    keys = [key for key in keys if key not in same]
    body = [[cells.get(key, "") for key in keys] for cells in flat]
    head = [prose(key) for key in keys]
    if with_method or len(set(names)) > 1:
        head, body = ["row", *head], [[name, *cells] for name, cells in zip(names, body, strict=True)]
    figures = [i for i in range(len(head)) if all(re.fullmatch(r"[-\d][\d.,e+-]*( MB)?|", cells[i]) for cells in body)]
    made = table(head, body, right=figures)
    notes = [] if all(own) else ["Rows in italics are baselines."]
    if agreed := ", ".join(f"{prose(key)} {flat[0][key]}" for key in same if flat[0][key]):
        notes.append(f"The same in all rows: {agreed}.")
    return "\n\n".join([made, " ".join(notes)] if notes else [made])


def _cells(row: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The figures of a row by name. Curves and what was tried by rate or by seed stay in the file."""
    found: dict[str, str] = {}
    for key, value in row.items():
        name = prefix + key
        if isinstance(value, dict) and key not in CIRCUMSTANCES:
            curve = len(value) > LONGEST and all(map(_is_number, value))
            if not curve and not any(word in key for word in SEARCHED):
                found |= _cells(value, "" if key == "figures" else f"{name}: ")
        elif key not in (*CIRCUMSTANCES, "method") and not isinstance(value, list | dict) and value is not None:
            found[name] = _figure(name, value)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _figure(name: str, value: Any) -> str:
    """A figure to four digits; bytes as megabytes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return prose(str(value))
    if isinstance(value, int):
        in_bytes = ("memory" in name or "bytes" in name) and abs(value) >= 10**5
        return f"{value / 1e6:,.1f} MB" if in_bytes else f"{value:,}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"


def _circumstances(job: str, row: dict[str, Any]) -> str:
    """Where and with what the first row was measured, and how to do it again."""
    facts = []
    for key in ("calibration", "evaluation", "hardware", "versions"):
        value = row.get(key)
        if isinstance(value, dict):
            value = ", ".join(f"{name} {inner}" for name, inner in value.items())
        if value:
            facts.append(f"{key}: {prose(str(value))}")
    command = row.get("command") or f"python benchmarks/{job}.py"
    return "".join(fact + "; " for fact in facts) + f"again: `{command}`." if facts else f"Again: `{command}`."
