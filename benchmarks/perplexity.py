"""Perplexity of the demo model against ratio, for every method: one JSON row a method, ratio and form.

Rows are appended to results/perplexity.json as they are done; a row that is there already is not measured
again, so an interrupted run goes on where it stopped. `--only METHOD` measures that method alone, and
`--smoke` uses a few tokens, to see that it runs.

python benchmarks/perplexity.py
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
import warnings
from typing import Any

import torch
import transformers
from common import RESULTS
from language_model import calibration, demo, evaluation, text

import eckart
from eckart.models import perplexity
from eckart.structures import EckartWarning

RATIOS = (0.1, 0.2, 0.3, 0.4)
# (method, form): both forms where the comparison at equal parameters is the point.
METHODS = (
    ("pifa", "pivoted"),
    ("svd-llm", "pivoted"),
    ("svd-llm", "plain"),
    ("asvd", "pivoted"),
    ("fwsvd", "pivoted"),
    ("svd", "pivoted"),
)
FILE = RESULTS / "perplexity.json"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="measure this method alone")
    parser.add_argument("--smoke", action="store_true", help="few tokens, nothing is written")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() and not arguments.smoke else []
    samples, held_out = (2, 1) if arguments.smoke else (32, 16)
    model, tokenizer = demo()
    calibrated = "WikiText-2 validation" if text("wikitext2-valid.txt") else "Python documentation"
    evaluated = "WikiText-2 test" if text("wikitext2-test.txt") else "Python documentation, held-out part"
    data, test = calibration(tokenizer, samples), evaluation(tokenizer, held_out)

    def add(method: str, form: str, ratio: float, value: float, seconds: float, removed: float) -> None:
        row = {
            "method": method,
            "form": form,
            "ratio": ratio,
            "perplexity": value,
            "removed": removed,
            "seconds": seconds,  # calibration counted for pifa only: the others share one
            "calibration": f"{samples} x 512 tokens, {calibrated}",
            "evaluation": f"{held_out} x 512 tokens, {evaluated}",
            "command": "python benchmarks/perplexity.py",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "eckart": eckart.__version__,
            },
            "hardware": f"{torch.get_num_threads()} threads, {platform.machine()}",
        }
        rows.append(row)
        print(f"{method:10} {form:8} ratio {ratio:.1f}  perplexity {value:12.2f}  {seconds:6.0f} s", flush=True)
        if not arguments.smoke:
            RESULTS.mkdir(exist_ok=True)
            FILE.write_text(json.dumps(rows, indent=1) + "\n")

    done = {(row["method"], row["form"], row["ratio"]) for row in rows}
    if ("dense", "dense", 0.0) not in done:
        add("dense", "dense", 0.0, perplexity(model, test, progress=False).perplexity, 0.0, 0.0)
    shared = None
    for ratio in (0.2,) if arguments.smoke else sorted(RATIOS, key=lambda r: abs(r - 0.2)):
        for method, form in METHODS:
            if (method, form, ratio) in done or arguments.only not in (None, method):
                continue
            if method != "pifa" and shared is None:
                shared = eckart.calibrate(model, data, ["gram", "absmean", "fisher"])
            compressed = copy.deepcopy(model)
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EckartWarning)
                given = {"data": data} if method == "pifa" else {"statistics": shared}
                result = eckart.compress(compressed, method, ratio=ratio, form=form, progress=False, **given)
            seconds = time.perf_counter() - start
            add(method, form, ratio, perplexity(compressed, test, progress=False).perplexity, seconds, result.ratio)


if __name__ == "__main__":
    main()
