"""The benchmark of compression runs in its smallest size on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import tiny_checkpoints

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def job(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compress_lm

    ids = torch.arange(3, 43)
    examples = [{"input_ids": ids[:20].tolist(), "labels": [-100] * 10 + ids[10:20].tolist()}] * 2
    batches = [ids[:32].reshape(2, 16)]
    model, tokenizer = tiny_checkpoints.model(), tiny_checkpoints.tokenizer()
    yield compress_lm, compress_lm.Job(compress_lm.SMOKE, model, tokenizer, batches, batches, examples)
    for name in ("compress_lm", "adapter_job", "common", "labels", "language_model"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "int8",
        "modegpt 0.2",
        "svd-llm plain 0.4",
        "modegpt recovered 0.4",
        "pifa fisher recovered from original 0.2",
        "magnitude pruning 0.4",
    ],
)
def test_a_row(job, name):
    module, work = job
    before = [p.clone() for p in work.model.parameters()]
    row = module.run(work, name, module.contenders()[name])
    assert all(torch.equal(a, b) for a, b in zip(before, work.model.parameters(), strict=True))
    dense = module.bytes_of(work.model)
    smaller = name not in ("dense", "magnitude pruning 0.4")
    assert (row["bytes"] < dense) == smaller
    assert row["perplexity"] > 1
    assert row["answer loss"] > 0
    if row.get("method"):
        assert row["removed"] >= row["ratio"]
    json.dumps(row)


def test_auto_names_what_it_chose_from(job):
    module, work = job
    work.data = [torch.arange(3, 67).reshape(4, 16)]
    row = module.run(work, "auto 0.2", module.contenders()["auto 0.2"])
    assert row["baseline"] == "auto"
    assert row["chosen"] == row["tried"]["trials"][0]["method"]


def test_four_bits_count_as_half_a_byte(job):
    module, _ = job
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)) for _ in range(2))}
    )
    work = module.Job(module.SMOKE, model, None, [], [], [])
    dense = module.bytes_of(model)
    eight, _ = module.quantized(8)(work)
    four, _ = module.quantized(4)(work)
    numbers = 2 * 64 * 32
    assert dense == 4 * numbers
    assert numbers <= module.bytes_of(eight) < 1.2 * numbers
    assert numbers / 2 <= module.bytes_of(four) < 0.85 * numbers


def test_the_five_best_go_to_two_ratios_more_as_they_did_best(job):
    module, _ = job
    names = ["pifa fisher", "pifa", "lorap", "modegpt", "svd-llm", "asvd", "svd"]
    found = {
        f"{name} 0.2": {"method": name.split()[0], "ratio": 0.2, "perplexity": float(i)} for i, name in enumerate(names)
    }
    found["fwsvd recovered 0.2"] = {"method": "fwsvd", "ratio": 0.2, "perplexity": 0.0, "recovery steps": 1}
    expected = ["pifa fisher", "lorap", "modegpt", "svd-llm", "asvd"]
    assert list(module.best_five(found)) == [f"{name} {ratio}" for ratio in (0.1, 0.3) for name in expected]


def test_speeds_of_every_form_are_taken_beside_the_dense_model(job, monkeypatch):
    module, work = job
    import compress_speed

    monkeypatch.setattr(compress_speed, "time_per_token", lambda model, **_: 1.0 + module.bytes_of(model) / 1e9)
    models = compress_speed.forms(work, ratios=(0.4,))
    assert {"dense", "int8", "plain factors 0.4", "pivoted factors 0.4", "narrower layers (modegpt) 0.4"} <= set(models)
    found = compress_speed.measure(models, rounds=1, prompt=16)
    assert found["dense"]["token / dense"] == found["dense"]["prompt / dense"] == 1.0
    assert found["plain factors 0.4"]["token / dense"] < 1
    assert all(row["bytes"] < found["dense"]["bytes"] for name, row in found.items() if name != "dense")
    sys.modules.pop("compress_speed")


def test_names_in_the_picture_do_not_lie_on_one_another(job):
    import labels
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(6, 5))
    canvas, axis = FigureCanvasAgg(figure), figure.add_subplot()
    points = {f"method {i} at 0.{i}": (0.9 if i % 2 else 0.88, 0.5 + 0.002 * i) for i in range(9)}
    axis.set(xlim=(0, 1), ylim=(0, 1))
    labels.label(axis, points)
    canvas.draw()
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axis.texts]  # without its line
    assert [text.get_text() for text in axis.texts] == sorted(points, key=lambda name: points[name][1])
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x1 < axis.bbox.x1 for box in boxes)
