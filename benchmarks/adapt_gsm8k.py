"""Adapters on one job: GSM8K answers, the demo model, equal trained parameters and steps, its best learning rate.

The adapters are those that start from the spectrum of the weight; ``adapt_sst2.py`` has all of them on a smaller job.

Answer-token loss on a held-out slice of gsm8k-train. The learning rate is chosen among three on another slice, over
fewer steps; where the best is the largest or smallest, up to two beyond it are tried. Forgetting is the change of
perplexity on WikiText-2's test text. The base is bfloat16, adapters are float32; full fine-tuning is float32
throughout. Each row is written as soon as it is done and a second call goes on where the first stopped; ``--seeds``
trains rows that are there with further seeds, which also shuffle the examples:

python benchmarks/adapt_gsm8k.py [--only NAME ...] [--seeds NAME ...] [--smoke] [--draw]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_job import (
    Training,
    add_row,
    best,
    best_rate,
    each_in_its_process,
    lora_config,
    lora_parameters,
    rank_for,
    rows,
    write_table,
)
from common import RESULTS, environment
from language_model import answers, demo, evaluation

from eckart import adapt
from eckart.adapters.config import EckartConfig
from eckart.models import linears, peak_memory, perplexity
from eckart.models.answers import Example

LORA_RANK = 8
RATES = (5e-4, 1.5e-3, 5e-3)
# Methods that train a few numbers a layer need far larger steps; their papers say so. Whole weights need smaller ones.
TINY_RATES = (1.5e-3, 5e-3, 1.5e-2)
FULL_RATES = (3e-5, 1e-4, 3e-4)
METHODS = (
    "clip-svd", "corda", "edora", "effort", "eva", "kasa", "loldu", "lora-xs", "nlora", "nora", "pissa", "salt", "soka",
    "soma", "sorsa", "spectral-adapter", "spectral-ft", "svfit",
)  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "adapt-gsm8k.md"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "adapt-gsm8k.png"


@dataclass(frozen=True)
class Size:
    """How much work one row is."""

    steps: int = 120
    search_steps: int = 24
    batch: int = 2
    held_out: int = 96
    watched: int = 24
    watch_every: int = 20
    search_held_out: int = 32
    length: int = 160
    text_windows: int = 8


SMOKE = Size(2, 1, 1, held_out=2, watched=1, watch_every=1, search_held_out=2, length=48, text_windows=1)


@dataclass
class Job:
    """The model, the data and the sizes that all rows share."""

    size: Size
    model: Any
    tokenizer: Any
    train: list[Example]
    search: list[Example]
    judge: list[Example]
    windows: list[Any]
    perplexity: float
    lora_parameters: int


def load(size: Size, model: Any = None, tokenizer: Any = None, source: Path | None = None) -> Job:
    if model is None:
        model, tokenizer = demo()
    examples = answers(tokenizer, size.length, source)
    judge, search = examples[-size.held_out :], examples[-size.held_out - size.search_held_out : -size.held_out]
    train = examples[: -size.held_out - size.search_held_out]
    windows = evaluation(tokenizer, samples=size.text_windows)
    model.to(torch.bfloat16)
    before = perplexity(model, windows, progress=False).perplexity
    return Job(size, model, tokenizer, train, search, judge, windows, before, lora_parameters(model, LORA_RANK))


def ours(method: str) -> Callable[[Job], Any]:
    def build(job: Job) -> Any:
        needs = EckartConfig(method=method).build_method().needs
        data = [{"input_ids": torch.tensor([e["input_ids"]])} for e in job.train[:32]] if needs else None
        return adapt(
            copy.deepcopy(job.model),
            method,
            rank_for(method, job.model, job.lora_parameters),
            data=data,
            progress=False,
            task_type="CAUSAL_LM",
        )

    return build


def of_peft(**options: Any) -> Callable[[Job], Any]:
    def build(job: Job) -> Any:
        from peft import get_peft_model

        config = lora_config(job.model, LORA_RANK, task_type="CAUSAL_LM", **options)
        return get_peft_model(copy.deepcopy(job.model), config)

    return build


def lora_ga(job: Job) -> Any:
    """PEFT's LoRA-GA: the start of the factors from the gradient of eight batches."""
    from peft import LoraGAConfig, get_peft_model, preprocess_loraga

    model, collate = copy.deepcopy(job.model), collator(job)

    def gradients() -> None:
        for start in range(0, 8 * job.size.batch, job.size.batch):
            model(**collate([dict(e) for e in job.train[start : start + job.size.batch]])).loss.backward()

    config = lora_config(
        model, LORA_RANK, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), task_type="CAUSAL_LM"
    )
    preprocess_loraga(model, config, gradients)
    return get_peft_model(model, config)


def full(job: Job) -> Any:
    model = copy.deepcopy(job.model).float()
    chosen = {id(ref.module.weight) for ref in linears(model).linears}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return model


def contenders() -> dict[str, Callable[[Job], Any]]:
    baselines: dict[str, Callable[[Job], Any]] = {
        "lora": of_peft(),
        "rslora": of_peft(use_rslora=True),
        "dora": of_peft(use_dora=True),
        "olora": of_peft(init_lora_weights="olora"),
        "lora-ga": lora_ga,
        "full fine-tuning": full,
    }
    return baselines | {name: ours(name) for name in METHODS}


def collator(job: Job) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
    from transformers import DataCollatorForSeq2Seq

    collate: Callable[[list[Any]], dict[str, torch.Tensor]] = DataCollatorForSeq2Seq(job.tokenizer, padding=True)
    return collate


def fit(
    job: Job, build: Callable[[Job], Any], rate: float, steps: int, judge: list[Example], seed: int = 0
) -> dict[str, Any]:
    """Train from the start with one learning rate; losses, times, and the model."""
    from eckart.models.training import answer_loss

    collate = collator(job)
    torch.manual_seed(seed)
    order = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(seed)).tolist()
    start = time.perf_counter()
    model = build(job)
    initialized = time.perf_counter() - start
    model.train()
    training = Training(model, rate, steps)
    watched: dict[int, float] = {}
    for step in range(steps):
        rows = [dict(job.train[order[(step * job.size.batch + i) % len(order)]]) for i in range(job.size.batch)]
        training.step(collate(rows))
        if steps == job.size.steps and (step + 1) % job.size.watch_every == 0:
            watched[step + 1] = answer_loss(model, judge[: job.size.watched], collate, batch_size=job.size.batch)
    final = answer_loss(model, judge, collate, batch_size=job.size.batch)
    return {
        "model": model,
        "loss": final,
        "curve": training.losses,
        "watched": watched,
        "seconds to initialize": initialized,
        "seconds a step": statistics.median(training.seconds),
        "trained parameters": sum(p.numel() for p in training.trained),
    }


def run(job: Job, name: str, build: Callable[[Job], Any]) -> dict[str, Any]:
    """One row of the table."""
    probe = sum(p.numel() for p in build(job).parameters() if p.requires_grad)
    rates = TINY_RATES if probe < job.lora_parameters / 4 else FULL_RATES if probe > job.lora_parameters * 4 else RATES
    search = best_rate(lambda rate: float(fit(job, build, rate, job.size.search_steps, job.search)["loss"]), rates)
    rate = best(search)
    done = fit(job, build, rate, job.size.steps, job.judge)
    model = done.pop("model")
    after = perplexity(model, job.windows, progress=False).perplexity
    return {
        "method" if name in METHODS else "baseline": name,
        **done,
        "learning rate": rate,
        "learning rates tried": {str(key): value for key, value in search.items()},
        "perplexity before": job.perplexity,
        "perplexity after": after,
        "peak memory": peak_memory(),
        "steps": job.size.steps,
        "seed": 0,
        **environment(),
    }


def more_seeds(job: Job, name: str, build: Callable[[Job], Any], row: dict[str, Any]) -> dict[str, Any]:
    """The row with the losses of two more seeds, at its learning rate."""
    losses = {"0": row["loss"]} | row.get("loss by seed", {})
    for seed in (1, 2):
        if str(seed) not in losses:
            losses[str(seed)] = fit(job, build, row["learning rate"], job.size.steps, job.judge, seed)["loss"]
    return row | {"loss by seed": losses}


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    found = sorted(rows(path).items(), key=lambda pair: pair[1]["loss"])
    for index, (name, row) in enumerate(found):
        steps, losses = [int(step) for step in row["watched"]], list(row["watched"].values())
        style = "--" if "baseline" in row else "-"
        color = plt.get_cmap("turbo")(index / max(1, len(found) - 1))
        axis.plot(steps, losses, style, color=color, label=name, linewidth=1.2)
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss of {Size.watched} held-out answers")
    axis.legend(fontsize=7, ncol=2)
    axis.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


def steps_to(row: dict[str, Any], loss: float) -> str:
    """Steps until the watched loss is at most ``loss``; in steps of `Size.watch_every`."""
    reached = [int(step) for step, value in row["watched"].items() if value <= loss]
    return str(min(reached)) if reached else "-"


def table(found: dict[str, Any]) -> None:
    of_lora = list(found["lora"]["watched"].values())[-1]

    def seeds(row: dict[str, Any]) -> str:
        losses = list(row.get("loss by seed", {"0": row["loss"]}).values())
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        return f"{statistics.mean(losses):.3f}{spread}"

    columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "method": lambda name, row: name if "method" in row else f"*{name}*",
        "loss": lambda name, row: f"{row['loss']:.3f}",
        "mean of seeds": lambda name, row: seeds(row),
        "steps to LoRA's loss": lambda name, row: steps_to(row, of_lora),
        "trained": lambda name, row: f"{row['trained parameters']:,}",
        "step, s": lambda name, row: f"{row['seconds a step']:.2f}",
        "start, s": lambda name, row: f"{row['seconds to initialize']:.1f}",
        "peak, GB": lambda name, row: f"{row['peak memory'] / 1e9:.2f}",
        "forgetting": lambda name, row: f"{row['perplexity before']:.1f} to {row['perplexity after']:.1f}",
        "learning rate": lambda name, row: f"{row['learning rate']:.2g}",
    }
    write_table(PAGE, columns, dict(sorted(found.items(), key=lambda pair: pair[1]["loss"])))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="*", default=[], help="rows to train with two more seeds")
    parser.add_argument("--smoke", action="store_true", help="two steps a row, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only draw the curves and write the table of the page")
    options = parser.parse_args()
    if options.draw:
        draw(RESULTS / "adapt_gsm8k.json")
        table(rows(RESULTS / "adapt_gsm8k.json"))
        return
    path = RESULTS.parent / "cache" / "adapt_gsm8k_smoke.json" if options.smoke else RESULTS / "adapt_gsm8k.json"
    if not (options.only or options.seeds):
        each_in_its_process(__file__, contenders(), path, *(["--smoke"] if options.smoke else []))
        return
    job = load(SMOKE if options.smoke else Size())
    for name in options.seeds:
        add_row(path, name, more_seeds(job, name, contenders()[name], rows(path)[name]))
    for name in options.only:
        row = run(job, name, contenders()[name])
        add_row(path, name, row)
        print(f"{name}: loss {row['loss']:.4f}, {row['trained parameters']:,} trained", flush=True)


if __name__ == "__main__":
    main()
