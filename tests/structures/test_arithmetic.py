"""Arithmetic of structures: exact sums, roundings whose stated error is the true one, LoRA factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.structures import Dense, LowRank, Structure, Sum, add, round_rank, to_lora


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(rank: int, seed: int = 0, m: int = 12, n: int = 9, biased: bool = True, **options: object) -> LowRank:
    up, down = random(m, rank, seed=seed), random(rank, n, seed=seed + 100)
    return LowRank.from_factors(up, down, bias=random(m, seed=seed + 200) if biased else None, **options)


def dense(seed: int = 0, m: int = 12, n: int = 9, biased: bool = True) -> Dense:
    return Dense.from_weight(random(m, n, seed=seed), bias=random(m, seed=seed + 200) if biased else None)


def mixed() -> Sum:
    total = add(dense(5), low_rank(2, 6))
    assert isinstance(total, Sum)
    return total


def best_errors(weight: Tensor) -> Tensor:
    """|W - W_k|_F for k = 0, 1, ... by Eckart-Young."""
    s = torch.linalg.svdvals(weight.double())
    return torch.stack([s[k:].norm() for k in range(len(s) + 1)])


TERMS = {
    "pivoted": lambda: low_rank(2),
    "plain": lambda: low_rank(3, 1, form="plain"),
    "rows": lambda: low_rank(2, 7, side="rows"),
    "dense": lambda: dense(2),
    "sum": mixed,
    "unbiased": lambda: low_rank(1, 3, biased=False),
    "unbiased dense": lambda: dense(4, biased=False),
}


@pytest.mark.parametrize("left", TERMS.values(), ids=TERMS.keys())
@pytest.mark.parametrize("right", TERMS.values(), ids=TERMS.keys())
def test_add_is_the_sum(left, right) -> None:
    a, b = left(), right()
    before = [t.detach().clone() for s in (a, b) for t in s.parameters()]
    total = add(a, b)
    x = random(4, 9, seed=9)
    torch.testing.assert_close(total(x), a(x) + b(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(total.dense(), a.dense() + b.dense(), rtol=0, atol=1e-12)
    biases = [s.bias for s in (a, b) if s.bias is not None]
    assert (total.bias is None) == (not biases)
    if biases:
        assert torch.equal(total.bias, sum(biases))
    with torch.no_grad():
        for parameter in total.parameters():
            parameter.zero_()
    after = [t for s in (a, b) for t in s.parameters()]
    assert all(torch.equal(t, u) for t, u in zip(before, after, strict=True))


def test_type_rank_and_form_of_a_sum() -> None:
    pivoted, plain = low_rank(2), low_rank(3, 1, form="plain")
    kinds = [(add(a, b).form, add(a, b).rank) for a, b in ((pivoted, pivoted), (pivoted, plain), (plain, plain))]
    assert kinds == [("pivoted", 4), ("plain", 5), ("plain", 6)]
    assert add(low_rank(7), low_rank(8, 1)).rank == 9  # never above full rank
    assert isinstance(add(dense(), dense(1)), Dense)
    nested = add(mixed(), mixed())
    assert isinstance(nested, Sum)
    assert [type(term) for term in nested.parts()] == [Dense, LowRank, Dense, LowRank]


def test_a_sum_is_rounded_once() -> None:
    a, b = low_rank(2, dtype=torch.bfloat16), low_rank(3, 1, dtype=torch.bfloat16)
    total = add(a, b)
    assert total.dtype == torch.bfloat16
    truth = low_rank(2, dtype=torch.bfloat16).double().dense() + low_rank(3, 1, dtype=torch.bfloat16).double().dense()
    assert (total.double().dense() - truth).norm() <= 3 * torch.finfo(torch.bfloat16).eps * truth.norm()


@pytest.mark.parametrize("other", [dense(m=9, n=12), low_rank(2).float()], ids=["shape", "dtype"])
def test_add_refuses_what_does_not_fit(other: Structure) -> None:
    with pytest.raises(ValueError, match="add needs equal"):
        add(low_rank(2), other)


@pytest.mark.parametrize("term", [*TERMS.values(), lambda: low_rank(9)], ids=[*TERMS.keys(), "full rank"])
def test_round_rank_makes_the_best_error_and_states_it(term) -> None:
    structure = term()
    weight, best = structure.dense().detach(), best_errors(structure.dense().detach())
    for rank in (1, 2, 5, 9, 20):
        layer, error = round_rank(structure, rank)
        assert layer.rank <= min(rank, 9)
        assert error == pytest.approx(float(best[min(rank, 9)]), rel=1e-10, abs=1e-12)
        assert float((layer.dense().detach() - weight).norm()) == pytest.approx(error, rel=1e-10, abs=1e-12)
        assert layer.form == getattr(structure, "form", "pivoted")
        if structure.bias is None:
            assert layer.bias is None
        else:
            assert torch.equal(layer.bias, structure.bias)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())
def test_round_rank_takes_the_smallest_rank_within_the_tolerance(term) -> None:
    structure = term()
    best = best_errors(structure.dense().detach())
    for tol in (0.9, 0.5, 0.1, 1e-10):
        layer, error = round_rank(structure, tol=tol)
        assert error <= tol * best[0]
        assert layer.rank == max(1, int((best > tol * best[0]).sum()))


def test_round_rank_of_a_graded_low_rank_matrix_is_exact_to_its_tail() -> None:
    s = torch.logspace(0, -10, 6, dtype=torch.float64)
    up = torch.linalg.qr(random(30, 6))[0] * s
    down = torch.linalg.qr(random(20, 6, seed=1))[0].T
    layer, error = round_rank(LowRank.from_factors(up, down), 3)
    assert layer.rank == 3
    assert error == pytest.approx(float(s[3:].norm()), rel=1e-8)


def test_round_rank_of_zero_and_of_half_precision() -> None:
    zero = LowRank.from_factors(torch.zeros(5, 2), torch.zeros(2, 4))
    for options in ({"rank": 1}, {"tol": 0.1}):
        layer, error = round_rank(zero, **options)
        assert (layer.rank, error) == (1, 0.0)
        assert not layer.dense().any()
    half = low_rank(4, dtype=torch.bfloat16)
    layer, error = round_rank(half, 2)
    assert layer.dtype == torch.bfloat16
    assert error == pytest.approx(float(best_errors(half.double().dense().detach())[2]), rel=1e-10)


@pytest.mark.parametrize("options", [{}, {"rank": 2, "tol": 0.1}, {"rank": 0}, {"tol": 1.0}, {"tol": -0.1}], ids=str)
def test_round_rank_refuses_impossible_requests(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="rank"):
        round_rank(low_rank(2), **options)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())
def test_lora_factors_are_the_best_and_state_their_error(term) -> None:
    structure, base = term(), random(12, 9, seed=50)
    difference = structure.dense().detach() - base
    best = best_errors(difference)
    for rank in (1, 4, 9):
        A, B, error = to_lora(structure, base, rank)
        assert (A.shape, B.shape) == ((rank, 9), (12, rank))
        assert error == pytest.approx(float(best[rank]), rel=1e-10, abs=1e-12)
        assert float((difference - B @ A).norm()) == pytest.approx(error, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_finds_the_rank_of_the_change(dtype: torch.dtype) -> None:
    base = random(12, 9, seed=50).to(dtype)
    change = LowRank.from_factors(random(12, 3), random(3, 9, seed=1), dtype=dtype)
    structure = add(Dense.from_weight(base), change)
    A, B, error = to_lora(structure, base)
    assert A.shape == (3, 9)
    assert A.dtype == B.dtype == torch.float32
    assert error <= torch.finfo(dtype).eps * base.double().norm()
    torch.testing.assert_close(B @ A, change.float().dense().detach(), rtol=0, atol=1e-5)


def test_lora_of_no_change_has_rank_one_and_no_error() -> None:
    structure = dense()
    A, B, error = to_lora(structure, structure.dense())
    assert (A.shape, B.shape, error) == ((1, 9), (12, 1), 0.0)
    assert not (B @ A).any()


def test_lora_refuses_another_shape_or_rank() -> None:
    with pytest.raises(ValueError, match=r"\(12, 9\), got \(9, 12\)"):
        to_lora(low_rank(2), random(9, 12))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        to_lora(low_rank(2), random(12, 9), 0)
