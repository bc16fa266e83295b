"""Draw docs/images/perplexity.png from results/perplexity.json.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import RESULTS

OUT = Path(__file__).parents[1] / "docs" / "images" / "perplexity.png"
# Okabe and Ito's colours, told apart by colour-blind readers too; one for a method, dashes for plain factors.
TOP = 1000.0  # beyond it a language model is broken, and how badly does not matter
COLOURS = {"pifa": "#D55E00", "svd-llm": "#0072B2", "asvd": "#009E73", "fwsvd": "#CC79A7", "svd": "#666666"}


def main() -> None:
    rows = json.loads((RESULTS / "perplexity.json").read_text())
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    figure, axis = plt.subplots(figsize=(7.5, 4.6), dpi=160)
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["method"] != "dense":
            lines.setdefault((row["method"], row["form"]), []).append((row["ratio"], row["perplexity"]))
    for (method, form), points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        style = {"marker": "o", "markersize": 4, "linewidth": 2, "color": COLOURS[method]}
        axis.plot(x, y, linestyle="--" if form == "plain" else "-", **style)
        label = f"{method}, plain factors" if form == "plain" else method
        if y[0] > TOP:
            text = f"{label}: {y[0]:,.0f} and more"
            axis.annotate(text, (0.3, TOP), xytext=(0, -20), textcoords="offset points", color=COLOURS[method])
        elif y[-1] > TOP:
            inside = max(i for i, value in enumerate(y) if value <= TOP)
            share = math.log(TOP / y[inside]) / math.log(y[inside + 1] / y[inside])
            edge = (x[inside] + share * (x[inside + 1] - x[inside]), TOP)
            axis.annotate(label, edge, xytext=(6, -24), textcoords="offset points", color=COLOURS[method])
        else:
            place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(label, (x[-1], y[-1]), color=COLOURS[method], **place)
    axis.axhline(dense, color="black", linewidth=1, linestyle=":")
    axis.annotate(f"dense {dense:.1f}", (0.4, dense), xytext=(8, 5), textcoords="offset points")
    axis.set_yscale("log")
    axis.set_ylim(dense * 0.85, TOP)
    axis.set_yticks([30, 50, 100, 200, 500, 1000], [30, 50, 100, 200, 500, 1000])
    axis.minorticks_off()
    axis.set_xticks([0.1, 0.2, 0.3, 0.4], ["10 %", "20 %", "30 %", "40 %"])
    axis.set_xlim(0.09, 0.5)
    axis.set_xlabel("parameters removed from the linear layers")
    axis.set_ylabel("perplexity (log scale, lower is better)")
    axis.set_title(
        "SmolLM2-135M-Instruct on WikiText-2: pivoted storage unless said otherwise", fontsize=10, loc="left"
    )
    axis.grid(axis="y", which="major", alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT)
    print(OUT)


if __name__ == "__main__":
    main()
