from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_checkpoints
from as_before import libraries_as_before
from eckart.cli.main import main
from eckart.models import linears, load

Run = Callable[..., tuple[int, str, str]]

__all__ = ["libraries_as_before"]  # a fixture of every test here


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Output as into a pipe: parallel test workers inherit the width of the terminal that they were started from."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A dense checkpoint with a tokenizer."""
    return tiny_checkpoints.write(tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture(scope="session")
def mute(tmp_path_factory) -> Path:
    """A dense checkpoint without a tokenizer."""
    return tiny_checkpoints.write(tmp_path_factory.mktemp("mute") / "tiny", with_tokenizer=False)


@pytest.fixture(scope="session")
def compressed(tmp_path_factory, tiny) -> Path:
    """A checkpoint that ``eckart compress`` wrote."""
    out = tmp_path_factory.mktemp("compressed") / "model"
    assert main(["compress", str(tiny), "--method", "svd", "--ratio", "0.4", "--no-eval", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(capsys) -> Run:
    """Run ``eckart`` in this process; exit code, output and errors."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, tiny) -> Path:
    """A LoRA on the tiny model that changes its outputs."""
    model, _ = load(tiny)
    names = [ref.name for ref in linears(model).linears]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    made.save_pretrained(path)
    return path


@pytest.fixture
def run_json(run) -> Callable[..., Any]:
    """Run ``eckart ... --json``, which must succeed; what it printed."""

    def call(*args: object) -> Any:
        code, out, err = run(*args, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def refused(run, tmp_path) -> Callable[..., None]:
    """Run a command that must fail with one line that has ``message`` in it, and leave ``tmp_path`` as it was."""

    def call(*args: object, message: str, code: int = 1) -> None:
        before = _tree(tmp_path)
        found, out, err = run(*args)
        assert (found, out) == (code, ""), err
        assert err.startswith("eckart: error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert message in err
        assert _tree(tmp_path) == before

    return call


def _tree(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


@pytest.fixture
def sums(tmp_path):
    """Questions whose answers a model can learn in a few steps."""
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"sum {i}", "a": "four"}) for i in range(12)))
    return path
