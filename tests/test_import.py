"""Importing the package and asking for help are cheap: no tensor library, hardly any time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import eckart
from eckart.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "datasets", "matplotlib")


def _heavy_modules_after(code: str) -> list[str]:
    """Which of them a fresh interpreter has loaded once it ran the code."""
    script = f"import sys\n{code}\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return run.stderr.split()


def _seconds(code: str) -> float:
    """The best of five: what the code itself costs, whatever else the machine does meanwhile."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        best = min(best, time.perf_counter() - start)
    return best


def test_import_brings_no_heavy_module():
    assert _heavy_modules_after("import eckart; dir(eckart)") == []


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], ["methods"], ["methods", "--json"], *([name, "--help"] for name in COMMANDS)],
    ids=" ".join,
)
def test_help_and_the_catalog_bring_no_heavy_module(args):
    assert _heavy_modules_after(f"from eckart.cli.main import main; assert main({args!r}) == 0") == []


def test_import_and_help_are_quick():
    bare = _seconds("pass")
    assert _seconds("import eckart") - bare < 0.15
    assert _seconds("from eckart.cli.main import main; main(['--help'])") - bare < 0.5


def test_public_names_resolve_and_are_listed():
    assert set(eckart.__all__) == {"__version__", *eckart._LAZY}
    assert dir(eckart) == sorted({*eckart.__all__, *eckart._ROOMS})
    for name in eckart._LAZY:
        assert callable(getattr(eckart, name)), name
    for room in eckart._ROOMS:
        assert getattr(eckart, room).__name__ == f"eckart.{room}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        eckart.compres  # noqa: B018
