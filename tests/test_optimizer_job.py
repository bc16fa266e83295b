"""The job that compares optimizers runs for every row, in its smallest size, and goes on where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import tiny_checkpoints
from eckart import catalog

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The module and its two smoke-sized jobs on a text and a few sums."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import optimize_lm

    words, sums = tmp_path / "text.txt", tiny_checkpoints.write_sums(tmp_path / "sums.jsonl")
    words.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    model = tiny_checkpoints.model(max_position_embeddings=1024, num_hidden_layers=1)
    size = optimize_lm.SMOKE
    tuning = optimize_lm.tuning(size, model, tiny_checkpoints.tokenizer(), source=sums)
    yield optimize_lm, (optimize_lm.pretraining(size, source=words), tuning)
    for name in ("optimize_lm", "optimizer_cost", "adapter_job", "common", "language_model"):
        sys.modules.pop(name, None)


def test_every_built_optimizer_is_a_contender(job):
    module, _ = job
    built = {row.name for row in catalog.select(family="optim") if row.status != "planned"}
    assert built | {f"{name} 8-bit" for name in built} | {"adamw", "muon", "adafactor"} <= set(module.contenders())


def test_every_row_can_be_measured(job):
    module, jobs = job
    for name, contender in module.contenders().items():
        if name.startswith("torchao"):
            continue  # compiles for half a minute
        row = module.run(jobs, name, contender)
        for part in ("pre-training", "fine-tuning"):
            assert row[part]["loss"] == row[part]["loss"], name
            assert row[part]["state bytes"] > 0
            assert len(row[part]["curve"]) == row[part]["steps"]


def test_the_two_best_rates_are_trained_to_the_end_and_a_search_is_kept(job, monkeypatch):
    module, (pretraining, _) = job
    final = {1.0: 5.0, 2.0: 4.0, 3.0: 3.0, 4.0: 9.0}
    runs: list[tuple[float, int]] = []

    def run(build, rate: float, steps: int):
        runs.append((rate, steps))
        loss = final[rate] if steps == 10 else {1.0: 3.0, 2.0: 2.0, 3.0: 2.1, 4.0: 4.0}[rate]
        return module.Run(loss, [loss], [1.0], 1, 1)

    monkeypatch.setattr(type(pretraining), "run", lambda self, *arguments: run(*arguments))
    contender = module.Optimizer(None, rates=(1.0, 2.0, 3.0))
    row = module.measured(pretraining, contender, 10, 1, {})
    assert runs == [(1.0, 1), (2.0, 1), (3.0, 1), (2.0, 10), (3.0, 10)]
    assert (row["loss"], row["learning rate"]) == (3.0, 3.0)
    assert row["losses at the end"] == {"2.0": 4.0, "3.0": 3.0}
    runs.clear()
    assert module.measured(pretraining, contender, 10, 1, row) == row
    assert not runs
    old = {"loss": 4.0, "learning rate": 2.0, "steps": 10, "learning rates tried": row["learning rates tried"]}
    assert module.measured(pretraining, contender, 10, 1, old)["loss"] == 3.0
    assert runs == [(3.0, 10)]


def test_bytes_of_a_state_are_counted_once_and_inside_of_objects(job):
    module, _ = job
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.AdamW([parameter])

    class Holder:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    shared = torch.zeros(10)
    optimizer.state[parameter] = {"a": shared, "b": [shared[:3], Holder(torch.zeros(2, dtype=torch.int8))]}
    assert module.bytes_of_state(optimizer) == 40 + 40 + 2  # a view keeps all of its storage


def test_a_table_and_a_picture(job, tmp_path, monkeypatch):
    module, jobs = job
    row = module.run(jobs, "galore", module.contenders()["galore"])
    path, page, picture = (tmp_path / name for name in ("rows.json", "page.md", "picture.png"))
    module.add_row(path, "galore", row)
    page.write_text("before\n<!-- table -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(module, "PICTURE", picture)
    module.table(module.rows(path))
    assert "| galore |" in page.read_text()
    pytest.importorskip("matplotlib")
    module.draw(path)
    assert picture.stat().st_size > 1000


def test_what_an_update_costs_is_measured_and_drawn(job, tmp_path, monkeypatch):
    import optimizer_cost

    small = job[0].Size(width=32, layers=1)
    monkeypatch.setattr(optimizer_cost, "SIZES", {"tiny": small, "small": job[0].Size(width=64, layers=1)})
    monkeypatch.setattr(optimizer_cost, "WIDTH", 64)
    monkeypatch.setattr(optimizer_cost, "RANK", 8)
    monkeypatch.setattr(optimizer_cost, "PAGE", tmp_path / "page.md")
    page = optimizer_cost.PAGE
    page.write_text("<!-- cost -->\n<!-- end -->\n<!-- sizes -->\n<!-- end -->\n")
    figures: dict[str, float] = {}
    optimizer_cost.dct_refresh(figures)
    sizes = optimizer_cost.over_sizes()
    optimizer_cost.draw({"figures": figures, "sizes": sizes})
    cells = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| galore |")]
    assert len(cells) == 1
    assert len(cells[0]) == 1 + 2 * 2
    assert figures["dct-adamw: bytes that stand for the basis"] == 8 * 4
    [adam] = [{size: cost["bytes of state"] for size, cost in sizes["adamw"].items()}]
    assert all(abs(count - 8) < 0.1 for count in adam.values())
