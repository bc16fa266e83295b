"""Intruder dimensions of LoRA and of full fine-tuning on one job, and what scaling them down gives and costs.

The demo model learns GSM8K answers for a few steps, by LoRA of rank 1, 8 and 64 (alpha = 2 r) and by training whole
weights. Then intruders are counted, and λ = 1, 0.75, 0.5, 0 is judged by the loss on WikiText-2's test text (what was
forgotten) and on held-out answers (what was learnt), for

    intruders        their singular values times λ: the published mitigation
    whole change     W0 + μ ΔW of all weights, μ >= 0 such that as much is taken away in norm
    whole change, λ  W0 + λ ΔW
    others           as many other directions of the same weights among the k leading ones, at random, times λ

A few steps are far from the paper's five epochs, so counts are small, and their order is what can be compared. Where
nothing is below the paper's threshold, edits go by the lowest higher one that something is below. Each row is
written as soon as it is done and a second call goes on where the first stopped:

python benchmarks/intruders.py [--only NAME ...] [--smoke] [--show] [--draw]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_job import Training, add_row, each_in_its_process, rows, write_table
from common import RESULTS, environment
from intruder_edits import Layer, edits, look
from language_model import answers, demo, evaluation
from torch import Tensor

from eckart.analysis import IntruderDimensions
from eckart.models import linears, perplexity
from eckart.models.answers import Example
from eckart.models.training import answer_loss

SCALES = (0.75, 0.5, 0.0)
# High: at a half of these (r = 1) nothing is below the paper's threshold after so few steps, and at 5e-2 (r = 1) the
# model is destroyed. Whole weights need smaller rates.
TUNINGS: dict[str, tuple[int | None, float]] = {
    "LoRA, r = 1": (1, 2e-2),
    "LoRA, r = 8": (8, 1e-2),
    "LoRA, r = 64": (64, 3e-3),
    "full fine-tuning": (None, 1e-4),
}
PAGE = Path(__file__).parents[1] / "docs" / "analysis-measured.md"


@dataclass(frozen=True)
class Size:
    """How much work one row is: two to three minutes on one thread."""

    steps: int = 40
    batch: int = 2
    held_out: int = 12
    length: int = 160
    text_windows: int = 2


SMOKE = Size(steps=2, batch=1, held_out=2, text_windows=1)


@dataclass
class Job:
    """The base model, the data and the sizes that all rows share."""

    size: Size
    model: Any
    tokenizer: Any
    train: list[Example]
    judge: list[Example]
    windows: list[Any]
    options: IntruderDimensions

    def losses(self, model: Any) -> dict[str, float]:
        """What is left of the general text, and what was learnt."""
        return {
            "text": math.log(perplexity(model, self.windows, progress=False).perplexity),
            "answers": answer_loss(model, self.judge, self.collate, batch_size=self.size.batch),
        }

    def collate(self, examples: list[Any]) -> dict[str, Tensor]:
        from transformers import DataCollatorForSeq2Seq

        batch: dict[str, Tensor] = DataCollatorForSeq2Seq(self.tokenizer, padding=True)(examples)
        return batch


def load(size: Size, model: Any = None, tokenizer: Any = None, source: Path | None = None) -> Job:
    if model is None:
        model, tokenizer = demo()
    examples = answers(tokenizer, size.length, source)
    windows = evaluation(tokenizer, samples=size.text_windows)
    train, judge = examples[: -size.held_out], examples[-size.held_out :]
    return Job(size, model.float(), tokenizer, train, judge, windows, IntruderDimensions())


def tuned(job: Job, rank: int | None, rate: float) -> tuple[Any, list[float], float]:
    """The model after training, merged; losses of the steps; seconds of a step."""
    model = copy.deepcopy(job.model)
    names = [ref.name for ref in linears(model).linears]
    torch.manual_seed(0)
    if rank is None:
        chosen = {id(ref.module.weight) for ref in linears(model).linears}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    else:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    order = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(0)).tolist()
    model.train()
    training = Training(model, rate, job.size.steps)
    for step in range(job.size.steps):
        picked = [order[(step * job.size.batch + i) % len(order)] for i in range(job.size.batch)]
        training.step(job.collate([dict(job.train[index]) for index in picked]))
    merged = model if rank is None else model.merge_and_unload()
    return merged.eval(), training.losses, statistics.median(training.seconds)


def judged(job: Job, model: Any, layers: list[Layer], after: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Losses for every edit and λ; where nothing is an intruder, only the plain scaling changes anything."""
    intruders = sum(len(one.intruders) for one in layers)
    found: dict[str, dict[str, Any]] = {}
    for name, edit in edits(layers).items():
        found[name] = {"1": dict(after)}
        for scale in SCALES if intruders or name == "whole change, λ" else ():
            for one in layers:
                one.weight.copy_(edit(one, scale))
            found[name][f"{scale:g}"] = job.losses(model)
        for one in layers:
            one.weight.copy_(one.after)
    return found


def run(job: Job, name: str) -> dict[str, Any]:
    """One row: a way to fine-tune."""
    rank, rate = TUNINGS[name]
    before = job.losses(job.model)
    model, curve, seconds = tuned(job, rank, rate)
    after = job.losses(model)
    start = time.perf_counter()
    layers, threshold = look(job.model, model, job.options)
    counted = time.perf_counter() - start
    sweep = {f"{t:g}": sum(len(one.found.intruders(t)) for one in layers) for t in job.options.sweep}
    size = math.sqrt(sum(float(one.before.norm()) ** 2 for one in layers))
    return {
        "method": "intruder-dimensions",
        "tuning": name,
        "rank": rank,
        "learning rate": rate,
        "steps": job.size.steps,
        "curve": curve,
        "seconds a step": seconds,
        "change": math.sqrt(sum(float((one.after - one.before).norm()) ** 2 for one in layers)) / size,
        "before": before,
        "after": after,
        "directions": sum(len(one.found.s) for one in layers),
        "threshold": job.options.threshold,
        "intruders": sum(len(one.found.intruders(job.options.threshold)) for one in layers),
        "threshold of the edits": threshold,
        "directions scaled": sum(len(one.intruders) for one in layers),
        "robust intruders": sum(len(one.found.intruders(job.options.threshold, robust=True)) for one in layers),
        "others scaled": sum(len(one.others) for one in layers),
        "weights with directions scaled": sum(bool(len(one.intruders)) for one in layers),
        "counts": sweep,
        "seconds to count": counted,
        "losses": judged(job, model, layers, after),
        "seed": 0,
        **environment(),
    }


def show(found: dict[str, Any]) -> None:
    """The figures as text: loss of the text and of the answers for every λ, and the counts."""
    for name, row in found.items():
        before, after = row["before"], row["after"]
        print(f"{name}: {row['intruders']} intruders of {row['directions']}, by threshold {row['counts']}")
        print(f"  text {before['text']:.4f} -> {after['text']:.4f}, answers {before['answers']:.4f} -> "
              f"{after['answers']:.4f}, change {row['change']:.2%}")  # fmt: skip
        for edit, losses in row["losses"].items():
            pairs = (f"{scale}: {one['text']:.4f} {one['answers']:.4f}" for scale, one in losses.items())
            print(f"  {edit:16} " + "   ".join(pairs))


def draw(found: dict[str, Any]) -> None:
    """Write the two tables of the page: counts and losses, and the losses of text and answers at every λ."""

    def counts(row: dict[str, Any], *thresholds: str) -> str:
        return ", ".join(str(row["counts"][one]) for one in thresholds)

    write_table(PAGE, {
        "fine-tuning": lambda name, row: name,
        "learning rate": lambda name, row: f"{row['learning rate']:g}",
        "change, %": lambda name, row: f"{100 * row['change']:.2f}",
        "answers": lambda name, row: f"{row['before']['answers']:.3f} to {row['after']['answers']:.3f}",
        "text": lambda name, row: f"{row['before']['text']:.3f} to {row['after']['text']:.3f}",
        "directions": lambda name, row: f"{row['directions']:,}",
        "intruders": lambda name, row: f"{row['intruders']} ({row['robust intruders']} robust)",
        "below 0.6, 0.7, 0.8, 0.9": lambda name, row: counts(row, "0.6", "0.7", "0.8", "0.9"),
    }, found, "intruders")  # fmt: skip
    edited = {
        f"{name}, below {row['threshold of the edits']:g}: {edit}": {
            scale: losses.get(scale) for scale in ("1", "0.75", "0.5", "0")
        }
        for name, row in found.items()
        for edit, losses in row["losses"].items()
        if len(losses) > 1
    }

    def column(scale: str) -> Callable[[str, dict[str, Any]], str]:
        return lambda name, one: f"{one[scale]['text']:.3f}, {one[scale]['answers']:.3f}"

    write_table(PAGE, {"what is scaled": lambda name, one: name} | {f"λ = {scale}": column(scale) for scale in
                ("1", "0.75", "0.5", "0")}, edited, "intruders-scaled")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--smoke", action="store_true", help="two steps a row, into a file of its own")
    parser.add_argument("--show", action="store_true", help="only print the rows that there are")
    parser.add_argument("--draw", action="store_true", help="only write the tables of the page")
    options = parser.parse_args()
    path = RESULTS.parent / "cache" / "intruders_smoke.json" if options.smoke else RESULTS / "intruders.json"
    if options.draw:
        draw(rows(path))
        return
    if not (options.only or options.show):
        each_in_its_process(__file__, TUNINGS, path, *(["--smoke"] if options.smoke else []))
    job = load(SMOKE if options.smoke else Size()) if options.only else None
    for name in options.only:
        assert job is not None
        add_row(path, name, run(job, name))
    if not (options.only or options.show or options.smoke):
        draw(rows(path))
    show({name: row for name, row in rows(path).items() if name in options.only or not options.only})


if __name__ == "__main__":
    main()
