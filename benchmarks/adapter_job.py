"""What the jobs that compare adapters share: the rank that makes counts equal, and a file that rows are added to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from eckart import catalog
from eckart.adapters.config import EckartConfig
from eckart.adapters.site import site_of
from eckart.models import linears


def built() -> list[str]:
    """Names of the adapters that there are."""
    return [row.name for row in catalog.select(family="adapters") if row.status != "planned"]


def lora_parameters(model: nn.Module, rank: int) -> int:
    """Trained numbers of a LoRA of this rank on every linear of the blocks."""
    return rank * sum(sum(ref.shape) for ref in linears(model).linears)


def rank_for(method: str, model: nn.Module, parameters: int) -> int:
    """The rank whose trained numbers are nearest to ``parameters``, over all the linears that the method adapts."""
    config = EckartConfig(method=method)
    rule = config.build_method()
    rule.configure(model, config)
    wanted = None if config.target_modules is None else set(config.target_modules)
    found = [site_of(ref.name, ref.module) for ref in linears(model).linears]
    sites = {site.name: site for site in found if site is not None and (wanted is None or site.name in wanted)}
    largest = min(site.largest_rank for site in sites.values())

    def distance(rank: int) -> float:
        if any(rule.check(site, rank) for site in sites.values()):
            return float("inf")
        return abs(rule.total_trainable(sites, dict.fromkeys(sites, rank)) - parameters)

    return min(range(1, largest + 1), key=distance)


def best_rate(judge: Callable[[float], float], rates: Sequence[float], factor: float = 3.0) -> dict[float, float]:
    """What each rate gives (less is better): of the given ones and, while the best is at an end, of up to two more."""
    found = {rate: judge(rate) for rate in rates}
    for _ in range(2):
        best = min(found, key=lambda rate: (found[rate] != found[rate], found[rate]))  # NaN is never the best
        if min(found) < best < max(found):
            break
        further = best / factor if best == min(found) else best * factor
        found[further] = judge(further)
    return found


def rows(path: Path) -> dict[str, Any]:
    """The rows of a results file, by name."""
    found: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    return found


def add_row(path: Path, name: str, row: Mapping[str, Any]) -> None:
    """Add or replace one row."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"benchmark": path.stem, "rows": rows(path) | {name: row}}, indent=1) + "\n"
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def write_table(page: Path, columns: Mapping[str, Callable[[str, dict[str, Any]], str]], found: dict[str, Any]) -> None:
    """Replace what stands between the marks "<!-- table -->" and "<!-- end -->" of a page by a row for each entry."""
    head, mark, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, end, tail = rest.partition("<!-- end -->")
    if not (mark and end):
        raise SystemExit(f"{page} has no marks for a table")
    lines = ["| " + " | ".join(columns) + " |", "| --- " + "| ---: " * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(show(name, row) for show in columns.values()) + " |" for name, row in found.items()]
    page.write_text(head + mark + "\n".join(lines) + "\n" + end + tail, encoding="utf-8")


def each_in_its_process(script: str, names: Iterable[str], path: Path, *arguments: str) -> None:
    """Measure the rows that are missing, one process each, so that one's peak of memory is not the next one's too."""
    for name in names:
        if name not in rows(path):
            subprocess.run([sys.executable, script, "--only", name, *arguments], check=True)
