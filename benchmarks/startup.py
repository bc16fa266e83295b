"""What `import eckart` adds to `import torch`, and how fast `eckart --help` answers.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import record

ROUNDS = 15


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    eckart = str(Path(sys.executable).with_name("eckart"))
    torch_only, both, help_text = [], [], []
    for _ in range(ROUNDS):
        torch_only.append(seconds(sys.executable, "-c", "import torch"))
        both.append(seconds(sys.executable, "-c", "import torch, eckart"))
        help_text.append(seconds(eckart, "--help"))
    added = statistics.median(b - a for a, b in zip(torch_only, both, strict=True))
    record(
        "startup",
        {
            "seconds, import torch": statistics.median(torch_only),
            "seconds that import eckart adds (< 0.15)": added,
            "seconds, eckart --help (< 0.5)": statistics.median(help_text),
        },
    )


if __name__ == "__main__":
    main()
