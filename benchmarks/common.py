"""What the benchmarks share: interleaved timing, and one JSON file a benchmark with versions and hardware."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleaved(
    contenders: dict[str, Callable[[], Any]], repeats: int = 5, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each contender: one warm-up, then all in turn, so that drift of the machine hits all alike.

    ``pause`` seconds of rest come before each run: threads of another linear algebra library spin for a while after
    their work and would slow down whoever comes next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            time.sleep(pause)
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """Median over the rounds of (time of a / time of b) within the same round."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def record(name: str, figures: dict[str, Any], **extra: Any) -> None:
    """Print the figures and write them to results/NAME.json."""
    row = {
        "benchmark": name,
        "command": " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        "figures": figures,
        **extra,
        **environment(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(row, indent=2) + "\n")
    for key, value in figures.items():
        print(f"{key:58} {value:.4g}" if isinstance(value, float) else f"{key:58} {value}")


def environment() -> dict[str, Any]:
    """Versions and hardware, as every row carries them."""
    import torch
    import transformers

    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {"cpu": _cpu(), "threads": torch.get_num_threads(), "system": platform.system()},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
