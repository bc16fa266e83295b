"""EMLoC on one job: a LoRA that is tuned on a compressed emulator, and what it is worth on the model itself.

The demo model in float32 learns answers of GSM8K through PEFT's LoRA of rank 8: on itself, and on emulators without 40
and 60 percent of their linears' parameters, calibrated on such answers. Tuning runs in a process of its own that
never holds the full model; its peak memory is taken there, and what it held before the base was loaded is reported too.
Of three learning rates the one with the least loss on a slice, with the base that was tuned, is kept. The answers of
another slice judge the model with the LoRA as it was tuned, corrected with the paper's limit, and without a limit. Rows
are added to results/emloc.json one by one:

python benchmarks/emloc.py [--only NAME ...] [--smoke] [--draw]
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_job import Training, best, command, lora_config, write_table
from common import RESULTS, environment
from language_model import answers

from eckart.compression import lora_correction
from eckart.models import load, load_tokenizer, model_bytes, peak_memory, save
from eckart.models.training import answer_loss

PAGE = Path(__file__).parents[1] / "docs" / "compress-small.md"
RATIOS = (0.4, 0.6)
BASE = "demo"
LIMITS = {"as tuned": 0.0, "corrected": 3.0, "no limit": math.inf}


@dataclass(frozen=True)
class Size:
    """How much work a row is."""

    rank: int = 8
    rates: tuple[float, ...] = (5e-4, 1.5e-3, 5e-3)
    steps: int = 60
    batch: int = 2
    length: int = 160
    samples: int = 64
    search: int = 32
    judged: int = 64


SMOKE = Size(2, (1e-3, 2e-3), 2, 1, 96, 4, 2, 2)


def collator(tokenizer: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer, padding=True)


def tune(base: str, out: Path, size: Size) -> dict[str, Any]:
    """Train a LoRA on a base, write it, and say what that took; for a process of its own."""
    from peft import get_peft_model

    start = peak_memory()
    model, _ = load(base)
    tokenizer = load_tokenizer(BASE)
    collate, examples = collator(tokenizer), answers(tokenizer, size.length)
    train, search = examples[: -size.search - size.judged], examples[-size.search - size.judged : -size.judged]
    found: dict[float, float] = {}
    for rate in size.rates:
        torch.manual_seed(0)
        if base == BASE:
            config = lora_config(model, size.rank, task_type="CAUSAL_LM")
        else:
            config = lora_correction.lora_config(model, size.rank, task_type="CAUSAL_LM")
        tuned = get_peft_model(model, config).train()
        training = Training(tuned, rate, size.steps)
        for step in range(size.steps):
            training.step(collate([dict(train[(step * size.batch + i) % len(train)]) for i in range(size.batch)]))
        found[rate] = answer_loss(tuned, search, collate)
        if best(found) == rate:
            tuned.save_pretrained(out)
        model = tuned.unload()
    rate = best(found)
    seconds = sorted(training.seconds)[len(training.seconds) // 2]
    return {
        "learning rate": rate,
        "learning rates tried": {str(key): value for key, value in found.items()},
        "loss on the tuned base": found[rate],
        "peak memory of tuning": peak_memory(),
        "memory before the base": start,
        "bytes of the base": model_bytes(model),
        "seconds a step": seconds,
    }


def tuned_apart(base: str, out: Path, size: Size) -> dict[str, Any]:
    """`tune` in a process of its own."""
    told = json.dumps({"base": base, "out": str(out), "size": asdict(size)})
    done = subprocess.run([sys.executable, __file__, "--tune", told], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judged(model: Any, adapter: Path | None, size: Size) -> float:
    """The loss of the answers that nothing has seen."""
    from peft import PeftModel

    tokenizer = load_tokenizer(BASE)
    examples = answers(tokenizer, size.length)[-size.judged :]
    shown = copy.deepcopy(model)
    return answer_loss(
        shown if adapter is None else PeftModel.from_pretrained(shown, adapter), examples, collator(tokenizer)
    )


def on_emulator(size: Size, ratio: float) -> dict[str, Any]:
    """All three stages."""
    full, tokenizer = load(BASE)
    examples = answers(tokenizer, size.length)[: size.samples]
    data = [{"input_ids": torch.tensor([e["input_ids"]])} for e in examples]
    start = time.perf_counter()
    emulator = lora_correction.make_emulator(full, data, ratio=ratio, progress=False)
    notes: dict[str, Any] = {"method": "emloc", "ratio": ratio, "seconds to make": time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as directory:
        base, tuned = Path(directory) / "emulator", Path(directory) / "lora"
        save(emulator, base, tokenizer)
        notes |= tuned_apart(str(base), tuned, size)
        for name, limit in LIMITS.items():
            out = Path(directory) / name
            lora_correction.correct_lora(tuned, full, base, out=out, limit=limit)
            notes[f"loss {name}"] = judged(full, out, size)
    return notes


def on_itself(size: Size) -> dict[str, Any]:
    full, _ = load(BASE)
    with tempfile.TemporaryDirectory() as directory:
        tuned = Path(directory) / "lora"
        notes = {"baseline": "lora on the model", **tuned_apart(BASE, tuned, size)}
        return {**notes, "loss as tuned": judged(full, tuned, size)}


def contenders() -> dict[str, Callable[[Size], dict[str, Any]]]:
    found: dict[str, Callable[[Size], dict[str, Any]]] = {
        "not tuned": lambda size: {"baseline": "not tuned", "loss as tuned": judged(load(BASE)[0], None, size)},
        "LoRA on the model": on_itself,
    }
    for ratio in RATIOS:
        found[f"emloc, {ratio:.0%} removed"] = lambda size, ratio=ratio: on_emulator(size, ratio)
    return found


def table(found: dict[str, Any]) -> None:
    def shown(key: str, form: str, divide: float = 1.0) -> Callable[[str, dict[str, Any]], str]:
        return lambda name, row: format(row[key] / divide, form) if key in row else ""

    columns: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "tuned on": lambda name, row: name if "method" in row else f"*{name}*",
        **{f"loss, {name}": shown(f"loss {name}", ".3f") for name in LIMITS},
        "base, MB": shown("bytes of the base", ".0f", 1e6),
        "peak of tuning, MB": shown("peak memory of tuning", ".0f", 1e6),
        "of it before the base": shown("memory before the base", ".0f", 1e6),
        "step, s": shown("seconds a step", ".2f"),
        "to make, s": shown("seconds to make", ".0f"),
        "rate": shown("learning rate", ".2g"),
    }
    write_table(PAGE, columns, found, "emulators")


def main() -> None:
    if sys.argv[1:2] == ["--tune"]:  # from `tuned_apart`
        told = json.loads(sys.argv[2])
        print(json.dumps(tune(told["base"], Path(told["out"]), Size(**told["size"]))))
        return
    known = contenders()

    def measure(name: str, smoke: bool) -> dict[str, Any]:
        return known[name](SMOKE if smoke else Size()) | environment()

    command(RESULTS / "emloc.json", list(known), measure, table)


if __name__ == "__main__":
    main()
