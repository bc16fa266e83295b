"""Whether the spectra of gradients tell right GSM8K answers from damaged ones; a part of analysis.py.

Each figure is judged by how often a right example is on its good side (AUC), beside the plain loss, the gradient's norm
and the length of the text, which know nothing of spectra. As many answer tokens count in every example, swapped answers
are about as long as the right ones, and the words or digits that others are damaged with are of the same kind.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from language_model import text
from torch import Tensor

from eckart import analyze
from eckart.analysis.gradient_spectra import example_scores
from eckart.models.answers import read_examples

METHOD = "gradient-spectra"


@dataclass(frozen=True)
class Size:
    """How much work there is: about seven minutes on one thread."""

    examples: int = 40
    answer_tokens: int = 32
    question: int = 200  # characters at most
    answer: tuple[int, int] = (200, 400)  # characters


SMOKE = Size(4, 2, 100, (1, 9999))


def auc(right: Sequence[float], damaged: Sequence[float]) -> float:
    """How often a right example has the larger value, ties for a half."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (right, damaged))
    difference = a[:, None] - b
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def variants(size: Size, source: Path) -> dict[str, list[dict[str, str]]]:
    """The same questions with their answers, and with damaged ones."""
    low, high = size.answer
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [one for one in lines if len(one["question"]) <= size.question and low <= len(one["answer"]) <= high]
    kept = sorted(kept[: size.examples], key=lambda one: len(one["answer"]))  # neighbours are about as long
    answers = [one["answer"] for one in kept]
    pool = " ".join(answers).split()
    draw = random.Random(0)

    def words(answer: str) -> str:
        return re.sub(r"\S+", lambda match: draw.choice(pool) if draw.random() < 0.5 else match[0], answer)

    def order(answer: str) -> str:
        return " ".join(draw.sample(answer.split(), len(answer.split())))

    def digits(answer: str) -> str:
        return re.sub(r"\d", lambda match: str(draw.randrange(10)), answer)

    damaged = {
        "right": answers,
        "of another question": [*answers[1:], answers[0]],
        "half of the words": [words(answer) for answer in answers],
        "order of the words": [order(answer) for answer in answers],
        "digits": [digits(answer) for answer in answers],
    }
    return {
        name: [{"question": one["question"], "answer": answer} for one, answer in zip(kept, texts, strict=True)]
        for name, texts in damaged.items()
    }


def as_examples(lines: list[dict[str, str]], tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "examples.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        for one in read_examples(path, tokenizer, length=1024):
            yield {name: torch.tensor(ids)[None] for name, ids in one.items()}


def judged(right: Any, damaged: Any) -> dict[str, float]:
    """AUC of every figure, on the side that the paper calls better (of loss, norm and length: the smaller)."""
    joined = {
        name: torch.cat([right.tensors[name], damaged.tensors[name]])
        for name in ("nuclear norm", "effective rank", "frobenius", "loss", "lengths")
    }
    nuclear, effective, lengths = joined["nuclear norm"], joined["effective rank"], joined["lengths"]
    values = {
        "effective rank": effective.log().mean(1),
        "nuclear norm": -nuclear.log().mean(1),
        "effective rank, length out": example_scores(nuclear, effective, lengths),
        "nuclear norm, length out": example_scores(nuclear, effective, lengths, score="nuclear-norm"),
        "both, length out": example_scores(nuclear, effective, lengths, score="both"),
        "gradient norm": -joined["frobenius"].log().mean(1),
        "loss": -joined["loss"],
        "length of the text": -lengths[:, 1].double(),
    }
    count = len(right.tensors["loss"])
    return {name: auc(v[:count].tolist(), v[count:].tolist()) for name, v in values.items()}


def measure(size: Size, model: Any, tokenizer: Any, source: Path | None = None) -> dict[str, Any]:
    """The figures of right answers and damaged ones, and how well each figure tells them apart."""
    source = source or text("gsm8k-train.jsonl")
    if source is None:
        raise SystemExit("gsm8k-train.jsonl is missing: put it where $ECKART_BENCH_DATA says")
    found = {}
    for name, lines in variants(size, source).items():
        data = list(as_examples(lines, tokenizer))
        found[name] = analyze(model, METHOD, data=data, answer_tokens=size.answer_tokens, cosines=False, progress=False)
        print(f"{name}: {found[name].figures}, {found[name].seconds:.0f} s", flush=True)
    right = found.pop("right")
    return {
        "answer tokens": size.answer_tokens,
        "examples": right.figures["examples"],
        "seconds an example": right.seconds / right.figures["examples"],
        "means": {"right": right.figures, **{name: one.figures for name, one in found.items()}},
        "AUC": {name: judged(right, one) for name, one in found.items()},
    }
