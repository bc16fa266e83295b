"""The benchmarks of heads run in their smallest size."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import tiny_checkpoints
from model_state import assert_unchanged, snapshot

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("talking_heads", "lora_limits", "adapter_job", "common", "language_model"):
        sys.modules.pop(name, None)


def test_components_are_ranked_and_removed(benchmarks):
    import talking_heads

    model = tiny_checkpoints.model()
    before = snapshot(model)
    texts = [{"input_ids": torch.arange(3, 33)[None]}]
    figures = talking_heads.run(model, tiny_checkpoints.tokenizer(), talking_heads.SMOKE, texts)
    assert_unchanged(model, before)
    assert figures["loss of repeated tokens: whole model"] > 0
    for kind in talking_heads.KINDS:
        assert len(figures[f"{kind}, by score: components"].split()) == talking_heads.SMOKE.pairs
        assert figures[f"{kind}, by score: change of the loss of text, top components"] != 0
    assert all(math.isfinite(value) for value in figures.values() if isinstance(value, float))


def test_times_slopes_and_sizes(benchmarks, monkeypatch, capsys):
    import lora_limits

    assert lora_limits.slope([1, 10, 100], [2.0, 200.0, 20000.0]) == pytest.approx(2)
    monkeypatch.setattr(sys, "argv", ["lora_limits.py", "--smoke"])
    lora_limits.main()
    assert "slope of the longer half" in capsys.readouterr().out
    figures = lora_limits.sizes(tiny_checkpoints.model(), [torch.arange(3, 40)])
    assert figures["demo model: heads"] == 8
