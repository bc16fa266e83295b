"""The job of the vision and signal adapters runs for every row of every case, in its smallest size."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CASES = ["petalface", "explora", "ce-ssl", "flora"]


@pytest.fixture
def job(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import adapt_vision

    yield adapt_vision
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("adapt_vision", "adapter_job", "common", "vision_cases"):
            sys.modules.pop(name)


@pytest.fixture
def made(job, request):
    return job.CASES[request.param](job.SMOKE)


@pytest.mark.parametrize("made", CASES, indirect=True)
def test_every_row_can_be_measured(job, made):
    contenders = made.rows()
    assert {row.method for row in contenders.values()} == {None, made.name}
    assert made.name in contenders
    for name, row in contenders.items():
        measured = job.measure(made, name, row)
        assert list(measured["accuracy"]) == list(made.figures), name
        assert all(0 <= value <= 1 for value in measured["accuracy"].values())
        assert all(len(values) == made.size.seeds for values in measured["accuracy by seed"].values())
        assert (measured["trained parameters"] > 0) == bool(row.rates), name
        assert (measured["learning rate"] is None) == (not row.rates)
        assert measured.get("method", measured.get("baseline")) == (row.method or name)


@pytest.mark.parametrize(
    ("made", "other"), [("petalface", "lora"), ("ce-ssl", "lora"), ("flora", "lora")], indirect=["made"]
)
def test_the_adapters_train_as_much_as_lora(job, made, other):
    rows = made.rows()
    counts = {name: job.trained_parameters(made.started(rows[name], 0)) for name in (made.name, other)}
    assert abs(counts[made.name] - counts[other]) <= 0.02 * counts[other]


@pytest.mark.parametrize(("made", "key"), [("petalface", "quality"), ("ce-ssl", "unlabelled")], indirect=["made"])
def test_only_rows_that_say_so_are_given_more_than_examples(made, key):
    for name, row in made.rows().items():
        assert (key in next(made.batches(row, seed=0))) == row.informed, name


@pytest.mark.parametrize("made", ["petalface"], indirect=True)
def test_degraded_digits_are_rated_lower(made):
    from eckart.adapters.petalface import sharpness

    score = sharpness(made.mixed.inputs, made.reference)
    clean, poor = score[made.quality == 1], score[made.quality == 0]
    assert clean.median() > 0.5 > poor.median()  # the threshold lies between
    assert (made.quality == 1).sum() == (made.quality == 0).sum()


@pytest.mark.parametrize("made", ["explora"], indirect=True)
def test_the_patches_of_the_masked_autoencoder_know_their_places(made):
    for places in (made.network.vit.embeddings.position_embeddings, made.network.decoder.decoder_pos_embed):
        assert len(torch.unique(places.detach()[0], dim=0)) == 17  # the class token and 4 x 4 patches


@pytest.mark.parametrize("made", ["explora"], indirect=True)
def test_the_probe_sees_every_patch_and_leaves_the_mask_on(made):
    from vision_cases.explora import features

    first, again = (features(made.network, made.unlabelled[:3]) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=1e-4, atol=1e-5)  # patches come in another order
    assert made.network.config.mask_ratio == 0.5


def test_so_many_of_each_class_are_drawn(job):
    from vision_cases.case import Examples

    examples = Examples(torch.arange(60.0), torch.arange(60) % 3)
    few = examples.few(4, seed=1)
    assert few.labels.bincount().tolist() == [4, 4, 4]
    assert (few.inputs.long() % 3 == few.labels).all()
    assert few.inputs.unique().numel() == 12
    assert not torch.equal(few.inputs, examples.few(4, seed=2).inputs)


def test_the_shift_of_the_beats_is_one_and_the_classes_differ(job):
    from vision_cases.ce_ssl import WAVES, beats

    known, shifted = beats(600, shifted=False, seed=0), beats(600, shifted=True, seed=0)
    assert known.inputs.shape == (600, 1, 1, 128)
    assert torch.equal(known.labels, shifted.labels)
    assert shifted.inputs.mean() > known.inputs.mean() + 0.3  # the offset
    means = torch.stack([known.inputs[known.labels == label].mean(0).flatten() for label in range(len(WAVES))])
    distances = torch.cdist(means, means) + torch.eye(len(WAVES)) * 1e3
    assert distances.min() > 0.3


def test_rows_that_are_there_are_not_measured_again(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["adapt_vision.py", "--only", "flora", "--smoke"])
    job.main()
    assert len(re.findall(r"^flora: ", capsys.readouterr().out, re.MULTILINE)) == 4
    path = tmp_path / "cache" / "adapt_vision_smoke.json"
    rows = json.loads(path.read_text())["rows"]
    path.write_text(json.dumps({"rows": {name: row for name, row in rows.items() if name != "flora: lora"}}))
    job.main()
    assert re.findall(r"^flora: (\w+):", capsys.readouterr().out, re.MULTILINE) == ["lora"]


def test_the_page_and_the_picture_come_from_the_rows(job, tmp_path, monkeypatch):
    row = {
        "accuracy": {"accuracy": 0.5},
        "spread": {"accuracy": 0.01},
        "trained parameters": 1234,
        "learning rate": 0.1,
    }
    both = {"accuracy": {"clean": 0.9, "degraded": 0.6}, "spread": {"clean": 0.0, "degraded": 0.02}}
    found = {f"{case}: {case}": row | {"case": case, "method": case} for case in CASES[1:]}
    found["petalface: before"] = row | both | {"case": "petalface", "baseline": "before", "learning rate": None}
    page = tmp_path / "page.md"
    page.write_text("".join(f"# {case}\n<!-- {case} -->\nold\n<!-- end -->\n" for case in CASES))
    monkeypatch.setattr(job, "PAGE", page)
    monkeypatch.setattr(job, "PICTURE", tmp_path / "picture.png")
    job.tables(found)
    job.draw(found)
    text = page.read_text()
    assert "old" not in text
    assert "| *before* | 90.0 ± 0.0 | 60.0 ± 2.0 | 1,234 | - |" in text
    assert text.count("| 50.0 ± 1.0 | 1,234 | 0.1 |") == 3
    assert (tmp_path / "picture.png").stat().st_size > 1000
