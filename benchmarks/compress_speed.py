"""How fast a compressed model is: factors and narrower layers beside the dense model, all in turn in one run.

Speed depends on forms and sizes and not on the values, so methods that need no data and little time make them. Batch 1:
milliseconds for each of 32 generated tokens, and for a prompt of 512 tokens; ratios to the dense model are medians over
rounds of the quotient within a round. Nothing else may run on the machine.

python benchmarks/compress_speed.py [--rounds 3] [--draw]
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from adapter_job import write_table
from common import RESULTS, environment, interleaved, medians, ratio
from compress_lm import PAGE, Job, Size, by, bytes_of, dense, quantized
from language_model import calibration, demo
from torch import nn

from eckart.models.timing import time_per_token
from eckart.structures import EckartWarning

PROMPT = 512
PATH = RESULTS / "compress_speed.json"
# Name -> method and options, at every ratio; what makes a form quickly, whichever method it is known from.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain factors": ("svd", {"form": "plain"}),
    "pivoted factors": ("svd", {"form": "pivoted"}),
    "narrower layers (modegpt)": ("modegpt", {"allocation": "uniform"}),
}
RATIOS = (0.2, 0.4)


def forms(job: Job, ratios: tuple[float, ...] = RATIOS) -> dict[str, nn.Module]:
    """Every model that is timed; a form that cannot be made at a ratio is left out."""
    found: dict[str, nn.Module] = {"dense": dense(job)[0], "int8": quantized(8)(job)[0], "int4": quantized(4)(job)[0]}
    for name, (method, options) in FORMS.items():
        for fraction in ratios:
            try:
                found[f"{name} {fraction}"] = by(method, fraction, **options)(job)[0]
            except ValueError as error:
                print(f"{name} {fraction}: {error}", flush=True)
    return found


def measure(models: dict[str, nn.Module], rounds: int, prompt: int = PROMPT) -> dict[str, dict[str, float]]:
    """Figures of each model; "dense" is one of them."""
    ids = (torch.arange(prompt) % 32)[None]

    def read(model: nn.Module) -> Callable[[], Any]:
        @torch.no_grad()
        def run() -> Any:
            return model(input_ids=ids, use_cache=False)

        return run

    tokens: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        time_per_token(model, tokens=4, progress=False)
    for _ in range(rounds):
        for name, model in models.items():
            tokens[name].append(time_per_token(model, progress=False))
    prompts = interleaved({name: read(model) for name, model in models.items()}, rounds)
    return {
        name: {
            "ms a token": medians(tokens)[name],
            "token / dense": ratio(tokens, name, "dense"),
            "prompt, ms": 1e3 * medians(prompts)[name],
            "prompt / dense": ratio(prompts, name, "dense"),
            "bytes": float(bytes_of(model)),
        }
        for name, model in models.items()
    }


def table(found: dict[str, Any]) -> None:
    columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "stored as": lambda name, row: f"*{name}*" if name in ("dense", "int8", "int4") else name,
        "MB": lambda name, row: f"{row['bytes'] / 1e6:.0f}",
        "ms a token": lambda name, row: f"{row['ms a token']:.1f}",
        "of dense": lambda name, row: f"{row['token / dense']:.2f}",
        "prompt of 512, ms": lambda name, row: f"{row['prompt, ms']:.0f}",
        "of dense ": lambda name, row: f"{row['prompt / dense']:.2f}",
    }
    write_table(PAGE, columns, found, "speed")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="only write the table of the page")
    options = parser.parse_args()
    if not options.draw:
        model, tokenizer = demo()
        job = Job(Size(), model, tokenizer, calibration(tokenizer, 2), [], [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EckartWarning)
            made = forms(job)
        row = {"benchmark": "compress_speed", "rows": measure(made, options.rounds), **environment()}
        PATH.write_text(json.dumps(row, indent=1) + "\n")
    table(json.loads(PATH.read_text())["rows"])


if __name__ == "__main__":
    main()
