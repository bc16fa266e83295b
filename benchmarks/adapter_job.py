"""What the jobs that compare adapters share: the rank that makes counts equal, and a file that rows are added to."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart import catalog
from eckart.adapters.config import EckartConfig
from eckart.adapters.site import site_of
from eckart.models import linears


def built() -> list[str]:
    """Names of the adapters that there are, but for LoRA: PEFT's, the same function, is a baseline."""
    return [row.name for row in catalog.select(family="adapters") if row.status != "planned" and row.name != "lora"]


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


def lora_config(model: nn.Module, rank: int, **options: Any) -> Any:
    """PEFT's LoRA on every linear of the blocks, with a scale of 1."""
    from peft import LoraConfig

    names = [ref.name for ref in linears(model).linears]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=names, **options)


class Training:
    """AdamW on what is trained, clipped, with one cycle of the rate; tells our adapters of each step.

    Args:
        model: Built, in training mode.
        rate: Largest learning rate.
        steps: How many there will be.
    """

    def __init__(self, model: Any, rate: float, steps: int) -> None:
        self.model, self.steps = model, steps
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, total_steps=steps + 1, pct_start=0.1)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Mapping[str, Any]) -> None:
        """One optimizer step."""
        begin = time.perf_counter()
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        if hasattr(getattr(self.model, "base_model", None), "on_step"):
            self.model.base_model.on_step(len(self.losses) + 1, self.steps)  # the gradients are still there
        self.optimizer.zero_grad()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(float(loss.detach()))


def best(found: Mapping[float, float]) -> float:
    """The rate whose figure is least; NaN is never the best."""
    return min(found, key=lambda rate: (found[rate] != found[rate], found[rate]))


def best_rate(judge: Callable[[float], float], rates: Sequence[float], factor: float = 3.0) -> dict[float, float]:
    """What each rate gives (less is better): of the given ones and, while the best is at an end, of up to two more."""
    found = {rate: judge(rate) for rate in rates}
    for _ in range(2):
        rate = best(found)
        if min(found) < rate < max(found):
            break
        further = rate / factor if rate == min(found) else rate * factor
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


def write_table(
    page: Path,
    columns: Mapping[str, Callable[[str, dict[str, Any]], str]],
    found: dict[str, Any],
    mark: str = "table",
) -> None:
    """Replace what stands between the marks "<!-- table -->" and "<!-- end -->" of a page by a row for each entry."""
    head, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, tail = rest.partition("<!-- end -->")
    if not (begin and end):
        raise SystemExit(f"{page} has no marks for a table, <!-- {mark} --> and <!-- end -->")
    lines = ["| " + " | ".join(columns) + " |", "| --- " + "| ---: " * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(show(name, row) for show in columns.values()) + " |" for name, row in found.items()]
    page.write_text(head + begin + "\n".join(lines) + "\n" + end + tail, encoding="utf-8")


def each_in_its_process(script: str, names: Iterable[str], path: Path, *arguments: str) -> None:
    """Measure the rows that are missing, one process each, so that one's peak of memory is not the next one's too."""
    for name in names:
        if name not in rows(path):
            subprocess.run([sys.executable, script, "--only", name, *arguments], check=True)


def command(
    path: Path,
    names: Sequence[str],
    measure: Callable[[str, bool], Mapping[str, Any]],
    table: Callable[[dict[str, Any]], None],
) -> None:
    """The command line of a job on small things: measure the rows that are missing, or the named ones, and show all.

    Args:
        path: the results; a smoke run has a file of its own in cache/.
        names: of all rows.
        measure: one row by its name, in its smallest size if True.
        table: writes the table of the page.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--smoke", action="store_true", help="as little work as runs, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only write the table of the page")
    options = parser.parse_args()
    if options.smoke:
        path = path.parents[1] / "cache" / f"{path.stem}_smoke.json"
    for name in [] if options.draw else names:
        if name in options.only or (not options.only and name not in rows(path)):
            row = measure(name, options.smoke)
            add_row(path, name, row)
            print(f"{name}: {row}", flush=True)
    if not options.smoke:
        table(rows(path))
