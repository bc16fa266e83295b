"""Gradient spectra: against SVD of the weights' gradients in float64, the card's bounds and its trap of lengths."""

from __future__ import annotations

import math

import pytest
import torch

from eckart import analyze
from eckart.analysis.gradient_spectra import example_scores, rank_examples
from eckart.linalg import effective_rank
from eckart.models import linears
from eckart.models.gradient_factors import attention_parts
from tiny_models import FAMILIES, VOCABULARY

FIGURES = ("nuclear norm", "effective rank", "frobenius")


def _example(tokens=16, prompt=6, seed=0):
    ids = torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


def _run(model, *examples, **options):
    return analyze(model, "gradient-spectra", data=list(examples), progress=False, **options)


def _twin(model, example):
    """The definition: the full gradients of the weights, by autograd, and their SVD; and the cosines."""
    model.zero_grad(set_to_none=True)
    model(**example).loss.backward()
    weights = {ref.name: ref.module.weight.grad.mT if ref.kind == "conv1d" else ref.module.weight.grad
               for ref in linears(model).linears if ref.module.weight.grad is not None}  # fmt: skip
    parts = attention_parts(model)
    grads = [torch.cat([weights[part.name][start:stop] for start, stop in part.rows]).clone() for part in parts]
    model.zero_grad(set_to_none=True)
    s = [torch.linalg.svdvals(grad) for grad in grads]
    p = [values / values.sum() for values in s]
    figures = {
        "nuclear norm": [float(values.sum()) for values in s],
        "effective rank": [math.exp(-float((v[v > 0] * v[v > 0].log()).sum())) for v in p],
        "frobenius": [float(grad.norm()) for grad in grads],
    }
    return figures, grads


def _cosine(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "vit"])
def test_figures_equal_the_svd_of_the_weights_gradients(family):
    model = FAMILIES[family]().double()
    model.config._experts_implementation = "eager"  # the fused kernel for experts has no float64
    examples = [_example(), _example(seed=1)]
    twins = [_twin(model, example) for example in examples]
    found = _run(model, *examples)
    for name in FIGURES:
        exact = torch.tensor([figures[name] for figures, _ in twins], dtype=torch.float64)
        assert found.tensors[name] == pytest.approx(exact, rel=1e-8)
        assert [row[name] for row in found.rows] == pytest.approx(exact.mean(dim=0).tolist(), rel=1e-8)
        assert found.figures[name] == pytest.approx(float(exact.mean()), rel=1e-8)
    losses = [float(model(**one).loss.detach()) for one in examples]
    assert found.tensors["loss"] == pytest.approx(torch.tensor(losses), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_cosines_equal_those_of_the_weights_gradients(family):
    model = FAMILIES[family]().double()
    _, (q0, k0, v0, o0, q1, *_) = _twin(model, _example())
    rows = _run(model, _example()).rows
    assert [row["projection"] for row in rows[:5]] == ["query", "key", "value", "output", "query"]
    assert rows[0]["cosine with partner"] == pytest.approx(_cosine(q0, o0), abs=1e-10)
    assert [row["cosine with partner"] for row in rows[1:3]] == pytest.approx([_cosine(k0, v0)] * 2, abs=1e-10)
    assert rows[0]["cosine with next layer"] == pytest.approx(_cosine(q0, q1), abs=1e-10)
    assert rows[4]["cosine with next layer"] is None
    without = _run(model, _example(), cosines=False)
    assert without.rows[0]["cosine with partner"] is None
    assert without.figures == _run(model, _example()).figures


def test_the_cards_bounds_hold():
    model = FAMILIES["qwen3"]()
    tokens = 10
    found = _run(model, _example(tokens, prompt=4))
    for row, n, r, f in zip(found.rows, *(found.tensors[name][0].tolist() for name in FIGURES), strict=True):
        assert n >= f > 0
        assert 1 <= r <= min(row["outputs"], row["inputs"], tokens) + 1e-9
        assert n <= math.sqrt(min(row["outputs"], row["inputs"], tokens)) * f * (1 + 1e-6)
    last = [row for row in found.rows if ".1." in row["layer"] and row["projection"] in ("query", "output")]
    assert all(row["effective rank"] <= 6 + 1e-9 for row in last)  # the six tokens that predict: no later layer mixes


def test_the_scale_of_the_loss_moves_the_norms_and_not_the_rank():
    model = FAMILIES["llama"]()
    plain = _run(model, _example())

    loss = model.loss_function
    model.loss_function = lambda *args, **kwargs: 1000 * loss(*args, **kwargs)
    scaled = _run(model, _example())
    assert scaled.tensors["effective rank"] == pytest.approx(plain.tensors["effective rank"], rel=1e-4)
    assert scaled.tensors["nuclear norm"] == pytest.approx(1000 * plain.tensors["nuclear norm"], rel=1e-4)


def test_float32_agrees_with_float64_and_half_precision_is_widened():
    exact = _run(FAMILIES["gemma2"]().double(), _example())
    single = _run(FAMILIES["gemma2"](), _example())
    assert single.tensors["effective rank"] == pytest.approx(exact.tensors["effective rank"], rel=1e-3)
    half = FAMILIES["gemma2"]().bfloat16()
    widened = _run(half.float(), _example())
    again = _run(FAMILIES["gemma2"]().bfloat16(), _example())
    assert again.tensors["effective rank"] == pytest.approx(widened.tensors["effective rank"], rel=1e-4)


def test_padding_batching_and_what_follows_the_answer_do_not_count():
    model = FAMILIES["llama"]()
    short, long = _example(12, seed=1), _example(16)
    alone = _run(model, short, long)
    pad = {key: torch.nn.functional.pad(value, (0, 4), value=-100 if key == "labels" else 0)
           for key, value in short.items()}  # fmt: skip
    batch = {key: torch.cat([pad[key], long[key]]) for key in pad}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 12:] = 0
    both = _run(model, batch)
    assert both.tensors["lengths"].tolist() == [[6, 12], [10, 16]]
    for name in FIGURES:
        assert both.tensors[name] == pytest.approx(alone.tensors[name], rel=1e-4)


def test_the_trap_of_lengths_is_warned_about_and_closed():
    model = FAMILIES["llama"]()
    examples = [_example(8 + 4 * i, prompt=4, seed=i) for i in range(12)]
    free = _run(model, *examples)
    assert "differ in length, from 4 to 48 tokens" in free.warnings[0]
    ranks = free.tensors["effective rank"].mean(dim=1)
    assert ranks[-1] > 2 * ranks[0]  # random tokens in a random model: nothing to be learnt
    first = _run(model, *examples, answer_tokens=4, taken="first")
    assert first.tensors["lengths"].tolist() == [[4, 8]] * 12
    assert first.warnings == []
    spread = first.tensors["effective rank"].mean(dim=1)
    assert float(spread.max() / spread.min()) < 1.5
    fewer = _run(model, *examples, answer_tokens=9)
    assert fewer.tensors["example"].tolist() == list(range(2, 12))
    assert fewer.warnings[0] == "2 examples of fewer than 9 answer tokens were left out"
    assert set(fewer.tensors["lengths"][:, 0].tolist()) == {9}


def test_drawn_tokens_are_the_same_again_and_others_for_another_seed():
    model = FAMILIES["llama"]()
    first, again = (_run(model, _example(40), answer_tokens=5) for _ in range(2))
    other = _run(model, _example(40), answer_tokens=5, seed=1)
    assert first.rows == again.rows
    assert other.rows != first.rows


def test_scores():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1000, (40, 1), generator=generator)
    better = torch.rand(40, 1, generator=generator, dtype=torch.float64)
    effective = lengths**0.5 * torch.exp(0.1 * better) * torch.tensor([[1.0, 3.0]])
    nuclear = torch.exp(-better).expand(40, 2) / lengths**0.5
    best = better[:, 0].argsort().tolist()
    assert example_scores(nuclear, effective, lengths, match="none").argsort().tolist() != best
    for score in ("effective-rank", "nuclear-norm", "both"):
        scores = example_scores(nuclear, effective, lengths, score=score)
        centred, expected = scores - scores.mean(), better[:, 0] - better.mean()
        assert float(centred @ expected / centred.norm() / expected.norm()) > 0.95
        assert abs(float(centred @ (lengths[:, 0].double().log() - lengths.double().log().mean()))) < 1e-6
    none = example_scores(nuclear, effective, lengths, score="nuclear-norm", match="none")
    assert none == pytest.approx(-nuclear.log().mean(dim=1))
    dead = torch.zeros(3, 1)
    assert example_scores(dead, dead, torch.ones(3, 1)).tolist() == [0, 0, 0]


def test_ranking_names_each_example_once_with_its_figures():
    model = FAMILIES["llama"]()
    examples = [_example(16, seed=i) for i in (0, 1, 0)]  # a duplicate stays
    found = _run(model, *examples, {**_example(), "labels": torch.full((1, 16), -100)}, match="none")
    assert "1 examples of fewer than 1 answer tokens" in found.warnings[0]
    ranked = rank_examples(found)
    assert sorted(one["example"] for one in ranked) == [0, 1, 2]
    assert [one["score"] for one in ranked] == sorted((one["score"] for one in ranked), reverse=True)
    first = next(one for one in ranked if one["example"] == 1)
    assert first["effective rank"] == pytest.approx(float(found.tensors["effective rank"][1].mean()))
    assert (first["answer tokens"], first["tokens"]) == (10, 16)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)


def test_refusals():
    model = FAMILIES["llama"]()
    for options, message in (
        ({"answer_tokens": 0}, "answer_tokens must be a number of at least 1"),
        ({"answer_tokens": "all"}, "answer_tokens must be a number"),
        ({"score": "loss"}, "score must be one of effective-rank, nuclear-norm, both"),
        ({"answer_tokens": 11}, "no example has 11 answer tokens"),
        ({"where": "*.down_proj"}, "no projection of an attention"),
    ):
        with pytest.raises(ValueError, match=message):
            _run(model, _example(), **options)
