"""The one language-model job: the demo model, calibrated and evaluated on WikiText-2 (raw text files).

The files are looked for in $ECKART_BENCH_DATA, else in ../shared/data beside the repository; without them the
Python documentation that ships with CPython stands in, and the result says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from eckart.models import load, text_batches
from eckart.models.answers import Example, read_examples

DATA = Path(os.environ.get("ECKART_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))


def text(name: str) -> Path | None:
    path = DATA / name
    return path if path.is_file() else None


def demo() -> tuple[Any, Any]:
    return load("demo")


def answers(tokenizer: Any, longest: int, source: Path | None = None) -> list[Example]:
    """The problems of GSM8K of at most so many tokens, whole: a few are longer than a window."""
    source = source or text("gsm8k-train.jsonl")
    if source is None:
        raise SystemExit("gsm8k-train.jsonl is missing: put it where $ECKART_BENCH_DATA says")
    return [e for e in read_examples(source, tokenizer, length=1024) if len(e["input_ids"]) <= longest]


def calibration(tokenizer: Any, samples: int = 32) -> list[Any]:
    """The first ``samples`` windows of 512 tokens of the validation text."""
    return text_batches(tokenizer, text("wikitext2-valid.txt"), samples=samples)


def evaluation(tokenizer: Any, samples: int = 16) -> list[Any]:
    """The first ``samples`` windows of 512 tokens of the test text; never used to choose anything."""
    return text_batches(tokenizer, text("wikitext2-test.txt"), samples=samples, part="evaluation")
