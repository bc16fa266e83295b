"""Intruder dimensions of LoRA and of full fine-tuning on one job, and what scaling them down gives and costs.

The demo model learns GSM8K answers for a few steps, by LoRA of rank 1, 8 and 64 (alpha = 2 r) and by training whole
weights. Then intruders are counted, and λ = 1, 0.75, 0.5, 0 is judged by the loss on WikiText-2's test text (what was
forgotten) and on held-out answers (what was learnt), for

    intruders        their singular values times λ: the published mitigation
    whole change     W0 + μ ΔW of all weights, μ >= 0 such that as much is taken away in norm
    whole change, λ  W0 + λ ΔW
    others           as many other directions of the same weights among the k leading ones, at random, times λ

A few steps are far from the paper's five epochs, so counts are small; their order is what can be compared. Each row is
written as soon as it is done and a second call goes on where the first stopped:

python benchmarks/intruders.py [--only NAME ...] [--smoke] [--show]
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
from adapter_job import Training, add_row, each_in_its_process, rows
from common import RESULTS, environment
from language_model import answers, demo, evaluation
from torch import Tensor

from eckart.analysis.intruder_dimensions import IntruderDimensions, Leading, leading
from eckart.linalg import SingularBasis
from eckart.models import linears, perplexity
from eckart.models.answers import Example
from eckart.models.training import answer_loss

SCALES = (0.75, 0.5, 0.0)
# Learning rates that reach about the same training loss in so few steps; whole weights need smaller ones.
TUNINGS: dict[str, tuple[int | None, float]] = {
    "LoRA, r = 1": (1, 3e-3),
    "LoRA, r = 8": (8, 1e-3),
    "LoRA, r = 64": (64, 3e-4),
    "full fine-tuning": (None, 5e-5),
}


@dataclass(frozen=True)
class Size:
    """How much work one row is: about four minutes on one thread."""

    steps: int = 60
    batch: int = 2
    held_out: int = 24
    length: int = 160
    text_windows: int = 4


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


@dataclass
class Layer:
    """One weight: as it was, as it is, and the directions that are scaled.

    Attributes:
        weight: the parameter (out, in) of the tuned model.
        before: W0.
        after: a copy of W.
        found: the leading directions.
        intruders: which of them are.
        others: as many of the others, at random.
    """

    weight: Tensor
    before: Tensor
    after: Tensor
    found: Leading
    intruders: Tensor
    others: Tensor

    def part(self, chosen: Tensor) -> Tensor:
        """Sum of the chosen s_j u_j v_jᵀ."""
        product: Tensor = (self.found.u[:, chosen] * self.found.s[chosen]) @ self.found.vh[chosen]
        return product.to(self.weight.dtype)


def look(job: Job, model: Any) -> list[Layer]:
    """The leading directions of every weight against the base's."""
    generator = torch.Generator().manual_seed(1)
    layers = []
    for old, new in zip(linears(job.model).linears, linears(model).linears, strict=True):
        before, weight = old.weight.detach(), new.weight.detach()
        found = leading(weight, SingularBasis(before), job.options.top, job.options.near)
        intruders = found.intruders(job.options.threshold)
        rest = torch.tensor([j for j in range(len(found.s)) if j not in intruders.tolist()], dtype=torch.long)
        others = rest[torch.randperm(len(rest), generator=generator)[: len(intruders)]]
        layers.append(Layer(weight, before, weight.clone(), found, intruders, others))
    return layers


def edits(layers: list[Layer]) -> dict[str, Callable[[Layer, float], Tensor]]:
    """New weights for λ, by what is scaled."""
    size = math.sqrt(sum(float(one.found.s[one.intruders].square().sum()) for one in layers))
    moved = math.sqrt(sum(float((one.after - one.before).norm()) ** 2 for one in layers))

    def same_norm(one: Layer, scale: float) -> Tensor:
        kept = max(0.0, 1 - (1 - scale) * size / moved)
        return one.before + kept * (one.after - one.before)

    return {
        "intruders": lambda one, scale: one.after + (scale - 1) * one.part(one.intruders),
        "whole change": same_norm,
        "whole change, λ": lambda one, scale: one.before + scale * (one.after - one.before),
        "others": lambda one, scale: one.after + (scale - 1) * one.part(one.others),
    }


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
    layers = look(job, model)
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
        "intruders": sum(len(one.intruders) for one in layers),
        "robust intruders": sum(len(one.found.intruders(job.options.threshold, robust=True)) for one in layers),
        "others scaled": sum(len(one.others) for one in layers),
        "weights with intruders": sum(bool(len(one.intruders)) for one in layers),
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--smoke", action="store_true", help="two steps a row, into a file of its own")
    parser.add_argument("--show", action="store_true", help="only print the rows that there are")
    options = parser.parse_args()
    path = RESULTS.parent / "cache" / "intruders_smoke.json" if options.smoke else RESULTS / "intruders.json"
    if not (options.only or options.show):
        each_in_its_process(__file__, TUNINGS, path, *(["--smoke"] if options.smoke else []))
    job = load(SMOKE if options.smoke else Size()) if options.only else None
    for name in options.only:
        assert job is not None
        add_row(path, name, run(job, name))
    show({name: row for name, row in rows(path).items() if name in options.only or not options.only})


if __name__ == "__main__":
    main()
