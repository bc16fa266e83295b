"""Every way of making the demo model's weights smaller, on the same text: quality, bytes, speed, cost.

Calibration: WikiText-2 validation. Judged by: perplexity of WikiText-2 test, and the loss of GSM8K answers, which no
method has seen. Ratios 0.2 and 0.4 for every method with its own sharing of the budget, 0.1 and 0.3 for the best five.
Beside them the dense model, torchao's 8-bit and 4-bit weights, a pruning of the smallest weights, and `auto`. Rows are
added to results/compress_lm.json one by one; what is there is not measured again.

python benchmarks/compress_lm.py
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_job import add_row, each_in_its_process, rows, write_table
from common import RESULTS, environment
from labels import label
from language_model import answers, calibration, demo, evaluation
from torch import nn

from eckart import catalog
from eckart.compression import choose, compress, recover
from eckart.models import linears, perplexity
from eckart.models.batches import as_batches, single_examples
from eckart.models.evaluate import peak_memory
from eckart.models.timing import time_per_token
from eckart.models.training import answer_loss
from eckart.structures import EckartWarning

PAGE = Path(__file__).parents[1] / "docs" / "compress-lm.md"
RATIOS = (0.2, 0.4)
MORE_RATIOS = (0.1, 0.3)
RECOVERY_SECONDS = 590.0
# Not for a language model's linears, or no method for inference.
ELSEWHERE = ("mixed-td", "sub-moe", "ones", "emloc")


@dataclass(frozen=True)
class Size:
    samples: int = 32
    judged: int = 16
    answers: int = 48
    answer_length: int = 256
    recovery: int = 400
    recovery_samples: int = 256
    prune_steps: int = 60
    timed: bool = True


SMOKE = Size(2, 1, 2, 128, 1, 2, 2, timed=False)


@dataclass
class Job:
    """The model, what calibrates and what judges."""

    size: Size
    model: Any
    tokenizer: Any
    data: list[Any]
    test: list[Any]
    examples: list[Any]
    recovery: Callable[[], list[Any]] | None = None  # reads what is trained on; that which calibrates, if None


def load(size: Size, model: Any = None, tokenizer: Any = None, examples: list[Any] | None = None) -> Job:
    if model is None:
        model, tokenizer = demo()
    held_out = answers(tokenizer, size.answer_length)[-size.answers :] if examples is None else examples
    data, test = calibration(tokenizer, size.samples), evaluation(tokenizer, size.judged)
    return Job(size, model, tokenizer, data, test, held_out, lambda: calibration(tokenizer, size.recovery_samples))


Make = Callable[[Job], tuple[nn.Module, dict[str, Any]]]


def by(method: str, ratio: float, recovered: bool = False, from_original: bool = False, **options: Any) -> Make:
    """A method at a ratio, with or without recovery after it, from the text or from what the dense model predicts."""

    def make(job: Job) -> tuple[nn.Module, dict[str, Any]]:
        settings, data = dict(options), job.data
        if method == "loraprune":  # one window a step: it trains
            settings["steps"], data = job.size.prune_steps, list(single_examples(as_batches(job.data)))
        result = compress(copy.deepcopy(job.model), method, ratio=ratio, data=data, progress=False, **settings)
        notes = {"method": method, "ratio": ratio, "removed": result.ratio, "allocation": result.settings["allocation"]}
        if recovered:
            *text, held_out = job.recovery() if job.recovery else [*job.data, *job.data]
            done = recover(
                result.model,
                text,
                job.size.recovery,
                held_out=[held_out],
                teacher=job.model if from_original else None,
                max_seconds=RECOVERY_SECONDS,
                progress=False,
            )
            notes |= {"recovery steps": done.steps, "recovery seconds": done.seconds}
        return result.model, notes

    return make


def chosen(ratio: float) -> Make:
    def make(job: Job) -> tuple[nn.Module, dict[str, Any]]:
        choice = choose(job.model, job.data, ratio=ratio, progress=False)
        best = choice.best
        made, notes = by(best.method, ratio, allocation=best.allocation)(job)
        return made, {**notes, "method": None, "baseline": "auto", "tried": choice.to_dict(), "chosen": best.method}

    return make


def dense(job: Job) -> tuple[nn.Module, dict[str, Any]]:
    return copy.deepcopy(job.model), {"baseline": "dense"}


def quantized(bits: int) -> Make:
    """torchao's weight-only integers on the linears of the blocks."""

    def make(job: Job) -> tuple[nn.Module, dict[str, Any]]:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        made = copy.deepcopy(job.model)
        names = {ref.name for ref in linears(made).linears}
        grouped = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        config = Int8WeightOnlyConfig() if bits == 8 else grouped
        quantize_(made, config, filter_fn=lambda _, name: name in names)
        return made, {"baseline": f"int{bits}"}

    return make


def pruned(ratio: float) -> Make:
    """The smallest weights of each matrix set to zero; stored dense, it saves nothing."""

    def make(job: Job) -> tuple[nn.Module, dict[str, Any]]:
        made = copy.deepcopy(job.model)
        with torch.no_grad():
            for ref in linears(made).linears:
                size = ref.weight.abs().flatten()
                ref.weight[ref.weight.abs() <= size.kthvalue(int(ratio * len(size))).values] = 0
        return made, {"baseline": "magnitude pruning", "ratio": ratio}

    return make


def bytes_of(model: nn.Module) -> int:
    """Of all tensors as stored; torchao's 4-bit numbers lie in bytes of 8 bits and count as 4."""
    total = 0.0
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        if not hasattr(tensor, "__tensor_flatten__"):
            total += tensor.numel() * tensor.element_size()
            continue
        four = getattr(tensor, "target_dtype", None) is torch.int4
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            total += inner.numel() * inner.element_size() * (0.5 if four and name == "qdata" else 1.0)
    return int(total)


def at(ratio: float) -> dict[str, Make]:
    """Every row of one ratio."""
    names = [row.name for row in catalog.select(family="compression") if row.target and row.name not in ELSEWHERE]
    found = {name: by(name, ratio) for name in names}
    found["svd-llm plain"] = by("svd-llm", ratio, form="plain")
    found["pifa threshold"] = by("pifa", ratio, allocation="threshold")
    found["pifa fisher"] = by("pifa", ratio, allocation="fisher")
    found["svd-llm fisher"] = by("svd-llm", ratio, allocation="fisher")
    found["pifa block-influence"] = by("pifa", ratio, allocation="block-influence")
    found["magnitude pruning"] = pruned(ratio)
    found["auto"] = chosen(ratio)
    found["pifa fisher recovered"] = by("pifa", ratio, recovered=True, allocation="fisher")
    found["pifa fisher recovered from original"] = by(
        "pifa", ratio, recovered=True, from_original=True, allocation="fisher"
    )
    found["modegpt recovered"] = by("modegpt", ratio, recovered=True)
    return {f"{name} {ratio}": make for name, make in found.items()}


def contenders() -> dict[str, Make]:
    found: dict[str, Make] = {"dense": dense, "int8": quantized(8), "int4": quantized(4)}
    for ratio in RATIOS:
        found |= at(ratio)
    return found


def best_five(found: dict[str, Any]) -> dict[str, Make]:
    """The five methods of lowest perplexity at 0.2, each with its best sharing of the budget, at two ratios more."""
    judged = [
        (row["perplexity"], row["method"], name.removesuffix(" 0.2"))
        for name, row in found.items()
        if row.get("method") and row.get("ratio") == 0.2 and "recovery steps" not in row
    ]
    best: dict[str, str] = {}
    for _, method, name in sorted(judged):
        best.setdefault(method, name)
    names = list(best.values())[:5]
    return {f"{name} {ratio}": at(ratio)[f"{name} {ratio}"] for ratio in MORE_RATIOS for name in names}


def run(job: Job, name: str, make: Make) -> dict[str, Any]:
    """One row of the table."""
    from transformers import DataCollatorForSeq2Seq

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        model, notes = make(job)
    seconds, peak = time.perf_counter() - start, peak_memory()
    quality = perplexity(model, job.test, progress=False)
    row = {
        **notes,
        "perplexity": quality.perplexity,
        "answer loss": answer_loss(model, job.examples, DataCollatorForSeq2Seq(job.tokenizer, padding=True)),
        "bytes": bytes_of(model),
        "prompt tokens a second": quality.tokens_per_second,
        "ms a token": time_per_token(model, progress=False) if job.size.timed else None,
        "seconds to compress": seconds,
        "peak memory to compress": peak,
        **environment(),
    }
    print(f"{name}: perplexity {row['perplexity']:.2f}, {row['bytes'] / 1e6:.0f} MB, {seconds:.0f} s", flush=True)
    return row


def draw(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    figure, axes = plt.subplots(1, 2, figsize=(15, 9), constrained_layout=True)
    whole = found["dense"]["perplexity"]
    shown = {name: row for name, row in found.items() if row["perplexity"] < 20 * whole}
    named = []
    for axis, title, x_of in (
        (axes[0], "MB", lambda row: row["bytes"] / 1e6),
        (axes[1], "ms a generated token", lambda row: row["ms a token"]),
    ):
        points = {name: (x_of(row), row["perplexity"]) for name, row in shown.items() if x_of(row) is not None}
        for name, point in points.items():
            axis.plot(*point, "o", color="#1060a0" if shown[name].get("method") else "#b04000", alpha=0.8)
        axis.set(xlabel=title, ylabel="perplexity of WikiText-2 test", xscale="log", yscale="log")
        axis.margins(x=0.12)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            scale.set_major_formatter("{x:g}")
        axis.axhline(whole, color="gray", linewidth=0.8)
        named.append((axis, points))
    figure.draw_without_rendering()  # the layout decides where labels can be
    for axis, points in named:
        label(axis, points)
    figure.savefig(PAGE.parent / "images" / "compress-lm.png", dpi=120)


def table(found: dict[str, Any]) -> None:
    columns = {
        "model": lambda name, row: name if row.get("method") else f"*{name}*",
        "perplexity": lambda name, row: f"{row['perplexity']:,.1f}",
        "answer loss": lambda name, row: f"{row['answer loss']:.3f}",
        "MB": lambda name, row: f"{row['bytes'] / 1e6:.0f}",
        "ms a token": lambda name, row: "" if row["ms a token"] is None else f"{row['ms a token']:.1f}",
        "prompt tokens/s": lambda name, row: f"{row['prompt tokens a second']:,.0f}",
        "to compress, s": lambda name, row: f"{row['seconds to compress']:.0f}",
        "peak, GB": lambda name, row: f"{row['peak memory to compress'] / 1e9:.1f}",
    }
    write_table(PAGE, columns, dict(sorted(found.items(), key=lambda pair: pair[1]["perplexity"])))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--smoke", action="store_true", help="few tokens, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only draw the pictures and write the page's table")
    options = parser.parse_args()
    path = RESULTS.parent / "cache" / "compress_lm_smoke.json" if options.smoke else RESULTS / "compress_lm.json"
    if options.draw:
        draw(rows(path))
        table(rows(path))
        return
    arguments = ["--smoke"] if options.smoke else []
    if not options.only:
        each_in_its_process(__file__, contenders(), path, *arguments)
        each_in_its_process(__file__, best_five(rows(path)), path, *arguments)
        return
    job = load(SMOKE if options.smoke else Size())
    known = contenders() | best_five(rows(path))
    for name in options.only:
        add_row(path, name, run(job, name, known[name]))


if __name__ == "__main__":
    main()
