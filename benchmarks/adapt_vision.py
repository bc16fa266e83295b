"""Adapters that were published for images and signals, each on a small real case of its kind that runs on a processor.

The cases are in vision_cases/, one file each: a network that the job pre-trains, and the ways to adapt it to something
else. Every row has the best of three learning rates on a validation slice with the first seed, and of up to two beyond
where the best is at an end; then further seeds are trained, which also draw the labelled examples, and all are judged
on a test set. Rows are written when they are done; a second call goes on where the first stopped:

python benchmarks/adapt_vision.py [--only CASE ...] [--smoke] [--draw]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapter_job import add_row, best, best_rate, rows, write_table
from common import RESULTS, environment
from vision_cases.case import SMOKE, Case, Row, Size, trained_parameters
from vision_cases.ce_ssl import CESSL
from vision_cases.explora import ExPLoRA
from vision_cases.flora import FLoRA
from vision_cases.petalface import PETALface

CASES: dict[str, type[Case]] = {case.name: case for case in (PETALface, ExPLoRA, CESSL, FLoRA)}
PAGE = Path(__file__).parents[1] / "docs" / "adapt-vision.md"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "adapt-vision.png"


def measure(case: Case, name: str, row: Row) -> dict[str, Any]:
    """One row of a table."""
    tests: dict[float | None, dict[str, float]] = {}
    seconds: list[float] = []

    def mistakes(rate: float | None) -> float:
        begin = time.perf_counter()
        model = case.fit(row, rate, seed=0)
        seconds.append(time.perf_counter() - begin)
        tests[rate] = case.judge(model, row, "test", seed=0)
        return 1 - statistics.mean(case.judge(model, row, "validation", seed=0).values())

    search = best_rate(mistakes, row.rates) if row.rates else {}
    rate = best(search) if search else None
    if rate is None:
        mistakes(None)
    found = [tests[rate]]
    found += [case.judge(case.fit(row, rate, seed), row, "test", seed) for seed in range(1, case.size.seeds)]
    by_seed = {figure: [one[figure] for one in found] for figure in case.figures}
    return {
        "case": case.name,
        "baseline" if row.method is None else "method": row.method or name,
        "accuracy": {figure: statistics.mean(values) for figure, values in by_seed.items()},
        "spread": {figure: statistics.stdev(values) for figure, values in by_seed.items()},
        "accuracy by seed": by_seed,
        "learning rate": rate,
        "validation accuracy by rate": {str(key): 1 - value for key, value in search.items()},
        "trained parameters": trained_parameters(case.started(row, 0)),
        "steps": case.size.steps(case.steps) if row.rates else 0,
        "seconds": statistics.median(seconds),
        **environment(),
    }


def of_case(found: dict[str, Any], case: str) -> dict[str, Any]:
    """Its rows by their names, which are "CASE: NAME" in the file, the baselines first."""
    mine = {key.partition(": ")[2]: row for key, row in found.items() if row["case"] == case}
    return dict(sorted(mine.items(), key=lambda pair: "method" in pair[1]))


def tables(found: dict[str, Any]) -> None:
    """Write the table of each case into the page, between marks of its name."""

    def figure(key: str) -> Callable[[str, dict[str, Any]], str]:
        return lambda name, row: f"{100 * row['accuracy'][key]:.1f} ± {100 * row['spread'][key]:.1f}"

    for name, case in CASES.items():
        columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
            "row": lambda name, row: name if "method" in row else f"*{name}*",
            **{key: figure(key) for key in case.figures},
            "trained": lambda name, row: f"{row['trained parameters']:,}",
            "learning rate": lambda name, row: f"{row['learning rate']:.2g}" if row["learning rate"] else "-",
        }
        write_table(PAGE, columns, of_case(found, name), mark=name)


def draw(found: dict[str, Any]) -> None:
    """A panel for each case: mean and standard deviation of every row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = [len(of_case(found, name)) for name in CASES]
    heights = [max(counts[:2]), max(counts[2:])]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), constrained_layout=True, gridspec_kw={"height_ratios": heights})
    for axis, (name, case) in zip(axes.flat, CASES.items(), strict=True):
        shown = of_case(found, name)
        for index, (key, mark) in enumerate(zip(case.figures, "os", strict=False)):
            for place, row in enumerate(shown.values()):
                color = "#1060a0" if "method" in row else "#b04000"
                axis.errorbar(
                    100 * row["accuracy"][key],
                    place,
                    xerr=100 * row["spread"][key],
                    fmt=mark,
                    color=color,
                    markerfacecolor="white" if index else color,
                    capsize=3,
                    label=key if len(case.figures) > 1 and not place else None,
                )
        axis.set_yticks(range(len(shown)), list(shown))
        axis.invert_yaxis()
        axis.set_title(case.title, fontsize=10, loc="left")
        axis.set_xlabel("test accuracy in %")
        axis.grid(alpha=0.3)
        if len(case.figures) > 1:
            axis.legend(fontsize=8, loc="lower left")
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), help="cases to measure")
    parser.add_argument("--smoke", action="store_true", help="two steps a row, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only draw the picture and write the tables of the page")
    options = parser.parse_args()
    path = RESULTS.parent / "cache" / "adapt_vision_smoke.json" if options.smoke else RESULTS / "adapt_vision.json"
    if options.draw:
        draw(rows(path))
        tables(rows(path))
        return
    for name in options.only:
        case = CASES[name](SMOKE if options.smoke else Size())
        for row_name, row in case.rows().items():
            if f"{name}: {row_name}" in rows(path):
                continue
            begin = time.perf_counter()
            measured = measure(case, row_name, row)
            add_row(path, f"{name}: {row_name}", measured)
            figures = ", ".join(
                f"{key} {value:.3f} +- {measured['spread'][key]:.3f}" for key, value in measured["accuracy"].items()
            )
            took = time.perf_counter() - begin
            print(
                f"{name}: {row_name}: {figures}, {measured['trained parameters']:,} trained, {took:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
