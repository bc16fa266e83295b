"""Two methods for small networks, on the handwritten digits of scikit-learn (1797 images of 8 x 8 pixels).

svd-init: a network starts at its best linear map, and otherwise at the usual random starts: classifiers of one hidden
layer, the classifier behind two random convolutions, and an autoencoder. Each start has the best of three Adam rates,
and of up to two beyond where the best is at an end, on a validation slice with the first seed; then test figures after
no, few and many epochs over five seeds. (The paper's tables are on synthetic data; its sizes are not known.)

jacobian-nuclear-norm: the paper's denoiser, scaled down; see denoise.py.

Rows are written when they are done; a second call goes on where the first stopped:

python benchmarks/small_networks.py [--only METHOD ...] [--smoke] [--draw]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from adapter_job import add_row, best, best_rate, rows, write_table
from common import RESULTS, environment
from denoise import measure_denoisers
from small_size import SMOKE, Size, over_seeds, split, step
from torch import Tensor, nn
from vision_cases.digits import digits

from eckart.pretraining.svd_init import svd_initialize

PAGE = Path(__file__).parents[1] / "docs" / "analysis-measured.md"
METHODS = ("svd-init", "jacobian-nuclear-norm")
STARTS: dict[str, Callable[[Tensor], Any] | None] = {
    "svd-init": None,
    "PyTorch's default": lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5)),
    "Xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


@dataclass
class Task:
    """A chain of linear layers, what goes in and what comes out; classes, or values whose mean square error counts."""

    widths: tuple[int, ...]
    activation: type[nn.Module]
    inputs: Tensor
    targets: Tensor

    @property
    def classes(self) -> bool:
        return not self.targets.is_floating_point()

    def judge(self, network: nn.Module, inputs: Tensor, targets: Tensor) -> float:
        """Accuracy, or mean square error."""
        with torch.no_grad():
            outputs = network(inputs)
            found = (outputs.argmax(1) == targets).float().mean() if self.classes else F.mse_loss(outputs, targets)
        return float(found)

    def started(self, start: str, seed: int, size: Size) -> nn.Sequential:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(a, b), self.activation()]
        network = nn.Sequential(*layers[:-1])
        initialize = STARTS[start]
        if initialize is None:
            x, y = self.inputs[: size.train], self.targets[: size.train]
            y = F.one_hot(y, self.widths[-1]).float() if self.classes else y
            svd_initialize(network, x, y, generator=torch.Generator().manual_seed(seed))
            return network
        for layer in network:
            if isinstance(layer, nn.Linear):
                initialize(layer.weight)
        return network


def tasks() -> dict[str, Task]:
    found = digits()
    images, labels = found.inputs, found.labels
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip
    with torch.no_grad():
        features = convolutions(images)
    pixels = images.flatten(1)
    return {
        "classifier, tanh": Task((64, 64, 10), nn.Tanh, pixels, labels),
        "classifier, ReLU": Task((64, 64, 10), nn.ReLU, pixels, labels),
        "behind random convolutions, ReLU": Task((features.shape[1], 64, 10), nn.ReLU, features, labels),
        "autoencoder 64-16-64, tanh": Task((64, 16, 64), nn.Tanh, pixels, pixels),
    }


def trained(task: Task, start: str, rate: float, seed: int, size: Size) -> dict[int, tuple[float, float]]:
    """Validation and test figure after so many epochs."""
    (x, x_val, x_test), (y, y_val, y_test) = split(size, task.inputs), split(size, task.targets)
    network = task.started(start, seed, size)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for epoch in range(max(size.epochs) + 1):
        if epoch in size.epochs:
            found[epoch] = task.judge(network, x_val, y_val), task.judge(network, x_test, y_test)
        for chosen in torch.randperm(len(x), generator=generator).split(size.batch):
            step(optimizer, (F.cross_entropy if task.classes else F.mse_loss)(network(x[chosen]), y[chosen]))
    return found


def measure_starts(size: Size, add: Callable[[str, dict[str, Any]], None], known: Collection[str] = ()) -> None:
    """Every row that is not known yet."""
    for name, task in tasks().items():
        for start in STARTS:
            if f"{name}: {start}" in known:
                continue

            def worse(rate: float, start: str = start, task: Task = task) -> float:
                last = trained(task, start, rate, 0, size)[max(size.epochs)][0]
                return -last if task.classes else last

            search = best_rate(worse, (1e-3, 3e-3, 1e-2))
            rate = best(search)
            runs = [trained(task, start, rate, seed, size) for seed in range(size.seeds)]
            add(f"{name}: {start}", {
                "method" if STARTS[start] is None else "baseline": start,
                "task": name,
                "figure": "accuracy" if task.classes else "mean square error",
                "learning rate": rate,
                **over_seeds([{str(epoch): test for epoch, (_, test) in run.items()} for run in runs]),
            })  # fmt: skip


MEASURES = dict(zip(METHODS, (measure_starts, measure_denoisers), strict=True))


def draw(found: dict[str, Any]) -> None:
    """Fill the two tables of the page that there are rows for."""
    starts = {name: row for name, row in found.items() if "task" in row}
    if starts:
        epochs = list(next(iter(starts.values()))["test"])
        columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
            "task, start": lambda name, row: name if "method" in row else f"*{name}*"
        }
        columns |= {f"epoch {epoch}": (lambda name, row, epoch=epoch: _shown(row, epoch)) for epoch in epochs}
        columns["learning rate"] = lambda name, row: f"{row['learning rate']:.2g}"
        write_table(PAGE, columns, starts, "svd-init")
    if denoisers := {name.partition(": ")[2]: row for name, row in found.items() if "strength" in row}:
        write_table(PAGE, {
            "training": lambda name, row: name if "method" in row else f"*{name}*",
            "PSNR, dB": lambda name, row: f"{row['test']['decibels']:.2f} ± {row['spread']['decibels']:.2f}",
            "values above 1 %": lambda name, row: f"{row['test']['values above 1 %']:.1f}",
            "ten largest, %": lambda name, row: f"{100 * row['test']['share of the ten largest']:.0f}",
            "strength": lambda name, row: f"{row['strength']:.2g}" if row["strength"] else "-",
            "CPU, s": lambda name, row: f"{row['CPU seconds']:.1f}",
        }, denoisers, "denoisers")  # fmt: skip


def _shown(row: dict[str, Any], epoch: str) -> str:
    if row["figure"] == "accuracy":
        return f"{100 * row['test'][epoch]:.1f} ± {100 * row['spread'][epoch]:.1f}"
    return f"{row['test'][epoch]:.4f} ± {row['spread'][epoch]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--smoke", action="store_true", help="a few steps, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only write the tables of the page")
    options = parser.parse_args()
    path = RESULTS.parent / "cache" / "small_networks_smoke.json" if options.smoke else RESULTS / "small_networks.json"

    def add(name: str, row: dict[str, Any]) -> None:
        add_row(path, name, {**row, **environment()})
        print(f"{name}: {row}", flush=True)

    for method in [] if options.draw else options.only:
        MEASURES[method](SMOKE if options.smoke else Size(), add, rows(path))
    if not options.smoke:
        draw(rows(path))


if __name__ == "__main__":
    main()
