"""Two figures of a model's inner states against what they stand for, and against what is simpler.

matrix-nuclear-norm: the paper's approximation (column norms), the exact norm through the small Gram matrix, and the
matrix entropy, published (d x d) and through the small Gram matrix, at hidden widths of the models in the paper and
for more and fewer tokens than channels: times in turn, on normalised states in float32, and errors against float64.
Then the hidden states of the demo model: how far the approximation is off, as they are and in a rotated basis.

gradient-spectra: right GSM8K answers against damaged ones; see answer_quality.py.

Rows that there are already are not measured again:

python benchmarks/analysis.py [--only METHOD ...] [--smoke] [--draw]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import answer_quality
import torch
from adapter_job import add_row, rows, write_table
from common import RESULTS, environment, interleaved, medians, ratio
from language_model import demo, text
from torch import Tensor

from eckart.analysis.matrix_nuclear_norm import normalized_states
from eckart.linalg import nuclear_norm, nuclear_norm_l12, singular_values, spectral_entropy
from eckart.models import text_batches
from eckart.models.hidden import hidden_states

PAGE = Path(__file__).parents[1] / "docs" / "analysis-measured.md"
METHODS = ("matrix-nuclear-norm", answer_quality.METHOD)


@dataclass(frozen=True)
class Size:
    """How much work there is: some minutes on one thread each."""

    widths: tuple[int, ...] = (768, 1536, 2560, 4096)  # Cerebras-GPT of 111M, 590M, 2.7B and 6.7B parameters
    tokens: tuple[int, ...] = (256, 2048)
    repeated_to: int = 2000  # width up to which times are medians of several rounds
    texts: int = 4
    text_lengths: tuple[int, ...] = (32, 128, 512, 1024)
    chunk: int = 128


SMOKE = Size((24, 48), (16, 64), 40, 2, (4, 8), 4)


def published_entropy(r: Tensor) -> float:
    """-sum λ ln λ / ln d of R'R / tr, by singular values of the d x d matrix, as the paper's baseline has it."""
    gram = r.mT @ r
    share = torch.linalg.svdvals(gram / gram.trace())
    return float(-(share * share.log()).nansum() / torch.tensor(float(r.shape[1])).log())


def gram_entropy(r: Tensor) -> float:
    """The same from singular values of R through its smaller Gram matrix."""
    s = singular_values(r)
    return spectral_entropy(torch.nn.functional.pad(s, (0, r.shape[1] - len(s))), normalized=True)


def times_and_errors(size: Size, width: int, tokens: int) -> dict[str, Any]:
    """One size: random states of so many tokens."""
    drawn = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    truth = normalized_states(drawn)
    r = truth.float()
    found: dict[str, float] = {}

    def kept(name: str, figure: Callable[[], Any]) -> Callable[[], None]:
        return lambda: found.update({name: float(figure())})

    contenders = {
        "approximation": lambda: nuclear_norm_l12(r, truncated=True),
        "exact, small Gram": lambda: singular_values(r).sum(),
        "entropy, small Gram": lambda: gram_entropy(r),
        "entropy, published": lambda: published_entropy(r),
    }
    timed = {name: kept(name, figure) for name, figure in contenders.items()}
    seconds = interleaved(timed, 5 if width <= size.repeated_to else 1)
    exact = float(nuclear_norm(truth))
    names = [name for name in seconds if name != "approximation"]
    return {
        "width": width,
        "tokens": tokens,
        "seconds": medians(seconds),
        "times slower than the approximation": {name: ratio(seconds, name, "approximation") for name in names},
        "published entropy over the exact norm": ratio(seconds, "entropy, published", "exact, small Gram"),
        "approximation over exact": found["approximation"] / exact,
        "error, small Gram": abs(found["exact, small Gram"] / exact - 1),
        "entropy, difference": abs(found["entropy, small Gram"] - found["entropy, published"]),
    }


@torch.no_grad()
def of_the_model(size: Size, model: Any, windows: Sequence[Any]) -> dict[str, Any]:
    """Approximation over exact norm of last hidden states, by tokens; and whether the two order texts alike."""
    from scipy.stats import spearmanr

    states = [one for batch in windows for one in hidden_states(model, batch)]
    width = states[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q

    def pair(part: Tensor) -> tuple[float, float, float]:
        r = normalized_states(part)
        return (float(nuclear_norm_l12(r, truncated=True)), float(nuclear_norm_l12(r @ rotation, truncated=True)),
                float(nuclear_norm(r)))  # fmt: skip

    by_tokens = {}
    for tokens in size.text_lengths:
        found = [pair(one[:tokens]) for one in states]
        by_tokens[str(tokens)] = {
            "approximation over exact": fmean(a / exact for a, _, exact in found),
            "rotated": fmean(a / exact for _, a, exact in found),
        }
    chunks = [pair(part) for one in states for part in one.split(size.chunk) if len(part) == size.chunk]
    plain, rotated, exact = zip(*chunks, strict=True)
    return {
        "width": width,
        "by tokens": by_tokens,
        "chunks": len(chunks),
        "tokens of a chunk": size.chunk,
        "rank correlation with exact": float(spearmanr(plain, exact).statistic),
        "rank correlation with exact, rotated": float(spearmanr(rotated, exact).statistic),
    }


def measure_nuclear_norm(size: Size, model: Any, tokenizer: Any, source: Path | None = None) -> dict[str, Any]:
    sizes = []
    for width in size.widths:
        for tokens in size.tokens:
            sizes.append(times_and_errors(size, width, tokens))
            print(f"width {width}, {tokens} tokens: {sizes[-1]['seconds']}", flush=True)
    longest = max(size.text_lengths)
    source = source or text("wikitext2-test.txt")
    windows = text_batches(tokenizer, source, samples=size.texts, length=longest, batch_size=1)
    return {"sizes": sizes, "demo model": of_the_model(size, model, windows)}


def measure(name: str, smoke: bool, model: Any, tokenizer: Any) -> dict[str, Any]:
    if name == answer_quality.METHOD:
        return answer_quality.measure(answer_quality.SMOKE if smoke else answer_quality.Size(), model, tokenizer)
    return measure_nuclear_norm(SMOKE if smoke else Size(), model, tokenizer)


def draw(found: dict[str, Any]) -> None:
    """Fill the tables of the page that there are figures for."""
    if "matrix-nuclear-norm" in found:
        row = found["matrix-nuclear-norm"]
        write_table(PAGE, {
            "width, tokens": lambda name, one: name,
            "approximation, ms": lambda name, one: f"{1000 * one['seconds']['approximation']:.2f}",
            "exact, ms": lambda name, one: f"{1000 * one['seconds']['exact, small Gram']:,.0f}",
            "entropy, small Gram, ms": lambda name, one: f"{1000 * one['seconds']['entropy, small Gram']:,.0f}",
            "entropy, published, ms": lambda name, one: f"{1000 * one['seconds']['entropy, published']:,.0f}",
            "approximation / exact": lambda name, one: f"{one['approximation over exact']:.3f}",
            "error of exact": lambda name, one: f"{one['error, small Gram']:.0e}",
        }, {f"{one['width']}, {one['tokens']}": one for one in row["sizes"]}, "nuclear-norm")  # fmt: skip
        write_table(PAGE, {
            "tokens": lambda name, one: name,
            "approximation / exact": lambda name, one: f"{one['approximation over exact']:.3f}",
            "in a rotated basis": lambda name, one: f"{one['rotated']:.3f}",
        }, row["demo model"]["by tokens"], "nuclear-norm-states")  # fmt: skip
    if "gradient-spectra" in found:
        by_damage = found["gradient-spectra"]["AUC"]
        figures = {figure: {damage: one[figure] for damage, one in by_damage.items()}
                   for figure in next(iter(by_damage.values()))}  # fmt: skip
        columns: dict[str, Callable[[str, dict[str, Any]], str]] = {"figure": lambda name, one: name}
        columns |= {damage: (lambda name, one, key=damage: f"{one[key]:.2f}") for damage in by_damage}
        write_table(PAGE, columns, figures, "gradients")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--smoke", action="store_true", help="a try in small, into a file of its own")
    parser.add_argument("--draw", action="store_true", help="only write the tables of the page")
    options = parser.parse_args()
    path = RESULTS.parent / "cache" / "analysis_smoke.json" if options.smoke else RESULTS / "analysis.json"
    if not options.draw:
        model, tokenizer = demo()
        model = model.float().eval()
        for name in options.only:
            if name in rows(path):
                continue
            figures = measure(name, options.smoke, model, tokenizer)
            add_row(path, name, {"method": name, **figures, "seed": 0, **environment()})
            print(json.dumps(figures, indent=1), flush=True)
    if not options.smoke:
        draw(rows(path))


if __name__ == "__main__":
    main()
