"""Time against error of each way to approximate a matrix by one of rank 64, and the picture of it.

A 2048 x 2048 float32 matrix, power-law spectrum 1/i and exponential exp(-i/100). Error is the Frobenius error over the
best one of that rank, less one.

python benchmarks/drivers.py [--draw]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, interleaved, medians, record
from svd import matrix

from eckart.linalg import cur, interpolative, rank_revealing_qr, svd

RANK = 64
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "drivers.png"
CONTENDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "svd, exact": lambda a: svd(a, RANK, driver="exact"),
    "svd, gram": lambda a: svd(a, RANK, driver="gram"),
    "svd, randomized, tol 0.1": lambda a: svd(a, RANK, driver="randomized", tol=0.1),
    "svd, randomized, tol 0.01": lambda a: svd(a, RANK, driver="randomized", tol=0.01),
    "svd, randomized, tol 0.0001": lambda a: svd(a, RANK, driver="randomized", tol=1e-4),
    "svd, lanczos": lambda a: svd(a, RANK, driver="lanczos"),
    "rank_revealing_qr": lambda a: rank_revealing_qr(a, RANK),
    "interpolative": lambda a: interpolative(a, RANK),
    "cur": lambda a: cur(a, RANK),
}


def measure() -> None:
    figures: dict[str, float] = {}
    for spectrum in ("harmonic", "exponential"):
        a = matrix(spectrum)
        exact = torch.linalg.svdvals(a.double())
        best = float(exact[RANK:].square().sum().sqrt())
        errors = {name: float((a.double() - run(a).reconstruct().double()).norm()) for name, run in CONTENDERS.items()}
        seconds = interleaved({name: lambda run=run, a=a: run(a) for name, run in CONTENDERS.items()}, repeats=3)
        for name, time in medians(seconds).items():
            figures[f"{spectrum}: {name}: ms"] = 1000 * time
            figures[f"{spectrum}: {name}: error / best error - 1"] = errors[name] / best - 1
    record("drivers", figures)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = json.loads((RESULTS / "drivers.json").read_text())["figures"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, constrained_layout=True)
    for axis, spectrum, title in zip(axes, ("harmonic", "exponential"), ("1 / i", "exp(-i / 100)"), strict=True):
        for index, name in enumerate(CONTENDERS):
            time = figures[f"{spectrum}: {name}: ms"]
            # What is within rounding of the best is drawn at the bottom.
            excess = max(figures[f"{spectrum}: {name}: error / best error - 1"], 1e-6)
            marker = "o" if name.startswith("svd") else "s"
            axis.plot(time, excess, marker, color=f"C{index}", label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("milliseconds, 2 CPU cores")
        axis.set_title(f"spectrum {title}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error over the best error of rank 64, less 1")
    axes[1].legend(fontsize=8, loc="upper right")
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})
    print(f"drew {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draw", action="store_true", help="only draw the picture of what was measured before")
    if not parser.parse_args().draw:
        measure()
    draw()


if __name__ == "__main__":
    main()
