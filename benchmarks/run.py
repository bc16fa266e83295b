"""Measure everything again, one benchmark after the other, and draw the picture.

python benchmarks/run.py [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = (
    "startup",
    "svd",
    "randomized",
    "drivers",
    "tensors",
    "cp",
    "matrix_sqrt",
    "svd_update",
    "randomized_pivoting",
    "rsvddpd",
    "kronecker_sbl",
    "factorize",
    "calibrate",
    "serve",
    "stream",
    "perplexity",
    "compress_lm",
    "compress_speed",
    "compress_moe",
    "convolutions",
    "recommenders",
    "emloc",
    "spectra",
    "analysis",
    "locally_linear",
    "intruders",
    "talking_heads",
    "lora_limits",
    "small_networks",
    "adapters",
    "adapt_gsm8k",
    "adapt_sst2",
    "adapt_vision",
    "dylora",
    "optimizer_cost",
    "optimize_lm",
    "plot",
)


def main() -> None:
    chosen = sys.argv[1:] or list(NAMES)
    unknown = sorted(set(chosen) - set(NAMES))
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in chosen:
        print(f"--- {name}", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)


if __name__ == "__main__":
    main()
