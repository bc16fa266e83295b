"""What an update costs: against galore-torch on square matrices, and over models of 5M, 20M and 80M parameters.

python benchmarks/optimizer_cost.py

galore-torch is measured where it is installed: pip install --no-deps galore-torch. `--draw` writes the tables of
docs/optimize-lm.md again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from adapter_job import write_table
from common import RESULTS, interleaved, medians, ratio, record
from optimize_lm import PAGE, Size, bytes_of_state, llama, ours, plain
from torch import nn

from eckart.linalg import dct_matrix
from eckart.optim import DCTAdamW, GaLoreAdamW

WIDTH, RANK, INTERVAL, LAYERS = 2048, 128, 200, 2
SIZES = {"5M": Size(), "20M": Size(width=448, layers=8), "80M": Size(width=768, layers=11)}


def matrices(count: int = LAYERS) -> list[nn.Parameter]:
    """With gradients of which the spectrum falls, as real ones do."""
    generator = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5) for _ in range(count)]
    scale = 1 / torch.arange(1, WIDTH + 1) ** 0.5
    for parameter in found:
        left = torch.randn(WIDTH, WIDTH, generator=generator) * scale
        parameter.grad = left @ torch.randn(WIDTH, WIDTH, generator=generator) * 1e-5
    return found


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def against_galore_torch(figures: dict[str, float]) -> None:
    mine = GaLoreAdamW(matrices(), lr=1e-3, rank=RANK, update_interval=INTERVAL)
    first = timed(mine.step)
    every = [timed(mine.step) for _ in range(INTERVAL)]
    figures["2 x 2048 x 2048, rank 128: seconds an update, refreshes included"] = statistics.mean([first, *every[1:]])
    figures["its worst update over its median (<= 3)"] = max(every) / statistics.median(every)
    figures["its first update over its median"] = first / statistics.median(every)
    if not importlib.util.find_spec("galore_torch"):
        return
    import galore_torch

    group = {"params": matrices(), "rank": RANK, "update_proj_gap": INTERVAL, "scale": 0.25, "proj_type": "std"}
    theirs = galore_torch.GaLoreAdamW([group], lr=1e-3)
    refresh = timed(theirs.step)
    seconds = interleaved({"ours": mine.step, "theirs": theirs.step}, repeats=20)
    mean = (refresh + (INTERVAL - 1) * medians(seconds)["theirs"]) / INTERVAL
    figures["galore-torch: seconds an update, refreshes included"] = mean
    figures["galore-torch: seconds of the update that refreshes"] = refresh
    figures["galore-torch / ours, refreshes included (>= 3)"] = mean / statistics.mean([first, *every[1:]])
    figures["galore-torch / ours, updates between refreshes"] = ratio(seconds, "theirs", "ours")
    figures["state bytes, ours / galore-torch (<= 1)"] = bytes_of_state(mine) / bytes_of_state(theirs)


def dct_refresh(figures: dict[str, float]) -> None:
    parameter = matrices(1)[0]
    optimizer = DCTAdamW([parameter], lr=1e-3, rank=RANK, update_interval=1)
    rare = DCTAdamW([parameter], lr=1e-3, rank=RANK, update_interval=10**6)
    optimizer.step()
    rare.step()
    basis, gradient = dct_matrix(WIDTH), parameter.grad
    assert gradient is not None
    seconds = interleaved(
        {
            "selecting": optimizer.step,
            "not": rare.step,
            "product": lambda: gradient @ basis,
            "sort": lambda: torch.randn(WIDTH).sort(),
        },
        repeats=9,
    )
    pairs = zip(*(seconds[name] for name in ("selecting", "not", "product", "sort")), strict=True)
    figures["dct-adamw: what selecting adds, over a product with a 2048 x 2048 gradient and a sort (<= 1.5)"] = (
        statistics.median((a - b) / (c + d) for a, b, c, d in pairs)
    )
    figures["dct-adamw: bytes that stand for the basis"] = float(
        sum(v.nbytes for k, v in optimizer.state[parameter].items() if k not in ("first", "second", "step"))
    )


def over_sizes() -> dict[str, dict[str, dict[str, float]]]:
    """What an update takes and what the state holds, a parameter, by optimizer and size."""
    names = ("galore", "galore 8-bit", "fira", "dct-adamw", "gwt")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for label, size in SIZES.items():
        model = llama(size)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
        count = sum(p.numel() for p in model.parameters())
        adam = plain("torch.optim:AdamW", weight_decay=0.0)(model, 1e-5)
        optimizers = {"adamw": adam}
        for name in names:
            optimizers[name] = ours(name.removesuffix(" 8-bit"), bits=8 if name.endswith("8-bit") else 32)(model, 1e-5)
        seconds = medians(interleaved({name: one.step for name, one in optimizers.items()}, repeats=5))
        for name, one in optimizers.items():
            cost = {"ns an update": seconds[name] / count * 1e9, "bytes of state": bytes_of_state(one) / count}
            found.setdefault(name, {})[f"{count / 1e6:.1f}M"] = cost
            print(f"{name}, {label}: {cost}", flush=True)
    return found


def draw(row: dict[str, Any]) -> None:
    """Write the tables of the page."""
    shown = {"figure": lambda name, value: name, "": lambda name, value: f"{value:,.3g}"}
    write_table(PAGE, shown, row["figures"], "cost")
    sizes = list(next(iter(row["sizes"].values())))
    columns: dict[str, Callable[[str, Any], str]] = {"optimizer": lambda name, costs: name}
    for size in sizes:
        columns[f"{size}, ns"] = lambda name, costs, size=size: f"{costs[size]['ns an update']:.1f}"
    for size in sizes:
        columns[f"{size}, bytes"] = lambda name, costs, size=size: f"{costs[size]['bytes of state']:.2f}"
    write_table(PAGE, columns, row["sizes"], "sizes")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draw", action="store_true", help="only write the tables of the page")
    if not parser.parse_args().draw:
        figures: dict[str, float] = {}
        against_galore_torch(figures)
        dct_refresh(figures)
        record("optimizer_cost", figures, sizes=over_sizes())
    draw(json.loads((RESULTS / "optimizer_cost.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
