from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_checkpoints
from as_before import libraries_as_before
from browser import Browser
from eckart.cli.main import main

__all__ = ["libraries_as_before"]  # a fixture of every test here


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of three blocks, one weight of which stands out by a strong direction."""
    model = tiny_checkpoints.model(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.5
    return tiny_checkpoints.write(tmp_path_factory.mktemp("report") / "tiny", model)


@pytest.fixture(scope="session")
def compressed(tmp_path_factory, checkpoint) -> Path:
    """The same after ``eckart compress``."""
    out = tmp_path_factory.mktemp("report") / "smaller"
    arguments = ["--method", "svd", "--ratio", "0.2", "--no-eval", "--quiet", "--out", str(out)]
    assert main(["compress", str(checkpoint), *arguments]) == 0
    return out


def _report(folder: Path, *arguments: object) -> tuple[Path, dict[str, Any]]:
    page, figures = folder / "report.html", folder / "figures.json"
    assert main(["report", *map(str, arguments), "--out", str(page), "--json", str(figures), "--quiet"]) == 0
    return page, json.loads(figures.read_text())


@pytest.fixture(scope="session")
def alone(tmp_path_factory, checkpoint) -> tuple[Path, dict[str, Any]]:
    """The page of one model, and what ``--json`` wrote beside it."""
    return _report(tmp_path_factory.mktemp("alone"), checkpoint)


@pytest.fixture(scope="session")
def both(tmp_path_factory, checkpoint, compressed) -> tuple[Path, dict[str, Any]]:
    """The page of two models, and what ``--json`` wrote beside it."""
    return _report(tmp_path_factory.mktemp("both"), checkpoint, "--against", compressed)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium; where there is none the test is left out, unless ECKART_BROWSER_REQUIRED says that it must run."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        reason = "chromium or chromedriver is not installed; `make browser` installs both"
        if os.environ.get("ECKART_BROWSER_REQUIRED"):
            pytest.fail(reason)
        pytest.skip(reason)
    made = Browser(program, driver)
    yield made
    made.driver.quit()
