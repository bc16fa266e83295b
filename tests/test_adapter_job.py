"""The job that compares adapters runs for every row, in its smallest size, and goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import tiny_checkpoints
from eckart import catalog

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The module and a smoke-sized job on a tiny model, with a few sums to learn."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import adapt_gsm8k

    source = tmp_path / "sums.jsonl"
    source.write_text("\n".join(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) for i in range(12)))
    model = tiny_checkpoints.model(max_position_embeddings=1024, num_hidden_layers=1)
    made = adapt_gsm8k.load(
        adapt_gsm8k.SMOKE, model, tiny_checkpoints.tokenizer(), source=source, out=tmp_path / "rows.json"
    )
    yield adapt_gsm8k, made
    for name in ("adapt_gsm8k", "common", "language_model"):
        sys.modules.pop(name, None)


def test_every_built_adapter_and_the_baselines_are_contenders(job):
    module, _ = job
    built = {row.name for row in catalog.select(family="adapters") if row.status != "planned"}
    assert built | {"lora", "rslora", "dora", "olora", "lora-ga", "full fine-tuning"} == set(module.contenders())


def test_every_row_can_be_measured(job):
    module, made = job
    for name, build in module.contenders().items():
        row = module.run(made, name, build)
        assert row["loss"] > 0, name
        assert len(row["curve"]) == made.size.steps
        assert list(row["watched"]) == [1, 2]
        assert row["trained parameters"] > 0
        assert row["perplexity after"] > 0
        assert row.get("method", row.get("baseline")) == name
    assert set(module.more_seeds(made, name, build, row)["loss by seed"]) == {"0", "1", "2"}


def test_the_rank_makes_the_counts_equal_where_the_method_allows_it(job):
    module, made = job
    for name in ("pissa", "sorsa", "eva", "corda"):
        rank = module.rank_for(name, made)
        assert abs(rank - module.LORA_RANK) <= 1, name
