"""Talking heads on the demo model: remove the components that score highest, or others of the same heads, and look.

For each kind of composition the five highest pairs with different writing components are taken from the weights alone.
Their components are removed from the output projections, all five at once; beside it, several times, as many random
other components of the same heads, and components of the same numbers in random other heads of the same layers, which
are as strong as a rule. Measured are the loss on the second half of random tokens that come twice
(induction), the loss on plain text, and the lead of the right name in "When Mary and John went to the store, John gave
a drink to" (indirect object). The method is a reconstruction: the paper published no code.

python benchmarks/talking_heads.py [--smoke] [--draw]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_job import write_table
from common import RESULTS, record
from language_model import demo, evaluation

from eckart import analyze
from eckart.analysis.composition import ov_components
from eckart.models.head_edits import rescale_written
from eckart.models.head_maps import attention_layers

PAGE = Path(__file__).parents[1] / "docs" / "analysis-measured.md"
KINDS = ("query", "key", "value")
NAMES = ("John", "Mary", "Tom", "James", "Dan", "Sarah", "Anna", "David", "Paul", "Mark", "Peter", "Alice")
TEMPLATES = (
    "When{a} and{b} went to the store,{s} gave a drink to",
    "Then{a} and{b} had a long talk, and afterwards{s} said goodbye to",
    "After{a} and{b} left the school,{s} handed a book to",
)
Component = tuple[int, int, int]  # layer, head, number


@dataclass(frozen=True)
class Size:
    """How much work there is: about seven minutes on one thread."""

    pairs: int = 5
    draws: int = 4
    sequences: int = 4
    half: int = 48
    prompts: int = 16
    texts: int = 1


SMOKE = Size(pairs=2, draws=2, sequences=2, half=8, prompts=4, texts=1)


class Tasks:
    """What is measured, as numbers by name."""

    def __init__(self, model: Any, tokenizer: Any, size: Size, texts: list[Any]) -> None:
        self.model, self.half, self.texts = model, size.half, texts[: size.texts]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, model.config.vocab_size, (size.sequences, size.half), generator=generator)
        self.twice = torch.cat([ids, ids], dim=1)
        self.prompts = []
        draw = random.Random(0)
        words = {name: tokenizer.encode(f" {name}", add_special_tokens=False) for name in NAMES}
        pairs = [(a, b) for a, b in itertools.permutations(NAMES, 2) if words[a][0] != words[b][0]]
        for index, (a, b) in enumerate(draw.sample(pairs, min(size.prompts, len(pairs)))):
            subject, other = (a, b) if index % 2 else (b, a)
            text = TEMPLATES[index % len(TEMPLATES)].format(a=f" {a}", b=f" {b}", s=f" {subject}")
            right, wrong = words[other][0], words[subject][0]
            self.prompts.append((tokenizer.encode(text, return_tensors="pt"), right, wrong))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        logits = self.model(self.twice).logits.float()
        second = slice(self.half, 2 * self.half - 1)
        induction = torch.nn.functional.cross_entropy(
            logits[:, second].flatten(0, 1), self.twice[:, self.half + 1 :].flatten()
        )
        losses, leads = [], []
        for batch in self.texts:
            ids = batch["input_ids"]
            losses.append(float(self.model(ids, labels=ids).loss))
        for ids, right, wrong in self.prompts:
            last = self.model(ids).logits[0, -1].float()
            leads.append(float(last[right] - last[wrong]))
        measured = {"loss of repeated tokens": float(induction), "loss of text": statistics.mean(losses)}
        if leads:  # a tokenizer may begin all names alike
            measured["lead of the right name"] = statistics.mean(leads)
        return measured


@contextlib.contextmanager
def removed(layers: list[Any], components: list[Component]) -> Any:
    """A model without what these components write."""
    by_head: dict[tuple[int, int], list[int]] = defaultdict(list)
    for layer, head, number in components:
        by_head[layer, head].append(number)
    with contextlib.ExitStack() as stack:
        for (layer, head), numbers in by_head.items():
            place = layers[layer]
            maps = place.maps(torch.float64)
            found = ov_components(maps.value[head * place.groups // place.heads], maps.output[head])
            stack.enter_context(rescale_written(place, head, found.u[:, numbers], 0.0))
        yield


def others(chosen: list[Component], heads: int, width: int, draw: random.Random, *, same_head: bool) -> list[Component]:
    """As many components of the same heads, or of the same numbers in other heads of their layers, none of them chosen.

    Where all heads of a layer are taken at a number, the next number stands in.
    """
    taken = set(chosen)
    picked: list[Component] = []
    for layer, head, number in chosen:
        if same_head:
            left = [(layer, head, n) for n in range(width) if (layer, head, n) not in taken]
        else:
            by_number = ([(layer, h, n) for h in range(heads) if (layer, h, n) not in taken] for n in range(width))
            left = next(free for n, free in enumerate(by_number) if n >= number and free)
        picked.append(draw.choice(left))
        taken.add(picked[-1])
    return picked


def run(model: Any, tokenizer: Any, size: Size, texts: list[Any]) -> dict[str, Any]:
    layers, _ = attention_layers(model)
    tasks = Tasks(model, tokenizer, size, texts)
    figures: dict[str, Any] = {f"{task}: whole model": value for task, value in tasks.measure().items()}
    for order in ("score", "contribution"):
        found = analyze(model, "talking-heads", top=20 * size.pairs, order=order, progress=False)
        if order == "score":
            figures |= {"seconds for all scores": found.seconds, **found.figures}
        for kind in KINDS:
            rows = [row for row in found.rows if row["kind"] == kind]
            chosen = list(dict.fromkeys((r["writer_layer"], r["writer_head"], r["component"]) for r in rows))[
                : size.pairs
            ]
            label = f"{kind}, by {order}"
            figures[f"{label}: components"] = " ".join(f"{layer}.{head}/{n}" for layer, head, n in chosen)
            with removed(layers, chosen):
                top = tasks.measure()
            changes = {task: {"top components": value - figures[f"{task}: whole model"]} for task, value in top.items()}
            heads, width = found.tensors["s"].shape[1:]
            for name, same_head in (("others of the same heads", True), ("the same in other heads", False)):
                draws = []
                for seed in range(size.draws):
                    with removed(layers, others(chosen, heads, width, random.Random(seed), same_head=same_head)):
                        draws.append(tasks.measure())
                for task in top:
                    values = [one[task] - figures[f"{task}: whole model"] for one in draws]
                    changes[task][f"{name}, mean"] = statistics.mean(values)
                    changes[task][f"{name}, largest size"] = max(map(abs, values))
            for task, by_name in changes.items():
                figures |= {f"{label}: change of the {task}, {name}": value for name, value in by_name.items()}
            print(f"{label}: done", flush=True)
    return figures


def draw(figures: dict[str, Any]) -> None:
    """Write the table of the page: for each task the change by the top components, and by others in brackets."""
    tasks = [name.removesuffix(": whole model") for name in figures if name.endswith(": whole model")]
    labels = [name.removesuffix(": components") for name in figures if name.endswith(": components")]

    def column(task: str) -> Callable[[str, str], str]:
        def cell(name: str, label: str) -> str:
            start = f"{label}: change of the {task}, "
            top, *rest = (
                f"{figures[start + one]:+.3f}"
                for one in ("top components", "others of the same heads, mean", "the same in other heads, mean")
            )
            return f"{top} ({', '.join(rest)})"

        return cell

    columns: dict[str, Callable[[str, Any], str]] = {"composition": lambda name, label: name}
    columns |= {f"{task}, {figures[f'{task}: whole model']:.3f}": column(task) for task in tasks}
    write_table(PAGE, columns, {label: label for label in labels}, "talking-heads")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="a try in small; nothing is written")
    parser.add_argument("--draw", action="store_true", help="only write the table of the page")
    given = parser.parse_args()
    smoke = given.smoke
    if given.draw:
        draw(json.loads((RESULTS / "talking_heads.json").read_text(encoding="utf-8"))["figures"])
        return
    model, tokenizer = demo()
    model = model.float().eval()
    size = SMOKE if smoke else Size()
    figures = run(model, tokenizer, size, evaluation(tokenizer, samples=size.texts))
    if smoke:
        print(figures)
    else:
        record("talking_heads", figures, method="talking-heads")
        draw(figures)


if __name__ == "__main__":
    main()
