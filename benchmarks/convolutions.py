"""Mixed-TD on a small convolutional network: a mixture of decompositions against each of them alone.

Five convolutions with batch normalisations learn the handwritten digits of scikit-learn (8 x 8 pixels). A number behind
a name is the fraction of the factored convolutions' multiply-adds that is removed; schemes are searched on a
validation slice, and judged by test pictures before and after one epoch of further training. Beside them networks of
fewer channels, trained from the start, with about as many multiply-adds. Mean and deviation over seeds, each of which
trains a network of its own. Rows are added to results/convolutions.json one by one:

python benchmarks/convolutions.py [--only NAME ...] [--smoke] [--draw]
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from adapter_job import command, write_table
from common import RESULTS, environment, interleaved, medians
from small_size import over_seeds, step
from torch import Tensor, nn
from vision_cases.digits import digits

from eckart.compression.conv_schemes import Kind
from eckart.compression.mixed_td import decompose
from eckart.structures import EckartWarning

PAGE = Path(__file__).parents[1] / "docs" / "compress-small.md"
RATIOS = (0.6, 0.85)
CHANNELS = (32, 64, 64, 128, 128)


@dataclass(frozen=True)
class Size:
    """How much work a row is."""

    seeds: int = 3
    epochs: int = 12
    train: int = 1000
    validation: int = 300
    batch: int = 50
    population: int = 100
    generations: int = 20
    pictures: int = 64
    groups: tuple[int, ...] = (1, 2, 4, 8)
    mac_ratios: tuple[float, ...] = (0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55)


SMOKE = Size(2, 1, 100, 40, 20, 2, 1, 4, (1, 2), (0.15, 0.4))
Split = tuple[Tensor, Tensor]


def network(share: float = 1.0) -> nn.Sequential:
    """Five convolutions, of which the second and the fourth halve the picture; of a share of the channels."""
    layers: list[nn.Module] = []
    before = 1
    for index, channels in enumerate(CHANNELS):
        after = round(channels * share)
        stride = 2 if index in (1, 3) else 1
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def splits(size: Size) -> tuple[Split, Split, Split]:
    """Pictures and classes to train, to search and to judge on."""
    found = digits()
    sizes = [size.train, size.validation, len(found.inputs) - size.train - size.validation]
    first, second, third = zip(found.inputs.split(sizes), found.labels.split(sizes), strict=True)
    return first, second, third


def fit(model: nn.Module, data: Split, size: Size, epochs: int, rate: float, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data[1]), generator=generator).split(size.batch):
            step(optimizer, F.cross_entropy(model(data[0][batch]), data[1][batch]))
    return model.eval()


def trained(size: Size, data: Split, seed: int, share: float = 1.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(share)
    return fit(model, data, size, size.epochs, 3e-3, seed)


def accuracy(model: nn.Module, data: Split) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def multiply_adds(model: nn.Module) -> int:
    """Of all convolutions, for one picture, counted while they run."""
    total = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))
    for handle in handles:
        handle.remove()
    return total


Make = Callable[[Size, Split, Split, int], nn.Module]


def mixed(ratio: float, kinds: tuple[Kind, ...]) -> Make:
    def make(size: Size, train: Split, search: Split, seed: int) -> nn.Module:
        model = trained(size, train, seed)
        options: dict[str, Any] = {"population": size.population, "generations": size.generations}
        options |= {"groups": size.groups, "mac_ratios": size.mac_ratios}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EckartWarning)
            decompose(model, [search], ratio, kinds=kinds, seed=seed, progress=False, **options)
        return model

    return make


def fewer(ratio: float) -> Make:
    """Multiply-adds go with the square of the channels."""
    return lambda size, train, search, seed: trained(size, train, seed, share=(1 - ratio) ** 0.5)


def contenders() -> dict[str, Make]:
    found: dict[str, Make] = {"dense": lambda size, train, search, seed: trained(size, train, seed)}
    for ratio in RATIOS:
        found[f"mixed-td {ratio}"] = mixed(ratio, get_args(Kind))
        found |= {f"mixed-td, {kind} alone {ratio}": mixed(ratio, (kind,)) for kind in get_args(Kind)}
        found[f"fewer channels {ratio}"] = fewer(ratio)
    return found


def run(size: Size, name: str, make: Make) -> dict[str, Any]:
    """One row of the table."""
    train, search, judge = splits(size)
    figures, pictures, reference = [], judge[0][: size.pictures], network().eval()
    for seed in range(size.seeds):
        start = time.perf_counter()
        model = make(size, train, search, seed)
        figures.append({"seconds": time.perf_counter() - start, "accuracy": accuracy(model, judge)})
        figures[-1]["multiply-adds"] = float(multiply_adds(model))
        figures[-1]["parameters"] = float(sum(p.numel() for p in model.parameters()))
        with torch.no_grad():
            both = {"this": lambda model=model: model(pictures), "dense": lambda: reference(pictures)}
            times = medians(interleaved(both, repeats=9))
        figures[-1]["time / dense"] = times["this"] / times["dense"]
        figures[-1]["accuracy tuned"] = accuracy(fit(model, train, size, 1, 1e-3, seed + 100), judge)
    key = "method" if name.startswith("mixed-td") else "baseline"
    return {key: name.partition(" ")[0].rstrip(","), **over_seeds(figures), **environment()}


def table(found: dict[str, Any]) -> None:
    def shown(key: str) -> Callable[[str, dict[str, Any]], str]:
        return lambda name, row: f"{100 * row['test'][key]:.1f} ± {100 * row['spread'][key]:.1f}"

    columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "network": lambda name, row: name if "method" in row else f"*{name}*",
        "accuracy, %": shown("accuracy"),
        "after one more epoch, %": shown("accuracy tuned"),
        "multiply-adds, M": lambda name, row: f"{row['test']['multiply-adds'] / 1e6:.2f}",
        "parameters": lambda name, row: f"{row['test']['parameters']:,.0f}",
        "time / dense": lambda name, row: f"{row['test']['time / dense']:.2f}",
        "to make, s": lambda name, row: f"{row['test']['seconds']:.0f}",
    }
    ordered = dict(sorted(found.items(), key=lambda pair: -pair[1]["test"]["accuracy"]))
    write_table(PAGE, columns, ordered, "convolutions")


def main() -> None:
    known = contenders()

    def measure(name: str, smoke: bool) -> dict[str, Any]:
        return run(SMOKE if smoke else Size(), name, known[name])

    command(RESULTS / "convolutions.json", list(known), measure, table)


if __name__ == "__main__":
    main()
