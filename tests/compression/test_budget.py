from __future__ import annotations

import pytest
import torch

import tiny_models
from eckart.compression import Budget, compress
from eckart.compression.budget import kinds_of
from eckart.linalg import allocate, energy_rank, num_parameters, rank_for_ratio
from eckart.linalg.allocate import Matrix
from eckart.models.evaluate import model_bytes

SHAPES = {"layers.0.a": (40, 30), "layers.0.b": (30, 64), "layers.1.a": (40, 30), "layers.1.b": (20, 20)}
SPECTRA = {name: 0.9 ** torch.arange(min(shape)).double() for name, shape in SHAPES.items()}


def stored(ranks: dict[str, int], form: str) -> int:
    return sum(
        m * n if ranks[name] == min(m, n) else num_parameters(m, n, ranks[name], form)
        for name, (m, n) in SHAPES.items()
    )


@pytest.mark.parametrize(
    ("given", "unit", "text"),
    [
        ({}, "ratio", "ratio 0.2"),
        ({"ratio": 0.5}, "ratio", "ratio 0.5"),
        ({"rank": 7}, "rank", "rank 7"),
        ({"bytes": 1e6}, "bytes", "bytes 1e+06"),
        ({"energy": 0.9}, "energy", "energy 0.9"),
    ],
)
def test_one_unit(given, unit, text):
    budget = Budget.of(**given)
    assert budget.unit == unit
    assert str(budget) == text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0.2, "rank": 3}, "give one budget, not ratio and rank"),
        ({"ratio": 0.0}, r"ratio must lie between 0 and 1 \(the fraction of parameters to remove\), not 0.0"),
        ({"ratio": 1.0}, "ratio must lie between 0 and 1"),
        ({"ratio": -0.5}, "ratio must lie between 0 and 1"),
        ({"ratio": float("nan")}, "ratio must be a finite number, not nan"),
        ({"energy": 0}, r"energy must lie between 0 and 1 \(the fraction of energy to keep\), not 0"),
        ({"energy": 1}, "energy must lie between 0 and 1"),
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"rank": 2.5}, "rank must be a whole number of at least 1, not 2.5"),
        ({"bytes": 0}, "bytes must be positive, not 0"),
        ({"bytes": -5}, "bytes must be positive, not -5"),
        ({"bytes": float("inf")}, "bytes must be a finite number, not inf"),
    ],
)
def test_what_is_no_budget(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        Budget.of(**given)
    assert "\n" not in str(caught.value)


def test_when_spectra_are_needed():
    for given in ({"ratio": 0.2}, {"bytes": 1e4}):
        assert not Budget.of(**given).needs_spectra("uniform")
        assert Budget.of(**given).needs_spectra("threshold")
    assert Budget.of(energy=0.5).needs_spectra("uniform")
    assert not Budget.of(rank=5).needs_spectra("threshold")


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_ratio_is_the_fraction_removed(ratio, form):
    ranks = Budget.of(ratio=ratio).ranks(SHAPES, policy="uniform", form=form)
    assert ranks == {name: rank_for_ratio(*shape, ratio, form) for name, shape in SHAPES.items()}
    assert stored(ranks, form) <= (1 - ratio) * sum(m * n for m, n in SHAPES.values())


@pytest.mark.parametrize("policy", ["threshold", "svd-llm-v2", "welore"])
def test_policies_are_those_of_allocate(policy):
    kinds = kinds_of(list(SHAPES))
    ranks = Budget.of(ratio=0.4).ranks(SHAPES, policy=policy, form="pivoted", spectra=SPECTRA, kinds=kinds)
    matrices = [Matrix(name, shape, SPECTRA[name], kinds[name]) for name, shape in SHAPES.items()]
    assert ranks == allocate(matrices, 0.4, policy=policy, form="pivoted")


def test_kinds_leave_out_the_numbers_of_blocks():
    names = ["model.layers.0.q_proj", "model.layers.11.q_proj", "h.3.mlp.c_fc"]
    assert list(kinds_of(names).values()) == ["model.layers.q_proj", "model.layers.q_proj", "h.mlp.c_fc"]


@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_one_rank_for_all_and_dense_from_break_even_on(form):
    ranks = Budget.of(rank=19).ranks(SHAPES, policy="uniform", form=form)
    # Plain: 19 (40 + 30) > 40 * 30, so it would cost more than the matrix.
    factored = {"layers.0.b": 19} if form == "plain" else {}
    if form == "pivoted":
        factored = dict.fromkeys(SHAPES, 19)
    assert ranks == {name: factored.get(name, min(shape)) for name, shape in SHAPES.items()}
    assert set(Budget.of(rank=500).ranks(SHAPES, policy="uniform", form=form).values()) == {30, 20}


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.9999])
def test_energy_is_kept_in_every_matrix(energy):
    ranks = Budget.of(energy=energy).ranks(SHAPES, policy="uniform", form="pivoted", spectra=SPECTRA)
    for name, shape in SHAPES.items():
        wanted = energy_rank(SPECTRA[name], energy)
        assert ranks[name] == (wanted if wanted < min(shape) else min(shape))
    zero = {name: torch.zeros(min(shape)) for name, shape in SHAPES.items()}
    nothing = Budget.of(energy=energy).ranks(SHAPES, policy="uniform", form="pivoted", spectra=zero)
    assert set(nothing.values()) == {1}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_bytes_are_those_of_the_whole_model(form, size):
    selected = sum(m * n for m, n in SHAPES.values())
    model = (selected + 5000) * size
    for wanted in (0.5 * selected * size + 5000 * size, 0.8 * selected * size + 5000 * size):
        ranks = Budget.of(bytes=wanted).ranks(
            SHAPES, policy="uniform", form=form, model_bytes=model, bytes_per_parameter=size
        )
        indexes = sum(4 * min(shape) for shape in SHAPES.values()) if form == "pivoted" else 0
        reached = (5000 + stored(ranks, form)) * size + indexes
        assert wanted * 0.93 < reached <= wanted


@pytest.mark.parametrize("value", [100, 5000 * 4, 10**9])
def test_bytes_that_cannot_be_reached(value):
    model = (sum(m * n for m, n in SHAPES.values()) + 5000) * 4
    with pytest.raises(ValueError, match=r"bytes cannot be reached") as caught:
        Budget.of(bytes=value).ranks(SHAPES, policy="uniform", form="pivoted", model_bytes=model)
    assert "\n" not in str(caught.value)
    assert f"{value:,} bytes" in str(caught.value)


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize(("dtype", "family"), [(torch.float32, "llama"), (torch.bfloat16, "opt")])
def test_a_model_ends_up_below_the_bytes_asked_for(dtype, family, form):
    model = tiny_models.FAMILIES[family]().to(dtype)
    before = model_bytes(model)
    wanted = 0.85 * before
    result = compress(model, "svd", bytes=wanted, form=form, progress=False)
    assert result.bytes == (before, model_bytes(model))
    assert 0.9 * wanted < result.bytes[1] <= wanted
