"""The benchmarks of convolutions, recommenders and emulators run in their smallest size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import tiny_checkpoints

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("convolutions", "recommenders", "emloc", "small_size", "adapter_job", "common", "language_model")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [*MODULES, *(name for name in sys.modules if name.startswith("vision_cases"))]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["dense", "mixed-td, separable alone 0.6", "fewer channels 0.6"])
def test_a_row_of_the_convolutions(benchmarks, name):
    import convolutions

    row = convolutions.run(convolutions.SMOKE, name, convolutions.contenders()[name])
    dense = convolutions.multiply_adds(convolutions.network())
    assert 0 <= row["test"]["accuracy"] <= 1
    # The layer that reads the picture is not factored, and does not count for the ratio.
    limit = {"dense": 1.0, "mixed-td, separable alone 0.6": 0.41, "fewer channels 0.6": 0.41}[name]
    assert 0.1 * dense < row["test"]["multiply-adds"] <= limit * dense
    json.dumps(row)


@pytest.mark.parametrize("kind", ["deepfm", "dcn"])
def test_a_row_of_the_recommenders(benchmarks, kind):
    import recommenders

    dense, mimicked, random = (
        recommenders.run(recommenders.SMOKE, name, recommenders.contenders()[name])
        for name in (f"{kind} dense", f"{kind} afm-ctr, rank 4", f"{kind} random factors, rank 4")
    )
    assert mimicked["method"] == "afm-ctr"
    assert mimicked["test"]["parameters"] == random["test"]["parameters"] < dense["test"]["parameters"]
    assert 0 < mimicked["test"]["auc"] < 1
    assert mimicked["best auc"] > 0.6
    json.dumps(mimicked)


def test_a_row_of_the_emulators(benchmarks, monkeypatch, tmp_path):
    import emloc
    import language_model

    base = tiny_checkpoints.write(tmp_path / "base", tiny_checkpoints.model(max_position_embeddings=1024))
    monkeypatch.setattr(emloc, "BASE", str(base))
    monkeypatch.setattr(language_model, "DATA", tmp_path)
    monkeypatch.setattr(emloc, "tuned_apart", emloc.tune)
    tiny_checkpoints.write_sums(tmp_path / "gsm8k-train.jsonl")
    on_itself, on_emulator = emloc.on_itself(emloc.SMOKE), emloc.on_emulator(emloc.SMOKE, 0.4)
    assert on_emulator["bytes of the base"] < on_itself["bytes of the base"]
    assert len({on_emulator[f"loss {name}"] for name in emloc.LIMITS}) > 1
    assert on_itself["loss as tuned"] > 0
    json.dumps(on_emulator)


def test_the_process_that_tunes_tells_what_it_took(benchmarks, monkeypatch, tmp_path):
    import emloc

    script = tmp_path / "told.py"
    script.write_text("import json, sys; print('loading'); print(json.dumps({'told': json.loads(sys.argv[2])}))")
    monkeypatch.setattr(emloc, "__file__", str(script))
    told = emloc.tuned_apart("demo", tmp_path / "lora", emloc.SMOKE)["told"]
    assert told["base"] == "demo"
    assert emloc.Size(**{**told["size"], "rates": tuple(told["size"]["rates"])}) == emloc.SMOKE
