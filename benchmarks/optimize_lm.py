"""Every optimizer on two jobs: a small Llama from scratch on text, and full fine-tuning of the demo model on answers.

Pre-training: bytes of WikiText-2's validation text, its last tenth held out, the same batches for all. Fine-tuning:
GSM8K answers, every weight of the model. Three learning rates are tried over fewer steps, and up to two beyond where
the best is at an end; the two best are trained to the end, and the better one counts. Optimizers that project have a
rank of a quarter of the width. Every row is a process of its own and is written when it is done; a second call goes on
where the first stopped, and `--only` keeps the search of a row that is there:

python benchmarks/optimize_lm.py [--only NAME ...] [--smoke] [--draw]

galore-torch and apollo-torch are measured where they are installed: pip install --no-deps galore-torch apollo-torch
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_job import add_row, best, best_rate, each_in_its_process, rows, write_table
from common import RESULTS, environment
from language_model import answers, demo, text
from torch import Tensor, nn

from eckart import catalog
from eckart.models import peak_memory
from eckart.models.answers import Example
from eckart.optim import low_rank_groups, optimizer_class

PAGE = Path(__file__).parents[1] / "docs" / "optimize-lm.md"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "optimize-lm.png"
SHARE = 4  # the rank is the width over this

Build = Callable[[nn.Module, float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Size:
    """How much work one row is."""

    width: int = 256
    layers: int = 6
    steps: int = 200
    search_steps: int = 50
    batch: int = 16
    length: int = 128
    held_out: int = 64
    tune_steps: int = 24
    tune_search_steps: int = 8
    tune_batch: int = 2
    tune_length: int = 160
    tune_held_out: int = 32


SMOKE = Size(32, 1, 3, 1, 2, 16, 2, tune_steps=2, tune_search_steps=1, tune_batch=1, tune_length=48, tune_held_out=2)


@dataclass(frozen=True)
class Optimizer:
    """A contender.

    Attributes:
        build: Makes it for a model and a learning rate.
        rates: Learning rates of pre-training.
        tune_rates: Of fine-tuning.
    """

    build: Build
    rates: tuple[float, ...] = (2.5e-3, 1e-2, 4e-2)
    tune_rates: tuple[float, ...] = (1e-4, 4e-4, 1.6e-3)


def llama(size: Size) -> Any:
    """Untrained, for bytes; 5M parameters in the default size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 3 // 16 * 16,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 64),
        max_position_embeddings=size.length,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def rank_of(model: Any) -> int:
    return max(1, int(model.config.hidden_size) // SHARE)


def ours(method: str, bits: int = 32, **options: Any) -> Build:
    def build(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        return optimizer_class(method, bits=bits)(low_rank_groups(model, rank_of(model)), lr=rate, **options)

    return build


def plain(kind: str, **options: Any) -> Build:
    """An optimizer of torch, torchao or transformers, by "module:Class"."""

    def build(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        module, name = kind.split(":")
        found: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(
            [p for p in model.parameters() if p.requires_grad], lr=rate, **options
        )
        return found

    return build


class _Both(torch.optim.Optimizer):
    """Two optimizers as one; torch's Muon takes matrices only."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
            self.state.update(part.state)


def muon(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    groups = low_rank_groups(model, rank_of(model))
    matrices = [p for _, p in groups[0]["params"]]
    rest = [p for group in groups[1:] for _, p in group["params"]]
    adjusted = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return _Both([adjusted, torch.optim.AdamW(rest, lr=rate, weight_decay=0.0)])


def peer(package: str, name: str, **options: Any) -> Build:
    """The projecting optimizers of others, which take a group of matrices with the projection's numbers."""

    def build(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        groups = low_rank_groups(model, rank_of(model))
        matrices = [p for _, p in groups[0]["params"]]
        rest = [p for group in groups[1:] for _, p in group["params"]]
        projected = {"params": matrices, "rank": rank_of(model), "update_proj_gap": 200, "scale": 0.25, **options}
        found: torch.optim.Optimizer = getattr(importlib.import_module(package), name)(
            [{"params": rest}, projected], lr=rate
        )
        return found

    return build


def contenders() -> dict[str, Optimizer]:
    full, tune = (1e-3, 3e-3, 9e-3), (1e-5, 4e-5, 1.6e-4)
    found = {
        "adamw": Optimizer(plain("torch.optim:AdamW", weight_decay=0.0), full, tune),
        "torchao 8-bit adamw": Optimizer(plain("torchao.optim:AdamW8bit", weight_decay=0.0), full, tune),
        "torchao 4-bit adamw": Optimizer(plain("torchao.optim:AdamW4bit", weight_decay=0.0), full, tune),
        "adafactor": Optimizer(
            plain("transformers.optimization:Adafactor", scale_parameter=False, relative_step=False), full, tune
        ),
        "muon": Optimizer(muon, full, tune),
    }
    if importlib.util.find_spec("galore_torch"):
        found["galore-torch"] = Optimizer(peer("galore_torch", "GaLoreAdamW", proj_type="std"))
    if importlib.util.find_spec("apollo_torch"):
        found["apollo-torch"] = Optimizer(
            peer("apollo_torch", "APOLLOAdamW", proj="random", scale_type="channel", proj_type="std")
        )
    for row in catalog.select(family="optim"):
        if row.status != "planned":
            unscaled = optimizer_class(row.name).method().__dict__.get("scale", 1.0) == 1.0
            rates = (full, tune) if unscaled else (Optimizer.rates, Optimizer.tune_rates)
            found[row.name] = Optimizer(ours(row.name), *rates)
            found[f"{row.name} 8-bit"] = Optimizer(ours(row.name, bits=8), *rates)
    # What a published scale does: it is the rate of the projected matrices over that of embeddings, head and norms.
    found["dct-adamw 8-bit, scale 0.25"] = Optimizer(ours("dct-adamw", bits=8, scale=0.25))
    # GaLore's scale, and its columns kept: choosing at every step starts the moments of the new ones from zero.
    kept = ours("dct-adamw", bits=8, scale=0.25, norm=2, update_interval=1000)
    found["dct-adamw 8-bit, scale 0.25, columns kept"] = Optimizer(kept)
    found["galore 8-bit, scale 1"] = Optimizer(ours("galore", bits=8, scale=1.0), full, tune)
    found["fira 8-bit, scale 1"] = Optimizer(ours("fira", bits=8, scale=1.0), full, tune)
    return found


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    """All tensors that an optimizer keeps, those inside objects of others too."""
    seen: set[int] = set()

    def size(value: Any) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, Tensor):
            if hasattr(value, "__tensor_flatten__"):
                return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
            return value.untyped_storage().nbytes()
        if isinstance(value, dict):
            return sum(size(one) for one in value.values())
        if isinstance(value, list | tuple):
            return sum(size(one) for one in value)
        return size(vars(value)) if hasattr(value, "__dict__") else 0

    return sum(size(state) for state in optimizer.state.values())


@dataclass
class Run:
    """What one training gave."""

    loss: float
    curve: list[float]
    seconds: list[float]
    state: int
    trained: int


def train(
    model: Any, build: Build, rate: float, batches: Iterable[dict[str, Tensor]], steps: int, judge: Callable[[], float]
) -> Run:
    """Train, with one cycle of the rate and gradients clipped; only the optimizer's own time is taken."""
    optimizer = build(model, rate)
    # The schedule as a plain factor: the optimizers of others have their own ideas of groups.
    start = [group["lr"] for group in optimizer.param_groups]
    curve, seconds = [], []
    model.train()
    for step, batch in zip(range(steps), batches, strict=False):
        factor = min((step + 1) / max(1, steps // 10), 1 - 0.9 * step / steps)
        for group, first in zip(optimizer.param_groups, start, strict=True):
            group["lr"] = first * factor
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        begin = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Run(judge(), curve, seconds, bytes_of_state(optimizer), trained)


@dataclass
class Pretraining:
    """A small model, bytes to learn and bytes to judge by."""

    size: Size
    train: Tensor
    judge: Tensor

    def run(self, build: Build, rate: float, steps: int) -> Run:
        model, size = llama(self.size), self.size
        generator = torch.Generator().manual_seed(0)

        def batches() -> Iterable[dict[str, Tensor]]:
            while True:
                places = torch.randint(len(self.train) - size.length, (size.batch,), generator=generator)
                ids = torch.stack([self.train[place : place + size.length] for place in places.tolist()])
                yield {"input_ids": ids, "labels": ids}

        def judge() -> float:
            model.eval()
            windows = self.judge[: size.held_out * size.length].view(-1, size.length)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                losses = [float(model(input_ids=part, labels=part).loss) for part in windows.split(size.batch)]
            return statistics.mean(losses)

        return train(model, build, rate, batches(), steps, judge)


@dataclass
class Tuning:
    """The demo model, answers to learn and answers to judge by."""

    size: Size
    model: Any
    tokenizer: Any
    examples: list[Example]
    judge: list[Example]

    def run(self, build: Build, rate: float, steps: int) -> Run:
        from transformers import DataCollatorForSeq2Seq

        from eckart.models.training import answer_loss

        model, size = copy.deepcopy(self.model), self.size
        collate = DataCollatorForSeq2Seq(self.tokenizer, padding=True)
        starts = range(0, len(self.examples) - size.tune_batch, size.tune_batch)
        batches = (collate([dict(e) for e in self.examples[i : i + size.tune_batch]]) for i in starts)

        def judge() -> float:
            with torch.autocast("cpu", torch.bfloat16):
                return answer_loss(model, self.judge, collate, batch_size=size.tune_batch)

        return train(model, build, rate, batches, steps, judge)


def pretraining(size: Size, source: Path | None = None) -> Pretraining:
    source = source or text("wikitext2-valid.txt")
    if source is None:
        raise SystemExit("wikitext2-valid.txt is missing: put it where $ECKART_BENCH_DATA says")
    data = torch.tensor(list(source.read_bytes()))
    cut = len(data) * 9 // 10
    return Pretraining(size, data[:cut], data[cut:])


def tuning(size: Size, model: Any = None, tokenizer: Any = None, source: Path | None = None) -> Tuning:
    if model is None:
        model, tokenizer = demo()
    found = answers(tokenizer, size.tune_length, source)
    return Tuning(size, model, tokenizer, found[: -size.tune_held_out], found[-size.tune_held_out :])


Row = dict[str, Any]


def measured(job: Pretraining | Tuning, contender: Optimizer, steps: int, search_steps: int, before: Row) -> Row:
    """The two rates that are best after a few steps, trained to the end, and the better one's figures.

    Args:
        job: what is trained.
        contender: by which optimizer.
        steps: of a training.
        search_steps: of one that only chooses rates.
        before: what an earlier run found of this row, with one rate trained to the end or two; empty for nothing.
    """
    rates = contender.rates if isinstance(job, Pretraining) else contender.tune_rates
    search = {float(rate): loss for rate, loss in before.get("learning rates tried", {}).items()}
    search = search or best_rate(lambda rate: job.run(contender.build, rate, search_steps).loss, rates, factor=4.0)
    found = before
    ends = {float(rate): loss for rate, loss in before.get("losses at the end", {}).items()}
    if before and not ends:
        ends = {before["learning rate"]: before["loss"]}
    for rate in sorted(search, key=lambda rate: (math.isnan(search[rate]), search[rate]))[:2]:
        if rate in ends:
            continue
        done = job.run(contender.build, rate, steps)
        ends[rate] = done.loss
        if best(ends) == rate:
            found = figures(done) | {"learning rate": rate, "steps": steps}
    tried = {str(rate): loss for rate, loss in search.items()}
    return found | {"learning rates tried": tried, "losses at the end": {str(rate): x for rate, x in ends.items()}}


def figures(done: Run) -> Row:
    return {
        "loss": done.loss,
        "curve": done.curve,
        "state bytes": done.state,
        "trained parameters": done.trained,
        "seconds an update": statistics.median(done.seconds),
        "seconds of the worst update": max(done.seconds),
        "seconds of the first update": done.seconds[0],
        "peak memory": peak_memory(),
    }


def run(jobs: tuple[Pretraining, Tuning], name: str, contender: Optimizer, before: Row | None = None) -> Row:
    """One row of the table; ``before`` is the row as it was, whose searches are kept."""
    first, second = jobs
    size, before = first.size, before or {"pre-training": {}, "fine-tuning": {}}
    pretrained = measured(first, contender, size.steps, size.search_steps, before["pre-training"])
    tuned = measured(second, contender, size.tune_steps, size.tune_search_steps, before["fine-tuning"])
    method = name.partition(",")[0].removesuffix(" 8-bit")
    key = "method" if method in {row.name for row in catalog.select(family="optim")} else "baseline"
    return {key: method, "name": name, "pre-training": pretrained, "fine-tuning": tuned, **environment()}


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), constrained_layout=True)
    for axis, job in zip(axes, ("pre-training", "fine-tuning"), strict=True):
        for name, row in rows(path).items():
            mark, color = ("s", "#b04000") if "baseline" in row else ("o", "#1060a0")
            x, y = row[job]["state bytes"] / row[job]["trained parameters"], row[job]["loss"]
            axis.plot(x, y, mark, color=color, alpha=0.8, fillstyle="none" if name.endswith("8-bit") else "full")
            axis.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        axis.set_xlabel("bytes of optimizer state a parameter")
        axis.set_ylabel("held-out loss")
        axis.set_title(job)
        axis.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


def table(found: dict[str, Any]) -> None:
    def of(job: str, key: str, form: str, divide: float = 1.0) -> Callable[[str, dict[str, Any]], str]:
        return lambda name, row: format(row[job][key] / divide, form)

    columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "optimizer": lambda name, row: name if "method" in row else f"*{name}*",
        "pre-training loss": of("pre-training", "loss", ".3f"),
        "state, MB": of("pre-training", "state bytes", ".1f", 1e6),
        "update, ms": of("pre-training", "seconds an update", ".0f", 1e-3),
        "worst, ms": of("pre-training", "seconds of the worst update", ".0f", 1e-3),
        "rate": of("pre-training", "learning rate", ".2g"),
        "fine-tuning loss": of("fine-tuning", "loss", ".3f"),
        "state of it, MB": of("fine-tuning", "state bytes", ".0f", 1e6),
        "update of it, s": of("fine-tuning", "seconds an update", ".2f"),
        "worst of it, s": of("fine-tuning", "seconds of the worst update", ".2f"),
        "peak, GB": of("fine-tuning", "peak memory", ".2f", 1e9),
        "rate of it": of("fine-tuning", "learning rate", ".2g"),
    }
    write_table(PAGE, columns, dict(sorted(found.items(), key=lambda pair: pair[1]["pre-training"]["loss"])))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--smoke", action="store_true", help="a few steps a row, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only draw loss against bytes and write the page's table")
    options = parser.parse_args()
    path = RESULTS.parent / "cache" / "optimize_lm_smoke.json" if options.smoke else RESULTS / "optimize_lm.json"
    if options.draw:
        draw(path)
        table(rows(path))
        return
    if not options.only:
        each_in_its_process(__file__, contenders(), path, *(["--smoke"] if options.smoke else []))
        return
    size = SMOKE if options.smoke else Size()
    jobs = pretraining(size), tuning(size)
    for name in options.only:
        start = time.perf_counter()
        row = run(jobs, name, contenders()[name], rows(path).get(name))
        add_row(path, name, row)
        losses = row["pre-training"]["loss"], row["fine-tuning"]["loss"]
        print(f"{name}: {losses[0]:.4f} and {losses[1]:.4f} in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
