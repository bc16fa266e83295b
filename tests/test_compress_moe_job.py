"""The benchmark of compressed mixtures runs in its smallest size, from training to the table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TEXT = "".join(f"{i} times {i} is {i * i}; " for i in range(400)).encode()


@pytest.fixture
def module(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compress_moe
    import language_model

    for name in ("wikitext2-valid.txt", "wikitext2-test.txt"):
        (tmp_path / name).write_bytes(TEXT)
    monkeypatch.setattr(language_model, "DATA", tmp_path)
    monkeypatch.setattr(compress_moe, "CACHE", tmp_path / "cache")
    yield compress_moe
    for name in ("compress_moe", "compress_lm", "adapter_job", "common", "labels", "language_model"):
        sys.modules.pop(name, None)


@pytest.fixture
def job(module):
    return module.load(module.SMOKE, "smoke")


def test_windows_are_the_bytes_in_order(module):
    batches = module.windows(TEXT, 10, 40)
    assert [tuple(batch.shape) for batch in batches] == [(8, 10)] * 5
    assert bytes(torch.cat(batches).flatten().tolist()) == TEXT[:400]


def test_the_model_is_trained_once_and_kept(module):
    size = module.Size(32, 2, 4, length=32, batch=4, steps=25, timed=False)
    first = module.train(TEXT, size)
    ids = torch.cat(module.windows(TEXT, 32, 16))
    with torch.no_grad():
        assert float(first(input_ids=ids, labels=ids).loss) < 3.5 < torch.log(torch.tensor(256.0))
    path = module.trained(module.SMOKE, "smoke")
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert module.trained(module.SMOKE, "smoke") == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "int8",
        "sub-moe 0.25",
        "sub-moe low-rank 0.5",
        "sub-moe low-rank, none merged 0.25",
        "sub-moe shared output basis 0.5",
        "sub-moe shared stream basis recovered 0.5",
        "least used pruned 0.5",
        "ones",
    ],
)
def test_a_row(module, job, name):
    before = [p.clone() for p in job.model.parameters()]
    row = module.run(job, name, module.contenders()[name])
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters(), strict=True))
    dense = module.bytes_of(job.model)
    experts = 4 * 2 * 4 * 3 * 32 * 32  # bytes of two layers of four experts
    assert row["bytes"] == dense if name == "dense" else row["bytes"] <= dense - experts / 4
    assert 0 < row["loss"] < 8
    if row.get("method"):
        assert row["removed"] >= row["ratio"]
    json.dumps(row)


def test_pruning_keeps_the_experts_that_most_tokens_are_sent_to(module, job):
    from eckart.models.experts import expert_banks, route

    made, _ = module.pruned(0.5)(job)
    used = route(job.model, expert_banks(job.model), [{"input_ids": ids} for ids in job.data], progress=False)
    for old, new in zip(expert_banks(job.model), expert_banks(made), strict=True):
        kept = sorted(used[old.name].frequency.argsort(descending=True)[:2].tolist())
        assert torch.equal(new.down, old.down[kept])
        assert torch.equal(new.gate_up, old.gate_up[kept])


def test_missing_rows_are_added_and_the_table_is_written(module, monkeypatch, tmp_path):
    known, path = module.contenders(), module.CACHE / "compress_moe_smoke.json"
    monkeypatch.setattr(module, "contenders", lambda: {name: known[name] for name in ("dense", "sub-moe 0.5")})
    module.CACHE.mkdir()
    module.add_row(
        path, "dense", {"loss": 1.0, "perplexity": 2.0, "bytes": 3, "ms a token": None, "seconds to compress": 0}
    )
    monkeypatch.setattr(sys, "argv", ["compress_moe.py", "--smoke"])
    module.main()
    found = module.rows(path)
    assert list(found) == ["dense", "sub-moe 0.5"]
    assert found["dense"]["loss"] == 1.0  # not measured again
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(module, "PAGE", page)
    module.table(found)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert {line.split(" | ")[0] for line in lines if line.startswith("| ")} == {
        "| model", "| ---", "| *dense*", "| sub-moe 0.5"
    }  # fmt: skip
