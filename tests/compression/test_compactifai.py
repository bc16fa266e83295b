from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tiny_models
from eckart.compression import compress
from eckart.compression.compactifai import (
    CompactifAI,
    balance_cores,
    bond_dimensions,
    chain_parameters,
    largest_bond,
    site_factors,
)
from eckart.linalg import LinalgError, kronecker_svd, matrix_product_operator
from eckart.models import Statistics, linears, save
from eckart.structures import MatrixProductOperator
from model_state import assert_unchanged, snapshot


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(cores: list[torch.Tensor]) -> np.ndarray:
    """The matrix of a chain, core after core by einsum: (o_1 .. o_k, i_1 .. i_k, bond) grows by one site."""
    state = np.ones((1, 1, 1))
    for core in cores:
        state = np.einsum("xya,aoib->xoyib", state, core.detach().double().numpy())
        state = state.reshape(state.shape[0] * state.shape[1], -1, state.shape[4])
    return state[:, :, 0]


def unfolding(weight: torch.Tensor, outputs: tuple[int, ...], inputs: tuple[int, ...], bond: int) -> np.ndarray:
    """(o_1 i_1 ... o_k i_k) x the rest, built index by index."""
    n = len(outputs)
    tensor = weight.numpy().reshape(*outputs, *inputs)
    order = [axis for k in range(n) for axis in (k, n + k)]
    rows = math.prod(outputs[:bond]) * math.prod(inputs[:bond])
    return tensor.transpose(order).reshape(rows, -1)


# ------------------------------------------------------------------------------------------------ sizes and budgets


@pytest.mark.parametrize("order", [2, 3, 4, 6])
@pytest.mark.parametrize("shape", [(1536, 576), (11008, 4096), (7, 5), (1, 12), (13, 1), (1, 1)], ids=str)
def test_sites_have_the_right_products_and_none_is_empty(shape, order):
    outputs, inputs = site_factors(*shape, order)
    assert (math.prod(outputs), math.prod(inputs)) == shape
    assert len(outputs) == len(inputs) <= order
    assert shape == (1, 1) or all(o * i > 1 for o, i in zip(outputs, inputs, strict=True))


def test_the_example_of_the_paper():
    """216 x 216 in three sites of 6 x 6: 2 * 36 chi + 36 chi^2 numbers instead of 46656."""
    outputs, inputs = site_factors(216, 216, 3)
    assert outputs == inputs == (6, 6, 6)
    for chi in (1, 5, 20, 35):
        structure = MatrixProductOperator.from_weight(normal(216, 216), outputs, inputs, chi)
        assert structure.num_parameters() == chain_parameters([36, 36, 36], chi) == 2 * 36 * chi + 36 * chi**2
    assert chain_parameters([36, 36, 36], 10**6) == 36**2 + 36**3 + 36**2  # bonds cannot be larger than 36


@pytest.mark.parametrize("sizes", [[36, 36, 36], [1152, 768], [35], [6, 4, 4, 9], [2, 300, 2]], ids=str)
def test_the_largest_bond_is_the_largest(sizes):
    lossless = chain_parameters(sizes, 10**9)
    for parameters in {
        0,
        1,
        sum(sizes) - 1,
        sum(sizes),
        *range(sum(sizes), lossless + 2, 1 + lossless // 40),
        lossless,
    }:
        fitting = [
            chi
            for chi in range(1, 1 + max(bond_dimensions(sizes, 10**9), default=1))
            if chain_parameters(sizes, chi) <= parameters
        ]
        found = largest_bond(sizes, parameters)
        assert (found is None) == (not fitting)
        if found is not None:
            # Beyond the largest bond there is, a larger chi is the same chain.
            assert bond_dimensions(sizes, found) == bond_dimensions(sizes, fitting[-1])


# -------------------------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (30, 7)], ids=str)
def test_a_large_enough_bond_is_the_weight(shape, order):
    weight = normal(*shape)
    outputs, inputs = site_factors(*shape, order)
    structure = MatrixProductOperator.from_weight(weight, outputs, inputs)
    np.testing.assert_allclose(by_hand(list(structure.cores)), weight, atol=1e-12)
    x = normal(5, shape[1], seed=1)
    torch.testing.assert_close(structure(x), x @ weight.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("chi", [1, 3, 8])
def test_the_error_is_within_the_discarded_singular_values(order, chi):
    """At most the tails of all unfoldings of W together, at least the largest one; for two sites they are equal."""
    weight = normal(24, 36)
    outputs, inputs = site_factors(24, 36, order)
    structure = MatrixProductOperator.from_weight(weight, outputs, inputs, chi)
    error = np.linalg.norm(weight.numpy() - by_hand(list(structure.cores)))
    spectra = [np.linalg.svd(unfolding(weight, outputs, inputs, k), compute_uv=False) for k in range(1, order)]
    tails = [np.linalg.norm(s[rank:]) for s, rank in zip(spectra, structure.ranks, strict=True)]
    assert max(tails) * (1 - 1e-9) <= error <= np.linalg.norm(tails) * (1 + 1e-9)
    if order == 2:
        assert error == pytest.approx(tails[0], rel=1e-9)


@pytest.mark.parametrize("terms", [1, 4])
def test_two_sites_are_the_nearest_sum_of_kronecker_products(terms):
    weight = normal(24, 36)
    outputs, inputs = site_factors(24, 36, 2)
    sizes = [o * i for o, i in zip(outputs, inputs, strict=True)]
    structure = CompactifAI(order=2).build(weight, Statistics(), parameters=terms * sum(sizes))
    assert structure.ranks == (terms,)
    left, right = (core.detach().numpy() for core in structure.cores)
    products = sum(np.kron(left[0, :, :, a], right[a, :, :, 0]) for a in range(terms))
    np.testing.assert_allclose(structure.dense().detach(), products, atol=1e-12)
    best = kronecker_svd(weight, terms, (outputs[0], inputs[0]))
    np.testing.assert_allclose(products, best.reconstruct(), atol=1e-10)
    # Van Loan's rearrangement, block by block: every block of W is a row.
    blocks = weight.numpy().reshape(outputs[0], outputs[1], inputs[0], inputs[1]).swapaxes(1, 2)
    tail = np.linalg.svd(blocks.reshape(sizes[0], sizes[1]), compute_uv=False)[terms:]
    assert np.linalg.norm(weight.numpy() - products) == pytest.approx(np.linalg.norm(tail), rel=1e-9)


def test_prime_sizes_are_ordinary_low_rank():
    weight = normal(31, 17)
    structure = CompactifAI(order=3).build(weight, Statistics(), parameters=5 * (31 + 17) + 3)
    assert structure.output_factors == (31, 1)
    assert structure.input_factors == (1, 17)
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose(structure.dense().detach(), (u[:, :5] * s[:5]) @ vh[:5], atol=1e-10)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_without_balance_left_cores_are_orthonormal(order):
    structure = CompactifAI(order=order, balance=False).build(normal(24, 36), Statistics(), parameters=600)
    for core in structure.cores[:-1]:
        flat = core.detach().flatten(0, 2)
        torch.testing.assert_close(flat.T @ flat, torch.eye(core.shape[3], dtype=flat.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_balance_shares_each_singular_value_between_both_sides_and_keeps_the_matrix(order):
    weight = normal(24, 36)
    outputs, inputs = site_factors(24, 36, order)
    chain = matrix_product_operator(weight, outputs, inputs, 5)
    cores = balance_cores(chain.cores)
    np.testing.assert_allclose(by_hand(cores), by_hand(list(chain.cores)), atol=1e-12)

    def contract(part: list[torch.Tensor]) -> torch.Tensor:
        """(first bond, everything, last bond)."""
        state = part[0].flatten(1, 2)
        for core in part[1:]:
            state = torch.einsum("axb,bic->axic", state, core.flatten(1, 2)).flatten(1, 2)
        return state

    for bond in range(1, order):
        before, after = contract(cores[:bond])[0], contract(cores[bond:])[..., 0]
        torch.testing.assert_close(before.norm(dim=0), after.norm(dim=1), rtol=1e-10, atol=0)
    if order == 2:
        s = np.linalg.svd(unfolding(weight, outputs, inputs, 1), compute_uv=False)[:5]
        np.testing.assert_allclose(cores[0].flatten(0, 2).norm(dim=0), np.sqrt(s), rtol=1e-10)


def test_a_weight_of_lower_rank_and_zero_weights_are_balanced_too():
    for weight in (torch.kron(normal(6, 6), normal(4, 6, seed=1)), torch.zeros(24, 36)):
        structure = CompactifAI().build(weight, Statistics(), parameters=400)
        assert all(bool(core.isfinite().all()) for core in structure.cores)
        torch.testing.assert_close(structure.dense(), weight, rtol=0, atol=1e-10)


def test_a_budget_below_one_bond_leaves_the_layer_dense():
    outputs, inputs = site_factors(24, 36, 2)
    least = sum(o * i for o, i in zip(outputs, inputs, strict=True))
    assert CompactifAI().build(normal(24, 36), Statistics(), parameters=least - 1) is None
    assert CompactifAI().build(normal(24, 36), Statistics(), parameters=least).ranks == (1,)


def test_more_parameters_are_never_worse():
    weight = normal(24, 36)
    for order in (2, 3):
        errors = [
            float((weight - CompactifAI(order=order).build(weight, Statistics(), parameters=p).dense().detach()).norm())
            for p in range(100, 864, 90)
        ]
        assert errors == sorted(errors, reverse=True)


# -------------------------------------------------------------------------------------------------------- the layer


class Sizes(TorchDispatchMode):
    """Remembers how large the tensors were that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.shapes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
            self.shapes.add(tuple(out.shape))
        return out


def test_forward_never_holds_the_matrix():
    structure = MatrixProductOperator.from_weight(normal(1024, 1024), (32, 32), (32, 32), 2)
    with Sizes() as seen, torch.no_grad():
        structure(normal(3, 1024))
    assert seen.largest <= 3 * 32 * 32 * 2 < 1024 * 1024


@pytest.mark.parametrize(
    ("outputs", "inputs", "ranks"),
    [
        ((12,), (6,), ()),
        ((6, 4), (6, 6), (20,)),
        ((2, 3, 4), (4, 3, 3), (8, 9)),
        ((2, 3, 2, 2), (3, 2, 2, 3), (6, 9, 5)),
    ],
    ids=str,
)
def test_slabs_of_rows_give_what_the_sites_give(outputs, inputs, ranks):
    """For many tokens, where the rows are made in parts: the product with the matrix by hand, and its gradients."""
    chain = MatrixProductOperator.from_weight(normal(math.prod(outputs), math.prod(inputs)), outputs, inputs, ranks)
    x = normal(500, chain.in_features, seed=1)
    by_slabs, by_sites = chain._by_slabs(x), chain._by_sites(x)
    torch.testing.assert_close(by_slabs, by_sites, rtol=0, atol=1e-12)
    np.testing.assert_allclose(by_slabs.detach().numpy(), x.numpy() @ by_hand(list(chain.cores)).T, atol=1e-11)
    target = normal(500, chain.out_features, seed=2)
    one, other = (torch.autograd.grad((y * target).sum(), list(chain.cores)) for y in (by_slabs, by_sites))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_prompt_takes_slabs_and_a_token_the_sites():
    chain = MatrixProductOperator(1024, 1024, (32, 32), (32, 32), (256,), dtype=torch.float64)
    for core in chain.cores:
        torch.nn.init.normal_(core, generator=torch.Generator().manual_seed(0))
    dense = 2 * 1024 * 1024
    assert chain.flops(1) < 20 * dense < chain.flops(100) < 4 * 100 * dense
    for tokens in (1, 100):
        with FlopCounterMode(display=False) as counter, Sizes() as seen, torch.no_grad():
            chain(normal(tokens, 1024))
        assert counter.get_total_flops() == chain.flops(tokens)
        assert seen.largest <= 32 * 32 * 256 < 1024 * 1024  # a core, an intermediate, or a slab


def test_many_tokens_are_worked_on_in_turn(monkeypatch):
    structure = MatrixProductOperator.from_weight(normal(24, 36), (6, 4), (6, 6), 5)
    x = normal(50, 36, seed=1)
    whole = structure(x)
    monkeypatch.setattr("eckart.structures.matrix_product_operator._INTERMEDIATE", 7 * structure._intermediate())
    with Sizes() as seen, torch.no_grad():
        parts = structure(x)
    assert seen.largest <= max(7 * structure._intermediate(), x.numel())
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_it_contracts_from_the_cheaper_end():
    there = MatrixProductOperator(64, 4, (1, 4), (16, 4), (3,), device="meta")
    back = MatrixProductOperator(64, 4, (4, 1), (4, 16), (3,), device="meta")
    assert there.flops(1) == back.flops(1) == 2 * (64 * 3 + 4 * 3 * 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 2), (3, 2), (1,)), r"output_factors must be positive and have the product 6, got \(2, 2\)"),
        (((2, 3), (2, 2), (1,)), r"input_factors must be positive and have the product 6, got \(2, 2\)"),
        (((-2, -3), (3, 2), (1,)), "output_factors must be positive"),
        (((2, 3), (6,), (1,)), "as many input as output factors and one positive rank between neighbours"),
        (((2, 3), (3, 2), ()), "one positive rank between neighbours"),
        (((2, 3), (3, 2), (0,)), "one positive rank between neighbours"),
    ],
)
def test_a_chain_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MatrixProductOperator(6, 6, *arguments)


def test_cores_that_do_not_fit_are_refused():
    good = [normal(1, 2, 3, 4), normal(4, 3, 2, 1)]
    for cores in ([good[0]], [good[1]], [good[0], normal(3, 3, 2, 1)]):
        with pytest.raises(ValueError, match="neighbouring cores must share a bond"):
            MatrixProductOperator.from_cores(cores)
    for cores in ([], [normal(2, 2)]):
        with pytest.raises(ValueError, match="one for each site"):
            MatrixProductOperator.from_cores(cores)
    with pytest.raises(ValueError, match=r"bias must be \(6,\), got \(5,\)"):
        MatrixProductOperator.from_cores(good, bias=normal(5))
    with pytest.raises(LinalgError, match=r"hold NaN or Inf in torch\.float16"):
        MatrixProductOperator.from_cores([good[0] * 1e6, good[1]], dtype=torch.float16)


# ----------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("order", [2, 3])
def test_a_compressed_model_is_smaller_and_loads_with_the_same_logits(order, tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    weights = {ref.name: ref.weight.detach().clone() for ref in linears(model).linears}
    result = compress(model, "compactifai", ratio=0.3, order=order, progress=False)
    assert result.bytes[1] < result.bytes[0]
    assert result.ratio >= 0.3
    for layer in result.layers:
        found = model.get_submodule(layer.name)
        assert isinstance(found, MatrixProductOperator)
        lost = weights[layer.name].numpy() - by_hand(list(found.cores))
        assert layer.error == pytest.approx(np.linalg.norm(lost) / float(weights[layer.name].norm()), rel=1e-4)
    save(model, tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    assert isinstance(again.get_submodule(result.layers[0].name), MatrixProductOperator)


def test_cores_can_be_trained_and_training_helps():
    """The start of what the paper calls healing: the loss falls when only cores move."""
    model = tiny_models.FAMILIES["llama"]()
    data = tiny_models.inputs(model, 4, 16)
    with torch.no_grad():
        wanted = model(**data).logits
    compress(model, "compactifai", ratio=0.3, progress=False)
    cores = [p for name, p in model.named_parameters() if ".cores." in name]
    optimizer = torch.optim.Adam(cores, lr=3e-3)
    losses = []
    for _ in range(15):
        loss = (model(**data).logits - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1}, "order must be a whole number of at least 2 sites, not 1"),
        ({"order": 2.5}, "order must be a whole number of at least 2 sites, not 2.5"),
        ({"order": True}, "order must be a whole number"),
        ({"balance": "yes"}, "balance must be true or false, not 'yes'"),
        ({"chi": 7}, "compactifai has no option chi; it has: order, balance"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, message):
    model = tiny_models.FAMILIES["llama"]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        compress(model, "compactifai", ratio=0.3, progress=False, **options)
    assert_unchanged(model, before)
