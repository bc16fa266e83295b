"""The chained gradient of a head against the dense one: time by the number of tokens, and errors; and the demo model.

Both compute the same three gradients in float64, in turn, and the fastest of the rounds counts. Slopes are of log time
against log L, over all lengths and over the longer half: about 1 and 2 are expected. This is the proof of an idea and
no way to train: at the widths of real heads the features are too many, which the last figures show for the demo model.

python benchmarks/lora_limits.py [--smoke] [--draw]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from adapter_job import write_table
from common import RESULTS, interleaved, record
from language_model import demo, evaluation

from eckart import analyze
from eckart.analysis.chained_gradient import chained_gradients, dense_gradients, num_features

PAGE = Path(__file__).parents[1] / "docs" / "analysis-measured.md"
GAMMAS, DEGREES = (0.5, 1.0, 2.0, 3.0), (2, 4, 6)
WIDTHS = ((4, 2), (4, 4), (6, 2), (8, 2))  # width and degree
LENGTHS = tuple(2**i for i in range(8, 14))
SHORT = (64, 128, 256)


def problem(tokens: int, width: int, gamma: float = 0.5) -> tuple[torch.Tensor, ...]:
    """A head whose queries and keys have entries up to gamma."""
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) for _ in range(2))
    query, key, value = (torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(3))
    query, key = (w * gamma / (x @ w).abs().max() for w in (query, key))
    return x, query, key, value, target


def slope(lengths: list[int], seconds: list[float]) -> float:
    """Of the least-squares line through log seconds against log length."""
    x, y = ([math.log(one) for one in values] for values in (lengths, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    up = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return up / sum((a - mean_x) ** 2 for a in x)


def times(width: int, degree: int, lengths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    title = f"d = {width}, g = {degree}"
    figures: dict[str, Any] = {f"{title}: features": num_features(width, degree)}
    taken: dict[str, list[float]] = {"dense": [], "chained": [], "chained, causal": []}
    for tokens in lengths:
        given = problem(tokens, width)
        seconds = interleaved(
            {
                "dense": lambda given=given: dense_gradients(*given),
                "chained": lambda given=given: chained_gradients(*given, degree),
                "chained, causal": lambda given=given: chained_gradients(*given, degree, causal=True),
            },
            repeats,
        )
        for name, values in seconds.items():
            taken[name].append(min(values))  # other work only ever adds, and one length of it bends a slope
            figures[f"{title}: ms at L = {tokens}, {name}"] = 1000 * min(values)
    half = len(lengths) // 2
    for name, values in taken.items():
        figures[f"{title}: slope, {name}"] = slope(list(lengths), values)
        figures[f"{title}: slope of the longer half, {name}"] = slope(list(lengths[half:]), values[half:])
    faster = [n for n, a, b in zip(lengths, taken["chained"], taken["dense"], strict=True) if a < b]
    figures[f"{title}: shortest L from which chained is faster"] = min(faster) if faster else "none"
    return figures


def errors() -> dict[str, float]:
    """The largest relative error of the three gradients, L = 400, d = 4."""
    figures = {}
    for gamma in GAMMAS:
        given = problem(400, 4, gamma)
        exact = dense_gradients(*given)
        for degree in DEGREES:
            found = chained_gradients(*given, degree)
            worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found[1:], exact[1:], strict=True))
            figures[f"relative error, entries up to {gamma}, g = {degree}"] = worst
    return figures


def sizes(model: Any, texts: list[Any]) -> dict[str, Any]:
    found = analyze(model, "lora-limits", data=texts, progress=False)
    return {f"demo model: {name}": value for name, value in found.figures.items()} | {
        "demo model: seconds": found.seconds
    }


def draw(figures: dict[str, Any]) -> None:
    """Write the two tables of the page."""
    parts = "dense", "chained", "chained, causal"
    columns: dict[str, Any] = {"head": lambda name, title: name}
    columns["features"] = lambda name, title: str(figures[f"{title}: features"])
    for part in parts:
        slope_of = f"slope of the longer half, {part}"
        columns[f"slope, {part}"] = lambda name, title, key=slope_of: f"{figures[f'{title}: {key}']:.2f}"
    for part in parts:
        longest = f"ms at L = {LENGTHS[-1]}, {part}"
        columns[longest] = lambda name, title, key=longest: f"{figures[f'{title}: {key}']:,.0f}"
    faster = "shortest L from which chained is faster"
    columns["faster from L ="] = lambda name, title: str(figures[f"{title}: {faster}"])
    write_table(PAGE, columns, {f"d = {d}, g = {g}": f"d = {d}, g = {g}" for d, g in WIDTHS}, "lora-limits")
    columns = {"entries up to": lambda name, gamma: name}
    for degree in DEGREES:
        key = f"g = {degree}"
        columns[key] = lambda name, gamma, key=key: f"{figures[f'relative error, entries up to {gamma}, {key}']:.0e}"
    write_table(PAGE, columns, {str(gamma): gamma for gamma in GAMMAS}, "lora-limits-errors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="a try in small; nothing is written")
    parser.add_argument("--draw", action="store_true", help="only write the tables of the page")
    given = parser.parse_args()
    if given.draw:
        draw(json.loads((RESULTS / "lora_limits.json").read_text(encoding="utf-8"))["figures"])
        return
    if given.smoke:
        print(times(4, 2, SHORT, 1) | errors())
        return
    figures = errors()
    for width, degree in WIDTHS:
        figures |= times(width, degree, LENGTHS, 5)
        print(f"d = {width}, g = {degree}: done", flush=True)
    model, tokenizer = demo()
    figures |= sizes(model.eval(), evaluation(tokenizer, samples=2))
    record("lora_limits", figures, method="lora-limits")
    draw(figures)


if __name__ == "__main__":
    main()
