"""The benchmarks of the analyses and of small networks run in their smallest size, and compare what they say."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import tiny_checkpoints

ROOT = Path(__file__).parents[1]
OWN = (
    "adapter_job", "analysis", "answer_quality", "common", "denoise", "intruder_edits", "intruders", "language_model",
    "locally_linear", "lora_limits", "small_networks", "small_size", "spectra", "stream", "talking_heads",
    "vision_cases",
)  # fmt: skip


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in [*sys.modules]:
        if name.partition(".")[0] in OWN:
            sys.modules.pop(name)


@pytest.fixture
def page(tmp_path):
    """A copy of the page, of which the tables are empty."""
    copied = tmp_path / "page.md"
    text = (ROOT / "docs" / "analysis-measured.md").read_text()
    copied.write_text(re.sub(r"(<!-- (?!end)[\w-]+ -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL))
    return copied


def table(page: Path, mark: str) -> list[str]:
    return page.read_text().partition(f"<!-- {mark} -->\n")[2].partition("<!-- end -->")[0].splitlines()


def finite(value) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_the_exact_norm_is_exact_and_the_approximation_a_bound_where_it_says_so(page, tmp_path, monkeypatch):
    import analysis

    source = tmp_path / "text.txt"
    source.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    monkeypatch.setattr(analysis, "PAGE", page)
    model, tokenizer = tiny_checkpoints.model(), tiny_checkpoints.tokenizer()
    found = analysis.measure_nuclear_norm(analysis.SMOKE, model, tokenizer, source)
    assert [(one["width"], one["tokens"]) for one in found["sizes"]] == [(24, 16), (24, 64), (48, 16), (48, 64)]
    for one in found["sizes"]:
        assert one["error, small Gram"] < 1e-6
        assert one["entropy, difference"] < 1e-4
        assert (one["approximation over exact"] >= 1) == (one["tokens"] >= one["width"])
        assert all(seconds > 0 for seconds in one["seconds"].values())
    states = found["demo model"]
    assert states["chunks"] == 4
    assert finite(states)
    assert all(one["rotated"] != one["approximation over exact"] for one in states["by tokens"].values())
    analysis.draw({"matrix-nuclear-norm": {"method": "matrix-nuclear-norm", **found}})
    assert len(table(page, "nuclear-norm")) == 2 + 4
    assert len(table(page, "nuclear-norm-states")) == 2 + 2


def test_the_curve_counts_pairs():
    import answer_quality

    assert answer_quality.auc([2.0, 3.0], [1.0, 1.0]) == 1
    assert answer_quality.auc([1.0], [1.0]) == 0.5
    assert answer_quality.auc([1.0, 3.0], [2.0, 4.0]) == 0.25


def test_answers_are_damaged_as_their_names_say(tmp_path):
    import answer_quality

    source = tmp_path / "data.jsonl"
    lines = [{"question": f"How many are {i}?", "answer": f"There are {i} of them, so that is 1{i}"} for i in range(6)]
    source.write_text("\n".join(map(json.dumps, [*lines, {"question": "x" * 101, "answer": "too long"}])))
    found = answer_quality.variants(answer_quality.SMOKE, source)
    right = [one["answer"] for one in found["right"]]
    assert len(right) == answer_quality.SMOKE.examples
    for name, damaged in found.items():
        assert [one["question"] for one in damaged] == [one["question"] for one in found["right"]]
        same = [one["answer"] == answer for one, answer in zip(damaged, right, strict=True)]
        assert all(same) == (name == "right"), name
    assert sorted(one["answer"] for one in found["of another question"]) == sorted(right)
    for name, part in (("order of the words", str.split), ("digits", lambda text: re.sub(r"\d", "", text))):
        assert [sorted(part(one["answer"])) for one in found[name]] == [sorted(part(answer)) for answer in right]


def test_right_answers_are_judged_against_each_damage(page, tmp_path, monkeypatch):
    import answer_quality

    import analysis

    source = tiny_checkpoints.write_sums(tmp_path / "sums.jsonl")
    model, tokenizer = tiny_checkpoints.model(max_position_embeddings=1024), tiny_checkpoints.tokenizer()
    found = answer_quality.measure(answer_quality.SMOKE, model, tokenizer, source)
    assert found["examples"] == 4
    assert list(found["AUC"]) == list(found["means"])[1:]
    assert all(0 <= value <= 1 for one in found["AUC"].values() for value in one.values())
    monkeypatch.setattr(analysis, "PAGE", page)
    analysis.draw({"gradient-spectra": found})
    assert len(table(page, "gradients")) == 2 + 8


def test_figures_that_know_the_damage_are_found():
    """Examples of which the right ones have higher ranks and smaller norms, by construction."""
    import answer_quality

    from eckart.analysis import Analysis

    def made(rank: float, norm: float) -> Analysis:
        spread = 1 + 0.01 * torch.arange(5.0, dtype=torch.float64)[:, None]
        lengths = torch.tensor([[8, 20], [8, 30], [8, 25], [8, 22], [8, 28]])
        tensors = {"effective rank": rank * spread, "nuclear norm": norm * spread, "frobenius": norm * spread}
        return Analysis({}, [], {**tensors, "loss": norm * spread[:, 0], "lengths": lengths})

    found = answer_quality.judged(made(8.0, 1.0), made(2.0, 3.0))
    assert found.pop("length of the text") == 0.5
    assert set(found.values()) == {1.0}


def test_every_family_is_made_linear_within_the_bars(page, monkeypatch):
    import locally_linear

    ids = [torch.arange(3, 9), torch.arange(20, 60, 5)]
    rows = {kind: locally_linear.measure(locally_linear.tiny(kind), ids, 1) for kind in locally_linear.FAMILIES}
    for kind, row in rows.items():
        for dtype, bar in locally_linear.BARS.items():
            assert row[dtype]["error"] < bar, (kind, dtype)
            assert row[dtype]["ordinary Jacobian"] > 0.05, kind
        assert row["float32"]["other values"] == 0, kind
        assert row["float64"]["other values"] < 1e-5, kind
    assert rows["gpt2"]["float64"]["constant"] > 1e-3 > rows["llama"]["float64"]["constant"]
    monkeypatch.setattr(locally_linear, "PAGE", page)
    locally_linear.draw(rows)
    assert len(table(page, "locally-linear")) == 2 + len(rows)


def test_starts_are_compared_on_every_task(page, monkeypatch):
    import small_networks

    rows: dict[str, dict] = {}
    small_networks.measure_starts(small_networks.SMOKE, rows.__setitem__)
    assert len(rows) == 4 * len(small_networks.STARTS)
    assert {row.get("method") for row in rows.values()} == {None, "svd-init"}
    assert finite(rows)
    for name in {row["task"] for row in rows.values()}:
        at_start = {row.get("method"): row["test"]["0"] for row in rows.values() if row["task"] == name}
        accuracy = rows[f"{name}: svd-init"]["figure"] == "accuracy"
        assert (at_start["svd-init"] > at_start[None]) == accuracy  # the linear map is better than chance
    again: dict[str, dict] = {}
    last = list(rows)[-1]
    small_networks.measure_starts(small_networks.SMOKE, again.__setitem__, rows.keys() - {last})
    assert again == {last: rows[last]}  # only what is missing, and the same
    monkeypatch.setattr(small_networks, "PAGE", page)
    small_networks.draw(rows)
    assert len(table(page, "svd-init")) == 2 + len(rows)


def test_denoisers_are_compared(page, monkeypatch):
    import small_networks

    rows: dict[str, dict] = {}
    small_networks.measure_denoisers(small_networks.SMOKE, rows.__setitem__)
    assert [row.get("method") for row in rows.values()] == ["jacobian-nuclear-norm", *[None] * 5]
    assert finite(rows)
    assert all(row["test"]["values above 1 %"] <= 64 for row in rows.values())
    again: dict[str, dict] = {}
    slow = "denoiser: nuclear norm by singular values"
    small_networks.measure_denoisers(
        small_networks.SMOKE, again.__setitem__, {name: row for name, row in rows.items() if name != slow}
    )
    assert list(again) == [slow]
    assert again[slow]["strength"] == rows["denoiser: jacobian-nuclear-norm"]["strength"]
    monkeypatch.setattr(small_networks, "PAGE", page)
    small_networks.draw(rows)
    assert len(table(page, "denoisers")) == 2 + len(rows)


def test_the_penalties_of_the_denoiser_are_what_they_are_called():
    import denoise
    from small_size import SMOKE

    from eckart.models.cut import Cut

    torch.manual_seed(0)
    head, tail = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    product = (tail.weight @ head.weight).detach()
    x = torch.randn(4000, 64)
    expected = {
        "jacobian-nuclear-norm": 0.5 * (head.weight.square().sum() + tail.weight.square().sum()),
        "nuclear norm by singular values": torch.linalg.svdvals(product).sum(),
        "squared norm of the Jacobian": 0.5 * product.square().sum(),
        "no penalty": torch.zeros(()),
    }
    for name, wanted in expected.items():
        rows = x[:4] if "singular" in name else x
        found, y = denoise.Denoiser(SMOKE, name).penalty(Cut(head, tail), rows, 3.0, torch.Generator().manual_seed(0))
        torch.testing.assert_close(y, tail(head(rows)))
        assert float(found.detach()) == pytest.approx(3 * float(wanted.detach()), rel=0.02), name


def test_the_other_tables_come_from_figures(page, monkeypatch):
    import intruders
    import lora_limits
    import spectra
    import talking_heads

    for module in (intruders, lora_limits, spectra, talking_heads):
        monkeypatch.setattr(module, "PAGE", page)
    spectra.draw({"weights": 210, "seconds, ours": 1.5})
    assert table(page, "spectra")[2:] == ["| weights | 210 |", "| seconds, ours | 1.5 |"]
    monkeypatch.setattr(lora_limits, "LENGTHS", lora_limits.SHORT)
    monkeypatch.setattr(lora_limits, "WIDTHS", ((4, 2),))
    lora_limits.draw(lora_limits.times(4, 2, lora_limits.SHORT, 1) | lora_limits.errors())
    assert len(table(page, "lora-limits")) == 2 + 1
    assert len(table(page, "lora-limits-errors")) == 2 + 4
    texts = [{"input_ids": torch.arange(3, 33)[None]}]
    talking_heads.draw(
        talking_heads.run(tiny_checkpoints.model(), tiny_checkpoints.tokenizer(), talking_heads.SMOKE, texts)
    )
    assert len(table(page, "talking-heads")) == 2 + 6
    losses = {"text": 3.0, "answers": 1.0}
    scaled = dict.fromkeys(("1", "0.75", "0.5", "0"), losses)
    row = {
        "learning rate": 0.01, "change": 0.1, "before": losses, "after": losses, "directions": 2100, "intruders": 3,
        "robust intruders": 2, "threshold of the edits": 0.8, "counts": {f"0.{i}": i for i in range(1, 10)},
        "losses": {"intruders": scaled, "others": {"1": losses}},
    }  # fmt: skip
    intruders.draw({"LoRA, r = 1": row})
    assert "| 3 (2 robust) | 6, 7, 8, 9 |" in table(page, "intruders")[2]
    assert table(page, "intruders-scaled")[2:] == [f"| LoRA, r = 1, below 0.8: intruders |{' 3.000, 1.000 |' * 4}"]
