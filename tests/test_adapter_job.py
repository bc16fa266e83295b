"""The jobs that compare adapters run for every row, in their smallest size, and go on where they stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import tiny_checkpoints
from eckart import catalog

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The module and a smoke-sized job on a tiny model, with a few sums to learn."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import adapt_gsm8k

    source = tiny_checkpoints.write_sums(tmp_path / "sums.jsonl")
    model = tiny_checkpoints.model(max_position_embeddings=1024, num_hidden_layers=2)
    made = adapt_gsm8k.load(adapt_gsm8k.SMOKE, model, tiny_checkpoints.tokenizer(), source=source)
    yield adapt_gsm8k, made
    _forget()


@pytest.fixture
def sentiment(tmp_path, monkeypatch):
    """The module and a smoke-sized job on a tiny encoder, with a few sentences."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import adapt_sst2

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = BertModel(BertConfig(vocab_size=tiny_checkpoints.VOCABULARY, **sizes), add_pooling_layer=False)
    examples = [(f"the film is {'good' if i % 2 else 'bad'}", i % 2) for i in range(12)]
    yield (
        adapt_sst2,
        adapt_sst2.Job(adapt_sst2.SMOKE, encoder, tiny_checkpoints.tokenizer(), examples, examples, examples),
    )
    _forget()


def _forget() -> None:
    for name in ("adapt_gsm8k", "adapt_sst2", "adapter_job", "common", "language_model"):
        sys.modules.pop(name, None)


def test_every_built_adapter_and_the_baselines_are_contenders(job, sentiment):
    built = {row.name for row in catalog.select(family="adapters") if row.status != "planned"} - {"lora"}  # PEFT's is
    answers, moods = set(job[0].contenders()), set(sentiment[0].contenders())
    assert built | {"linear probe", "lora", "rslora", "dora", "full fine-tuning"} == moods
    assert answers - built == {"lora", "rslora", "dora", "olora", "lora-ga", "full fine-tuning"}
    assert len(answers & built) == 18


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
        rank = module.rank_for(name, made.model, made.lora_parameters)
        assert abs(rank - module.LORA_RANK) <= 1, name


def test_every_row_of_the_sentiment_job_can_be_measured(sentiment):
    module, made = sentiment
    for name, build in module.contenders().items():
        row = module.run(made, name, build)
        assert 0 <= row["accuracy"] <= 1, name
        assert len(row["accuracy by seed"]) == made.size.seeds
        assert row["bytes saved"] > 0
        assert row["trained parameters"] > 0
        assert row.get("method", row.get("baseline")) == name


def test_the_probe_trains_the_head_alone(sentiment):
    module, made = sentiment
    assert module.run(made, "linear probe", module.probe)["trained parameters"] == 2 * 32 + 2


def test_rows_are_kept_and_only_the_missing_ones_are_measured(tmp_path, job):
    import adapter_job

    path = tmp_path / "rows.json"
    adapter_job.add_row(path, "one", {"loss": 1})
    adapter_job.add_row(path, "two", {"loss": 2})
    assert adapter_job.rows(path) == {"one": {"loss": 1}, "two": {"loss": 2}}
    script = tmp_path / "script.py"
    script.write_text(f"import sys; open({str(tmp_path / 'ran')!r}, 'a').write(' '.join(sys.argv[1:]) + ';')")
    adapter_job.each_in_its_process(str(script), ["one", "three"], path, "--smoke")
    assert (tmp_path / "ran").read_text() == "--only three --smoke;"


def test_the_search_goes_on_where_the_best_rate_is_at_an_end(job):
    from adapter_job import best_rate

    assert list(best_rate(lambda rate: abs(rate - 2.0), (1.0, 2.0, 3.0))) == [1.0, 2.0, 3.0]
    assert list(best_rate(lambda rate: abs(rate - 9.0), (1.0, 2.0, 3.0))) == [1.0, 2.0, 3.0, 9.0, 27.0]
    assert list(best_rate(lambda rate: rate if rate < 2 else float("nan"), (1.0, 2.0, 3.0))) == [1, 2, 3, 1 / 3, 1 / 9]


def test_methods_that_read_gradients_get_them(job):
    module, made = job
    model = module.fit(made, module.ours("adalora"), 1e-3, 6, made.search)["model"]
    state = model.base_model.coordinators()["default"].state
    assert sum(float(value.sum()) for name, value in state.items() if name.endswith(".mean")) > 0
