from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

import tiny_models
from eckart.compression import compress
from eckart.compression.dense_sparse_sizes import Sizes, parse_pattern, sizes_for, sizes_of_pattern
from eckart.compression.dsformer import DSFormer, factorise, structure_of
from eckart.compression.straight_through import StraightThrough, attach, freeze, pull
from eckart.linalg import LinalgError
from eckart.models import Statistics, linears, save
from eckart.structures import BlockSparseDictionary, SemiStructuredDictionary, Structure
from eckart.structures.semi_structured_dictionary import position_bits
from model_state import assert_unchanged, inputs_by_hooks, snapshot


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tail(weight: torch.Tensor, rank: int) -> float:
    return float(np.linalg.norm(np.linalg.svd(weight.numpy(), compute_uv=False)[rank:]))


# ---------------------------------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("shape", [(32, 20), (20, 32), (24, 24)], ids=str)
def test_with_all_atoms_it_is_the_best_low_rank_approximation(shape):
    weight = normal(*shape)
    found = structure_of(factorise(weight, Sizes(atoms=6, sparsity=6, block=4))).dense()
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose(found.detach(), (u[:, :6] * s[:6]) @ vh[:6], atol=1e-9)


@pytest.mark.parametrize("block", [1, 4])
def test_each_block_has_its_atoms_and_the_least_squares_values_on_them(block):
    weight, sizes = normal(24, 18), Sizes(atoms=9, sparsity=3, block=block)
    layer = structure_of(factorise(weight, sizes))
    codes, d = layer.codes().detach(), layer.dictionary.detach()
    used = codes != 0
    assert (used.sum(1) == 3).all()
    assert (used.unflatten(0, (-1, block)) == used.unflatten(0, (-1, block))[:, :1]).all()
    for row, code in zip(weight, codes, strict=True):  # an output at a time, by numpy's own solver
        support = code.nonzero()[:, 0]
        best = np.linalg.lstsq(d[:, support].numpy(), row.numpy(), rcond=None)[0]
        np.testing.assert_allclose(code[support], best, atol=1e-9)
        np.testing.assert_allclose(d[:, support].T @ (row - d @ code), 0, atol=1e-9)


def test_it_never_loses_to_low_rank_of_as_many_directions_as_an_output_uses():
    weight = normal(32, 24) * 0.85 ** torch.arange(24)
    for sparsity, block in itertools.product((2, 5, 8), (1, 4, 16)):
        found = factorise(weight, Sizes(atoms=16, sparsity=sparsity, block=block))
        assert float(found.error) <= tail(weight, sparsity) * (1 + 1e-9)


def test_a_union_of_subspaces_is_met_where_low_rank_of_the_same_size_is_not():
    """Eight blocks of outputs, each in its own plane: D holds all planes, low rank has only a few directions."""
    planes, mixtures = normal(8, 64, 2), normal(8, 2, 16, seed=1)
    weight = torch.cat([(plane @ mixture).T for plane, mixture in zip(planes, mixtures, strict=True)])
    sizes = Sizes(atoms=16, sparsity=2, block=16)
    numbers = sizes.numbers(128, 64, 8)
    error = float(factorise(weight, sizes).error)
    rank = int(numbers // (128 + 64))  # plain factors
    pivoted = next(k for k in range(64, 0, -1) if k * (128 + 64 - k) <= numbers)
    assert rank == 6
    assert pivoted == 6
    assert error < 1e-9 * tail(weight, pivoted)


def test_the_stored_bytes_are_those_of_the_formula():
    weight = normal(48, 40).float()
    for sizes in (Sizes(30, 7, 8), Sizes(12, 12, 1), Sizes(40, 1, 48)):
        layer = structure_of(factorise(weight, sizes, sweeps=1))
        assert layer.num_parameters() == 40 * sizes.atoms + 48 * sizes.sparsity
        assert layer.nbytes() == 4 * layer.num_parameters() + 48 // sizes.block * sizes.sparsity
        assert layer.nbytes() == 4 * sizes.numbers(48, 40, 4)


@pytest.mark.parametrize(("overcomplete", "block"), [(4.0, 16), (2.0, 1), (1.0, 5), (3.0, 3)])
@pytest.mark.parametrize("shape", [(48, 40), (40, 48), (600, 300)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_sizes_fill_the_budget_and_stay_within(shape, overcomplete, block, itemsize):
    for parameters in (shape[0] * shape[1] * share // 10 for share in (2, 5, 8)):
        sizes = sizes_for(*shape, parameters, overcomplete=overcomplete, block=block, itemsize=itemsize)
        assert sizes.numbers(*shape, itemsize) <= parameters
        assert shape[0] % sizes.block == 0
        assert sizes.block <= block
        assert sizes.sparsity <= sizes.atoms <= min(shape)
        more = Sizes(sizes.atoms + 1, sizes.sparsity, sizes.block)
        assert sizes.atoms == min(shape) or more.numbers(*shape, itemsize) > parameters
    assert sizes_for(*shape, min(shape) // 2) is None


def test_calibrated_is_the_error_of_the_outputs():
    weight, x = normal(32, 24), normal(200, 24, seed=1) * 0.7 ** torch.arange(24)
    sizes = Sizes(atoms=10, sparsity=4, block=4)
    found = factorise(weight, sizes, gram=x.T @ x)
    blind = factorise(weight, sizes)
    lost, blindly = (float((x @ (weight - f.reconstruct().mT).T).norm()) for f in (found, blind))
    assert lost == pytest.approx(float(found.error), rel=1e-9)
    assert lost < 0.7 * blindly
    full = factorise(weight, Sizes(5, 5, 4), gram=x.T @ x).reconstruct().mT
    assert float((x @ (weight - full).T).norm()) == pytest.approx(tail(x @ weight.T, 5), rel=1e-9)
    silent = factorise(weight, sizes, gram=torch.zeros(24, 24))
    assert torch.equal(silent.atoms, blind.atoms)


def test_options_are_checked():
    for options, message in (
        ({"overcomplete": 0.5}, "overcomplete is atoms a nonzero, at least 1, not 0.5; usual are 2 to 4"),
        ({"block": 0}, "block must be a whole number of at least 1, not 0"),
        ({"sweeps": -1}, "sweeps must be a whole number of at least 0, not -1"),
        ({"sweeps": 1.5}, "sweeps must be a whole number of at least 0, not 1.5"),
        ({"calibrated": "yes"}, "calibrated must be true or false, not 'yes'"),
        ({"pattern": "4:2"}, "pattern must be N:M with 1 <= N <= M <= 256, such as \"2:4\", not '4:2'"),
        ({"pattern": 24}, "pattern must be N:M .* not 24"),
        ({"pattern": "2:4", "block": 1}, "a pattern says how many atoms an output uses: leave out overcomplete"),
    ):
        with pytest.raises(ValueError, match=message):
            DSFormer(**options)
    assert DSFormer().gathers == frozenset()
    assert DSFormer(calibrated=True).gathers == {"gram"}


def test_forward_never_builds_the_dense_matrix_nor_for_one_token_the_zeros(monkeypatch):
    layer = DSFormer(block=4).build(normal(32, 24), Statistics(), 400)
    x = normal(5, 24, seed=1)
    expected = x @ layer.dense().T
    monkeypatch.setattr(BlockSparseDictionary, "dense", lambda self: pytest.fail("the dense matrix was built"))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    monkeypatch.setattr(BlockSparseDictionary, "codes", lambda self: pytest.fail("the zeros were stored"))
    for token in (x[0], x[:1], x[None, :1]):
        torch.testing.assert_close(layer(token), expected[0].expand(*token.shape[:-1], 32), rtol=0, atol=1e-12)


def test_a_structure_refuses_what_does_not_fit():
    d, index, values = normal(5, 3), torch.tensor([[0, 2]]), normal(1, 2, 4)
    for arguments, message in (
        ((d, index.T, values), r"must be \(n, k\), \(m / c, s\) and \(m / c, s, c\)"),
        ((d, index + 1, values), "index must hold numbers from 0 to 2, not 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockSparseDictionary.from_codes(*arguments)
    with pytest.raises(ValueError, match=r"bias must be \(4,\)"):
        BlockSparseDictionary.from_codes(d, index, values, bias=torch.ones(5))
    with pytest.raises(ValueError, match="block must divide the 8 outputs, not 3"):
        BlockSparseDictionary(4, 8, 4, 2, block=3)
    with pytest.raises(ValueError, match="sparsity must be from 1 to the 4 atoms, not 5"):
        BlockSparseDictionary(4, 8, 4, 5)
    with pytest.raises(RuntimeError, match="hold NaN or Inf"):
        BlockSparseDictionary.from_codes(d * 1e6, index, values, dtype=torch.float16)


# ------------------------------------------------------------------------------------------------------- N of every M


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_each_output_uses_n_of_every_m_atoms_with_the_least_squares_values(pattern, calibrated):
    weight, x = normal(30, 24), normal(90, 24, seed=1) * 0.8 ** torch.arange(24)
    kept, group = pattern
    method = DSFormer(pattern=f"{kept}:{group}", calibrated=calibrated)
    layer = method.build(weight, Statistics(gram=x.T @ x), parameters=30 * 24 * 8 // 10)
    assert isinstance(layer, SemiStructuredDictionary)
    codes, d = layer.codes().detach(), layer.dictionary.detach()
    assert ((codes != 0).unflatten(1, (-1, group)).sum(2) == kept).all()
    seen = x if calibrated else torch.eye(24).double()
    for row, code in zip(weight, codes, strict=True):  # an output at a time, by numpy's own solver
        support = code.nonzero()[:, 0]
        best = np.linalg.lstsq((seen @ d[:, support]).numpy(), (seen @ row).numpy(), rcond=None)[0]
        np.testing.assert_allclose(code[support], best, atol=1e-8)


def test_it_never_loses_to_low_rank_of_as_many_directions_with_a_pattern_either():
    weight = normal(32, 24) * 0.85 ** torch.arange(24)
    for pattern in ((1, 2), (2, 4), (3, 4), (4, 4)):
        sizes = Sizes(16, 16 * pattern[0] // pattern[1], 1, pattern)
        error = float(factorise(weight, sizes).error)
        assert error <= tail(weight, sizes.sparsity) * (1 + 1e-9)
        if pattern == (4, 4):
            assert error == pytest.approx(tail(weight, 16), rel=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "5:32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bytes_with_a_pattern_are_those_of_the_formula_and_fill_the_budget(pattern, dtype):
    m, n, itemsize = 64, 96, dtype.itemsize
    budget = m * n * 7 // 10
    kept, group = parse_pattern(pattern)
    sizes = sizes_of_pattern(m, n, budget, (kept, group), itemsize=itemsize)
    layer = DSFormer(pattern=pattern, sweeps=0).build(normal(m, n).to(dtype), Statistics(), budget).to(dtype)
    k, s = sizes.atoms, sizes.sparsity
    assert (layer.atoms, layer.sparsity) == (k, s) == (k, k // group * kept)
    bits = {4: 2, 8: 4, 32: 8}[group]
    assert bits == position_bits(group)
    assert layer.nbytes() == itemsize * (n * k + m * s) + m * -(-s * bits // 8)
    assert layer.nbytes() <= itemsize * budget
    larger = k + group
    assert larger > min(m, n) or itemsize * (n * larger + m * (s + kept)) + m * -(-(s + kept) * bits // 8) > (
        itemsize * budget
    )
    assert sizes_of_pattern(m, n, n * group - 1, (kept, group)) is None


def test_codes_with_a_pattern_may_come_in_any_order_and_must_keep_to_it():
    d, values = normal(5, 8), normal(2, 4, seed=1)
    index = torch.tensor([[7, 0, 3, 4], [5, 1, 6, 2]])
    layer = SemiStructuredDictionary.from_codes(d, index, values, (2, 4))
    wanted = np.zeros((2, 8))
    for row, places in enumerate(index.tolist()):
        wanted[row, places] = values[row]
    np.testing.assert_array_equal(layer.codes().detach(), wanted)
    assert layer.positions.dtype == torch.uint8
    # Positions 0, 3 and 0, 3 of the first output, two bits each from the lowest.
    assert layer.positions[:, 0].tolist() == [0b11001100, 0b10011001]
    for arguments, message in (
        ((d, torch.tensor([[0, 1, 2, 4]] * 2), values, (2, 4)), "index must name 2 of each 4 neighbouring atoms"),
        ((d, index[:, :2], values[:, :2], (2, 4)), "index must name 2 of each 4 neighbouring atoms"),
        ((d, index, values, (2, 3)), r"M dividing the 8 atoms, not \(2, 3\)"),
        ((d, index, values, (5, 4)), r"1 <= N <= M <= 256 .* not \(5, 4\)"),
        ((d, index + 1, values, (2, 4)), "index must hold numbers from 0 to 7, not 1 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            SemiStructuredDictionary.from_codes(*arguments)
    with pytest.raises(LinalgError, match="hold NaN or Inf"):
        SemiStructuredDictionary.from_codes(d * 1e6, index, values, (2, 4), dtype=torch.float16)


def test_a_model_with_a_pattern_is_smaller_and_loads_with_the_same_logits(tmp_path):
    save(tiny_models.FAMILIES["llama"](), tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    result = compress(model, "dsformer", ratio=0.3, pattern="2:4", progress=False)
    assert result.bytes[1] < result.bytes[0]
    layers = [model.get_submodule(layer.name) for layer in result.layers]
    assert all(isinstance(layer, SemiStructuredDictionary) for layer in layers)
    for layer in layers:
        assert layer.nbytes() <= 0.7 * 2 * layer.in_features * layer.out_features
    save(model, tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_compressed_model_is_smaller_and_loads_with_the_same_logits(family, calibrated, tmp_path):
    model = tiny_models.FAMILIES[family]()
    dense = {ref.name: ref.weight.detach().clone() for ref in linears(model).linears}
    data = [tiny_models.inputs(model, 6, 20)]
    seen = inputs_by_hooks(model, dense, data)
    result = compress(
        model, "dsformer", ratio=0.3, data=data if calibrated else None, calibrated=calibrated, block=4, progress=False
    )
    assert result.bytes[1] < result.bytes[0]
    assert result.ratio >= 0.3
    for layer in result.layers:
        structure = model.get_submodule(layer.name)
        assert isinstance(structure, BlockSparseDictionary)
        x = seen[layer.name] if calibrated else torch.eye(structure.in_features)
        found = structure.dense().detach()
        lost, whole = ((x @ w.T).norm() for w in (dense[layer.name] - found, dense[layer.name]))
        assert layer.error == pytest.approx(float(lost / whole), rel=1e-3)
    logits = tiny_models.logits(model)
    save(model, tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(tiny_models.logits(again), logits)


# ----------------------------------------------------------------------------------- training through the factors


def layer_of(weight: torch.Tensor, **options: int) -> tuple[nn.Linear, StraightThrough]:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    layer.weight.data = weight.clone()
    factoriser = StraightThrough(layer.weight, Sizes(atoms=8, sparsity=3, block=4), **options)
    parametrize.register_parametrization(layer, "weight", factoriser)
    return layer, factoriser


def test_the_output_is_of_the_factors_and_the_gradient_is_theirs():
    weight, x, seen = normal(16, 12), normal(5, 12, seed=1), normal(5, 16, seed=2)
    layer, factoriser = layer_of(weight)
    y = layer(x)
    approximation = factoriser.structure().dense().detach()
    assert float((approximation - weight).norm()) > 0.1
    torch.testing.assert_close(y, x @ approximation.T + layer.bias, rtol=0, atol=1e-12)
    (y * seen).sum().backward()
    found = layer.parametrizations.weight.original.grad
    torch.testing.assert_close(found, seen.T @ x, rtol=0, atol=1e-13)  # dL/dŴ by hand
    gradient = normal(16, 12, seed=3)
    found.zero_()
    layer.weight.backward(gradient)
    assert torch.equal(found, gradient)


def test_the_factors_stay_until_the_weight_changes_and_no_step_from_there_is_worse():
    layer, factoriser = layer_of(normal(16, 12), sweeps=1)
    first, steps = layer.weight.clone(), factoriser.steps
    assert torch.equal(layer.weight, first)
    assert factoriser.steps == steps
    original = layer.parametrizations.weight.original
    errors = []
    for _ in range(6):
        with torch.no_grad():
            original.mul_(1.0)  # the same numbers, written anew: a step of the factoriser and nothing else
        errors.append(float((layer.weight - original).detach().norm()))
    assert factoriser.steps == steps + 6
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_a_refresh_starts_anew_and_keeps_the_better():
    weight = normal(16, 12)
    layer, factoriser = layer_of(weight, refresh=1, sweeps=20)
    original = layer.parametrizations.weight.original
    other = normal(16, 12, seed=5)
    with torch.no_grad():
        original.copy_(other)
    error = float((layer.weight - original).detach().norm())
    assert error <= float(factorise(other, factoriser.sizes, sweeps=20).error) * (1 + 1e-9)
    stale, _ = layer_of(weight, refresh=0)
    with torch.no_grad():
        stale.parametrizations.weight.original.copy_(other)
    assert error < float((stale.weight - other).detach().norm())


def test_the_pull_is_the_squared_distance_and_points_to_the_factors():
    model = tiny_models.of_weights(normal(16, 12), normal(12, 16, seed=1))
    with pytest.raises(ValueError, match=r"attach\(model\) first"):
        pull(model)
    attach(model, 0.5, block=4)
    loss = pull(model)
    loss.backward()
    expected = 0.0
    for ref in linears(model).linears:
        original = ref.module.parametrizations.weight.original
        lost = (original - ref.module.weight).detach()
        expected += float(lost.square().sum())
        torch.testing.assert_close(original.grad, 2 * lost)
    assert float(loss.detach()) == pytest.approx(expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_then_freezing_keeps_the_answers_and_drops_the_weights(family, tmp_path):
    model = tiny_models.FAMILIES[family]()
    before = sum(p.numel() for p in model.parameters())
    names = attach(model, 0.5, where="*mlp*", block=4)
    assert len(names) == (6 if family == "llama" else 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch = tiny_models.inputs(model, 4, 12)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    logits = tiny_models.logits(model)
    assert freeze(model) == names
    assert all(isinstance(model.get_submodule(name), BlockSparseDictionary) for name in names)
    assert sum(p.numel() for p in model.parameters()) < 0.9 * before
    torch.testing.assert_close(tiny_models.logits(model), logits, rtol=0, atol=1e-4)
    save(model, tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(tiny_models.logits(again), tiny_models.logits(model), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"attach\(model\) first"):
        freeze(model)


def test_attaching_is_refused_before_anything_is_changed():
    model = tiny_models.FAMILIES["llama"]()
    before = snapshot(model)
    for arguments, message in (
        ({"ratio": 1.0}, "ratio must lie between 0 and 1"),
        ({"ratio": 0.999}, r"layers.0.self_attn.q_proj \(32, 32\) is too small for ratio 0.999; leave it out"),
        ({"calibrated": True}, "calibrated=True is for compress"),
        ({"pattern": "2:4"}, "pattern= is for compress"),
        ({"block": 0}, "block must be a whole number"),
        ({"refresh": -1}, "refresh is a number of steps"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, **arguments)
    assert_unchanged(model, before)
    attach(model, 0.5, where="*.0.mlp.up_proj")
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj is parametrized already"):
        attach(model, 0.5, where="*.mlp.up_proj")
    assert not isinstance(model.model.layers[1].mlp.up_proj, Structure)
