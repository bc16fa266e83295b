"""Cost of gathering every Gram matrix of the demo model, against a plain forward pass over the same tokens.

python benchmarks/calibrate.py
"""

from __future__ import annotations

import torch
from common import interleaved, medians, ratio, record
from language_model import calibration, demo

from eckart.models import calibrate


def main() -> None:
    model, tokenizer = demo()
    batches = calibration(tokenizer, samples=8)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    seconds = interleaved(
        {"forward": forward, "calibrate": lambda: calibrate(model, batches, ["gram"], progress=False)}, repeats=3
    )
    record(
        "calibrate",
        {
            "seconds, forward": medians(seconds)["forward"],
            "seconds, calibrate": medians(seconds)["calibrate"],
            "calibrate / forward (<= 1.25)": ratio(seconds, "calibrate", "forward"),
        },
    )


if __name__ == "__main__":
    main()
