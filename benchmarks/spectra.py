"""Full spectra of the demo model: against a loop of float64 SVDs and WeightWatcher, and the memory a 3 GB model takes.

Ours is `spectra`, with all its figures. The loop is `torch.linalg.svdvals` of each weight in float64, all threads on
one weight, and the figures not counted. WeightWatcher's `analyze`, as it comes, runs on the same weights in a process
of its own; its import and the loading are not counted. All have the same number of threads.

WeightWatcher pins nothing of ours, but keep it apart:
    python -m venv ww && ww/bin/pip install weightwatcher torch
    python benchmarks/spectra.py --weightwatcher ww/bin/python

python benchmarks/spectra.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from adapter_job import write_table
from common import RESULTS, interleaved, medians, ratio, record
from language_model import demo
from safetensors.torch import save_file
from stream import write_checkpoint

from eckart.analysis import LayerSpectrum, spectra
from eckart.models import linears

PAGE = Path(__file__).parents[1] / "docs" / "analysis-measured.md"
WATCHER = """
import json, logging, sys, time, warnings
warnings.simplefilter("ignore")
import torch, weightwatcher
from safetensors.torch import load_file
logging.disable(logging.CRITICAL)
torch.set_num_threads(int(sys.argv[2]))
tensors = load_file(sys.argv[1])
model = torch.nn.ModuleDict()
for name, weight in tensors.items():
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.float()
    model[name.replace(".", "/")] = layer
watcher = weightwatcher.WeightWatcher(model=model)
sys.stdout.write("ready\\n")
sys.stdout.flush()
for _ in sys.stdin:
    out, sys.stdout = sys.stdout, sys.stderr
    start, used = time.perf_counter(), time.process_time()
    details = watcher.analyze()
    times = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}
    sys.stdout = out
    alpha = {str(name).replace("/", "."): float(a) for name, a in zip(details["longname"], details["alpha"])}
    print(json.dumps(times | {"alpha": alpha}), flush=True)
"""

PEAK = """
import sys
from pathlib import Path
from eckart.analysis import spectra
found = spectra(Path(sys.argv[1]), progress=False)
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(len(found), int(line.split()[1]) * 1024)
"""


@contextlib.contextmanager
def watching(python: str, weights: dict[str, torch.Tensor]) -> Iterator[Any]:
    """A function that has WeightWatcher analyse the weights, in a process that stays."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "weights.safetensors"
        save_file(weights, file)
        threads = str(torch.get_num_threads())
        process = subprocess.Popen(
            [python, "-c", WATCHER, str(file), threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        if not any(line == "ready\n" for line in process.stdout):
            raise SystemExit(f"{python} cannot import weightwatcher and torch")

        def run() -> dict[str, Any]:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            for line in process.stdout:  # type: ignore[union-attr]
                if line.startswith('{"seconds"'):
                    return json.loads(line)  # type: ignore[no-any-return]
            raise SystemExit("WeightWatcher ended without a result")

        try:
            yield run
        finally:
            process.stdin.close()
            process.wait()


def against_weightwatcher(
    python: str, refs: list[Any], found: list[LayerSpectrum], where: Any, model: Any, rounds: int
) -> dict[str, Any]:
    weights = {ref.name: ref.weight.detach().float().contiguous() for ref in refs}
    seconds: dict[str, list[float]] = {"ours": [], "weightwatcher": []}
    cpu: dict[str, list[float]] = {"ours": [], "weightwatcher": []}
    with watching(python, weights) as run:
        for _ in range(rounds):
            done = run()
            seconds["weightwatcher"].append(done["seconds"])
            cpu["weightwatcher"].append(done["cpu"])
            start, used = time.perf_counter(), time.process_time()
            spectra(model, where=where, progress=False)
            seconds["ours"].append(time.perf_counter() - start)
            cpu["ours"].append(time.process_time() - used)
    differences = sorted(abs(layer.tail_exponent / done["alpha"][layer.name] - 1) for layer in found)
    return {
        "seconds, WeightWatcher": medians(seconds)["weightwatcher"],
        "times faster than WeightWatcher (>= 5)": ratio(seconds, "weightwatcher", "ours"),
        "of it, in CPU seconds": ratio(cpu, "weightwatcher", "ours"),
        "alpha: median relative difference to WeightWatcher": differences[len(differences) // 2],
        "alpha: layers that differ by more than 1e-3": sum(difference > 1e-3 for difference in differences),
    }


def peak_of_a_large_checkpoint() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        size = write_checkpoint(Path(scratch))
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", PEAK, scratch], check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    weights, peak = map(int, done.stdout.splitlines()[-1].split())
    return {
        "large checkpoint, GB": size / 1e9,
        "large checkpoint, weights": weights,
        "large checkpoint, seconds": seconds,
        "large checkpoint, peak resident memory, GB (< 1.2)": peak / 1e9,
    }


def draw(figures: dict[str, Any]) -> None:
    """Write the table of the page."""

    def shown(name: str, value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"

    write_table(PAGE, {"spectra of the demo model": lambda name, value: name, "figure": shown}, figures, "spectra")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--where", action="append", help="only these layers, for a try; nothing is written")
    parser.add_argument("--weightwatcher", metavar="PYTHON", help="an interpreter that has weightwatcher")
    parser.add_argument("--skip-large", action="store_true", help="leave out the 3 GB checkpoint")
    parser.add_argument("--draw", action="store_true", help="only write the table of the page")
    given = parser.parse_args()
    if given.draw:
        draw(json.loads((RESULTS / "spectra.json").read_text(encoding="utf-8"))["figures"])
        return
    model, _ = demo()
    refs = linears(model, given.where).linears
    found: list[LayerSpectrum] = []
    exact: list[torch.Tensor] = []

    def ours() -> None:
        found[:] = spectra(model, where=given.where, progress=False)

    def loop() -> None:
        exact[:] = [torch.linalg.svdvals(ref.weight.detach().double()) for ref in refs]

    seconds = interleaved({"ours": ours, "float64 loop": loop}, given.rounds)
    worst = max(
        float(((layer.singular_values.double() - s) / s).abs().max()) for layer, s in zip(found, exact, strict=True)
    )
    figures: dict[str, Any] = {"weights": len(refs)}
    figures |= {f"seconds, {name}": value for name, value in medians(seconds).items()}
    figures["times faster than the float64 loop (>= 4)"] = ratio(seconds, "float64 loop", "ours")
    figures["largest relative difference of a singular value (<= 1e-4)"] = worst
    if given.weightwatcher:
        figures |= against_weightwatcher(given.weightwatcher, refs, found, given.where, model, given.rounds)
    if not given.skip_large:
        figures |= peak_of_a_large_checkpoint()
    if given.where:
        print(figures)
        return
    record("spectra", figures)
    draw(figures)


if __name__ == "__main__":
    main()
