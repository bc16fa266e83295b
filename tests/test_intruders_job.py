"""The job on intruder dimensions runs for every row in its smallest size, and its baselines are what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import tiny_checkpoints
from eckart.analysis import IntruderDimensions

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The module and a smoke-sized job on a tiny model, with a few sums to learn."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import intruders

    source = tiny_checkpoints.write_sums(tmp_path / "sums.jsonl")
    model = tiny_checkpoints.model(max_position_embeddings=1024, num_hidden_layers=2)
    yield intruders, intruders.load(intruders.SMOKE, model, tiny_checkpoints.tokenizer(), source=source)
    for name in ("intruders", "intruder_edits", "adapter_job", "common", "language_model"):
        sys.modules.pop(name, None)


def test_every_row_can_be_measured(job, capsys):
    module, made = job
    made.options = IntruderDimensions(threshold=0.95)  # the tiny model's changes are small
    found = {name: module.run(made, name) for name in module.TUNINGS}
    before = next(iter(found.values()))["before"]
    for name, row in found.items():
        json.dumps(row, allow_nan=False)
        assert row["method"] == "intruder-dimensions"
        assert row["before"] == before  # the base is as it was
        assert len(row["curve"]) == made.size.steps
        assert row["directions"] == 10 * 14, name
        assert row["change"] > 0
        assert list(row["losses"]) == ["intruders", "whole change", "whole change, λ", "others"]
        gone = row["losses"]["whole change, λ"]["0"]
        assert gone == pytest.approx(before, abs=1e-5)
        if row["intruders"]:
            assert all(list(losses) == ["1", "0.75", "0.5", "0"] for losses in row["losses"].values())
    assert found["LoRA, r = 1"]["intruders"] > 0
    module.show(found)
    assert "LoRA, r = 64: " in capsys.readouterr().out


def test_the_edits_take_away_what_they_say(job):
    module, made = job
    model, _, _ = module.tuned(made, 1, 0.05)
    made.options = IntruderDimensions(threshold=0.9)
    layers, threshold = module.look(made.model, model, made.options)
    assert threshold == 0.9
    assert sum(len(one.intruders) for one in layers) > 0
    edits = module.edits(layers)
    taken = {
        name: sum(float((edit(one, 0.75) - one.after).norm()) ** 2 for one in layers) ** 0.5
        for name, edit in edits.items()
    }
    size = sum(float(one.found.s[one.intruders].square().sum()) for one in layers) ** 0.5
    moved = sum(float((one.after - one.before).norm()) ** 2 for one in layers) ** 0.5
    assert taken["intruders"] == pytest.approx(0.25 * size, rel=1e-4)
    assert taken["whole change"] == pytest.approx(min(0.25 * size, moved), rel=1e-4)
    assert taken["whole change, λ"] == pytest.approx(0.25 * moved, rel=1e-4)
    for one in layers:
        assert len(one.others) <= len(one.intruders)
        assert not set(one.others.tolist()) & set(one.intruders.tolist())
        assert torch.equal(edits["intruders"](one, 1.0), one.after)


def test_edits_go_by_a_higher_threshold_where_nothing_is_below_the_paper_s(job):
    module, made = job
    model, _, _ = module.tuned(made, 1, 0.05)
    least = min(float(one.found.cosines.min()) for one in module.look(made.model, model, made.options)[0])
    below, above, far = least * 0.9, (1 + least) / 2, 1.0
    for sweep, wanted in (((above, far), above), ((below, above), above), ((below,), below)):
        options = IntruderDimensions(threshold=below, sweep=sweep)
        layers, threshold = module.look(made.model, model, options)
        assert threshold == wanted
        assert (sum(len(one.intruders) for one in layers) > 0) == (wanted > least)
