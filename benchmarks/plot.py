"""Draw docs/images/perplexity.png from results/perplexity.json.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import RESULTS

OUT = Path(__file__).parents[1] / "docs" / "images" / "perplexity.png"
# Okabe and Ito's colours, told apart by colour-blind readers too; one for a method, dashes for plain factors.
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
        axis.annotate(
            label, (x[-1], y[-1]), xytext=(8, 0), textcoords="offset points", va="center", color=COLOURS[method]
        )
    axis.axhline(dense, color="black", linewidth=1, linestyle=":")
    axis.annotate(f"dense {dense:.1f}", (0.1, dense), xytext=(0, -5), textcoords="offset points", va="top")
    axis.set_yscale("log")
    axis.set_ylim(bottom=dense * 0.6)
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
