from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

import tiny_models
from eckart.compression import compress
from eckart.compression.welore import WeLoRe, kappa_for, normalised, rank_at
from eckart.linalg import Matrix, allocate
from eckart.linalg.rank_budget import welore_ranks
from eckart.models import Statistics, linears, save
from eckart.optim import factor_groups
from eckart.structures import LowRank


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectra_of(count: int = 6) -> list[torch.Tensor]:
    return [
        torch.linalg.svdvals(normal(20 + 3 * i, 24, seed=i) * 0.8 ** (i * torch.arange(24) / 5)) for i in range(count)
    ]


@pytest.mark.parametrize("shape", [(14, 10), (10, 14), (12, 12)], ids=str)
def test_the_error_is_the_tail_and_the_split_is_balanced(shape):
    weight = normal(*shape)
    s = np.linalg.svd(weight.numpy(), compute_uv=False)
    for rank in (1, 4, 10):
        factors = WeLoRe().factorize(weight, Statistics(), rank)
        lost = float((weight - factors.up @ factors.down).square().sum())
        assert lost == pytest.approx(np.square(s[rank:]).sum(), abs=1e-12)
        np.testing.assert_allclose(factors.up.T @ factors.up, np.diag(s[:rank]), atol=1e-12)
        np.testing.assert_allclose(factors.down @ factors.down.T, np.diag(s[:rank]), atol=1e-12)


@pytest.mark.parametrize("reduction", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_kappa_is_the_quantile_and_meets_the_reduction_to_one_rank(reduction):
    spectra = spectra_of()
    total = sum(len(s) for s in spectra)
    kappa = kappa_for(spectra, reduction)
    pooled = np.sort(np.concatenate([(s - s.min()) / (s.max() - s.min()) for s in (x.numpy() for x in spectra)]))
    # Each spectrum has a zero: ties there are pruned together.
    assert kappa == pytest.approx(pooled[math.ceil(reduction * total)], abs=1e-15)
    pruned = sum(len(s) - int((normalised(s) >= kappa).sum()) for s in spectra)
    assert 0 <= pruned / total - reduction <= 1 / total + 1e-12
    # Another route to the same ranks: the allocator's search.
    assert [rank_at(s, kappa) for s in spectra] == welore_ranks(spectra, reduction)


def test_ranks_fall_with_kappa_and_the_ends_are_guarded():
    (s, *_) = spectra_of()
    ranks = [rank_at(s, kappa) for kappa in np.linspace(0, 1.2, 60)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == len(s)  # the smallest is not below 0
    assert rank_at(s, 1e-12) == len(s) - 1
    assert rank_at(s, 1.0) == 1
    assert rank_at(s, 5.0) == 1
    assert kappa_for([s], 0.0) == 0.0
    assert rank_at(s, 5.0, minimum=4) == 4
    assert rank_at(s, 0.0, maximum=7) == 7
    with pytest.raises(ValueError, match=r"from 0 to below 1, not 1\.0"):
        kappa_for([s], 1.0)


def test_an_outlier_pushes_the_others_under_and_scale_does_not_count():
    (s, *_) = spectra_of()
    outlier = torch.cat([s[:1] * 100, s[1:]])
    assert rank_at(outlier, 0.1) == 1 < rank_at(s, 0.1)
    assert rank_at(outlier, 0.1, minimum=5) == 5
    assert rank_at(s * 1e6, 0.1) == rank_at(s, 0.1)
    assert normalised(torch.ones(3)).tolist() == [1, 1, 1]
    assert normalised(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_limits_are_the_papers_classes_within_the_budget():
    """Ranks worked out by hand, κ by κ: dense weights cost all of themselves."""
    spectra = spectra_of()
    shapes = [(20 + 3 * i, 24) for i in range(len(spectra))]
    matrices = [Matrix(str(i), shape, s) for i, (shape, s) in enumerate(zip(shapes, spectra, strict=True))]
    method = WeLoRe(min_ratio=0.4999, min_rank=3, max_rank=None)
    found = allocate(matrices, 0.4, policy="welore", form="plain", **method.limits)
    budget = 0.6 * sum(m * n for m, n in shapes)
    pooled = sorted({float(v) for s in spectra for v in normalised(s)})
    for kappa in pooled:
        ranks, cost = {}, 0
        for index, ((m, n), s) in enumerate(zip(shapes, spectra, strict=True)):
            pruned = len(s) - rank_at(s, kappa, minimum=3)
            low = pruned / len(s) > 0.4999 and (len(s) - pruned) * (m + n) < m * n
            ranks[str(index)] = len(s) - pruned if low else min(m, n)
            cost += ranks[str(index)] * (m + n) if low else m * n
        if cost <= budget:
            break
    assert found == ranks
    assert len({rank == min(shape) for rank, shape in zip(ranks.values(), shapes, strict=True)}) == 2


def test_options_are_checked_and_ranks_outside_of_them_are_refused():
    for options, message in (
        ({"min_ratio": 1.0}, "min_ratio is a fraction of the ranks, from 0 to below 1, not 1.0"),
        ({"min_rank": 0}, "min_rank must be a whole number of at least 1, not 0"),
        ({"min_rank": 4, "max_rank": 3}, "max_rank must be a whole number of at least 4, not 3"),
        ({"max_rank": 2.5}, "max_rank must be a whole number of at least 1, not 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            WeLoRe(**options)
    weight = normal(10, 10)
    assert WeLoRe(min_ratio=0.4999).factorize(weight, Statistics(), 5).rank == 5
    for options, rank in (({"min_ratio": 0.4999}, 6), ({"min_rank": 3}, 2), ({"max_rank": 4}, 5)):
        with pytest.raises(ValueError, match="give a budget as ratio or bytes"):
            WeLoRe(**options).factorize(weight, Statistics(), rank)
    assert WeLoRe(min_rank=20).factorize(weight, Statistics(), 10).rank == 10


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_by_default_one_threshold_rules_all_layers_and_the_model_loads_again(form, tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    for index, ref in enumerate(linears(model).linears):  # spectra of different decay
        ref.weight.data.mul_(0.9 ** (index % 4 * torch.arange(ref.in_features)))
    spectra = {ref.name: torch.linalg.svdvals(ref.weight.detach().double()) for ref in linears(model).linears}
    result = compress(model, "welore", ratio=0.3, form=form, progress=False)
    assert result.settings["allocation"] == "welore"
    assert result.ratio >= 0.3
    assert result.bytes[1] < result.bytes[0]
    ranks = {layer.name: layer.rank for layer in result.layers if layer.form != "dense"}
    kept = min(float(normalised(spectra[name])[rank - 1]) for name, rank in ranks.items() if rank > 1)
    left_out = max(float(normalised(spectra[name])[rank]) for name, rank in ranks.items())
    assert left_out < kept
    assert len(set(ranks.values())) > 3
    save(model, tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    uniform = compress(tiny_models.FAMILIES["llama"](), "welore", ratio=0.3, allocation="uniform", progress=False)
    assert uniform.settings["allocation"] == "uniform"


def test_training_the_factors_leaves_what_stayed_dense_to_the_last_bit():
    model = tiny_models.FAMILIES["llama"]()
    for index, ref in enumerate(linears(model).linears):
        ref.weight.data.mul_(0.8 ** (index % 3 * torch.arange(ref.in_features)))
    result = compress(model, "welore", ratio=0.2, form="plain", progress=False)
    dense = {layer.name for layer in result.layers if layer.form == "dense"}
    assert 0 < len(dense) < len(result.layers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for group in factor_groups(model) for _, p in group["params"]], lr=0.01)
    batch = tiny_models.inputs(model, 4, 12)
    losses = []
    for _ in range(6):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    after = model.state_dict()
    for name in dense:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    factored = [name for name, module in model.named_modules() if isinstance(module, LowRank)]
    assert all(not torch.equal(after[f"{n}.up_transposed"], before[f"{n}.up_transposed"]) for n in factored)


def test_forward_goes_through_the_factors(monkeypatch):
    model = tiny_models.FAMILIES["gpt2"]()
    compress(model, "welore", ratio=0.3, progress=False)
    expected = tiny_models.logits(model)
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("the dense matrix was built"))
    assert torch.equal(tiny_models.logits(model), expected)


def test_its_limits_hold_through_the_verb():
    model = tiny_models.FAMILIES["llama"]()
    result = compress(model, WeLoRe(min_rank=2, max_rank=9), ratio=0.5, progress=False)
    assert result.settings["allocation"] == "welore"
    assert all(2 <= layer.rank <= 9 for layer in result.layers)
    spread = tiny_models.FAMILIES["llama"]()
    split = compress(spread, WeLoRe(min_ratio=0.5), ratio=0.3, progress=False)
    half = {layer.name: min(layer.shape) / 2 for layer in split.layers}
    assert all(layer.form == "dense" or layer.rank < half[layer.name] for layer in split.layers)
    assert any(layer.form == "dense" for layer in split.layers)
