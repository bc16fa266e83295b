from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_models
from eckart.compression import compress
from eckart.compression.cospadi import CoSpaDi, Layout, balanced, k_svd, layout, refitted, rocket
from eckart.compression.svd_llm import SVDLLM
from eckart.linalg import LinalgError, orthogonal_matching_pursuit
from eckart.models import Statistics, linears, save
from eckart.structures import SparseDictionary
from eckart.structures.sparse_dictionary import positions_bytes, smaller_positions
from model_state import assert_unchanged, inputs_by_hooks, snapshot

SOLVERS = ["k-svd", "rocket"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output_error(weight: torch.Tensor, x: torch.Tensor, found: torch.Tensor) -> float:
    return float((x @ (weight - found.detach().double()).T).norm())


def svd_llm_error(weight: torch.Tensor, x: torch.Tensor, rank: int) -> float:
    """The best rank-k error on the tokens, by the QR of X."""
    r = np.linalg.qr(x.numpy(), mode="r")
    return float(np.linalg.norm(np.linalg.svd(weight.numpy() @ r.T, compute_uv=False)[rank:]))


def union_of_subspaces(rows: int, width: int, count: int, dimension: int) -> torch.Tensor:
    """(rows, width): each row in one of ``count`` random subspaces, in random order."""
    bases, mixtures = normal(count, dimension, width), normal(rows, dimension, seed=1)
    which = torch.randperm(rows, generator=torch.Generator().manual_seed(2)) % count
    return torch.stack([mixture @ bases[i] for mixture, i in zip(mixtures, which, strict=True)])


# -------------------------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_on_the_tokens_is_that_in_the_whitened_space(solver):
    weight, x = normal(30, 12), normal(60, 12, seed=1) * torch.logspace(0, -2, 12)
    codes = CoSpaDi(solver, ridge=0.0).codes(weight, x.T @ x, 8, 4)
    found = (codes.d @ codes.dense()).T
    upper = torch.linalg.qr(x).R  # L of the card, with L^T L = X^T X, by another way than the method's
    whitened = float((upper @ (weight - found).T).norm())
    assert output_error(weight, x, found) == pytest.approx(whitened, rel=1e-10)
    # And what was minimised is this: the dictionary is the least-squares one for its codes.
    left = upper @ (weight - found).T
    assert float((left @ codes.dense().T).norm()) < 1e-8 * float((upper @ weight.T).norm())


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_column_has_its_own_s_atoms(solver):
    weight, x = normal(40, 16), normal(99, 16, seed=1)
    codes = CoSpaDi(solver).codes(weight, x.T @ x, 10, 3)
    assert codes.support.shape == codes.values.shape == (40, 3)
    s = codes.dense()
    assert s.shape == (10, 40)
    assert int((s != 0).sum(0).max()) <= 3
    assert len({tuple(sorted(row)) for row in codes.support.tolist()}) > 10
    assert bool((s != 0).any(1).all()), "no atom is dead"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)], ids=str)
def test_with_all_atoms_in_every_column_it_is_svd_llm(solver, shape):
    weight, x = normal(*shape), normal(80, shape[1], seed=1)
    gram = x.T @ x
    for rank in (1, 5, 11):
        codes = CoSpaDi(solver, ridge=0.0, importance=0.0).codes(weight, gram, rank, rank)
        found = (codes.d @ codes.dense()).T
        assert output_error(weight, x, found) == pytest.approx(svd_llm_error(weight, x, rank), rel=1e-7)
        low = SVDLLM().factorize(weight, Statistics(gram=gram), rank)
        torch.testing.assert_close(found, low.up @ low.down, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_directions_in_every_column_are_the_weight(solver):
    weight, x = normal(30, 12), normal(60, 12, seed=1)
    codes = CoSpaDi(solver).codes(weight, x.T @ x, 12, 12)
    torch.testing.assert_close((codes.d @ codes.dense()).T, weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("atoms", "sparsity"), [(16, 8), (12, 3), (30, 6)])
@pytest.mark.parametrize("steps", [None, 4])
def test_no_sweep_raises_the_error(atoms, sparsity, steps):
    target = normal(20, 60)
    found = [k_svd(target, atoms, sparsity, sweeps=sweeps, steps=steps) for sweeps in range(6)]
    errors = [float((target - codes.d @ codes.dense()).norm()) for codes in found]
    # The last refit is not part of the descent, and may gain more after an earlier sweep.
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-3)
    assert errors[-1] < 0.97 * errors[0]


def test_the_sweeps_start_from_rocket_and_do_better():
    target = normal(24, 90) * torch.logspace(0, -1, 24)[:, None]
    closed = rocket(target, 16, 8)
    errors = {
        sweeps: float((target - (c := k_svd(target, 16, 8, sweeps=sweeps, steps=4)).d @ c.dense()).norm())
        for sweeps in (0, 3)
    }
    # Coded anew on the same dictionary, by pursuit instead of by size, then refitted.
    coded = orthogonal_matching_pursuit(closed.d, target, 8, steps=4)
    assert errors[0] <= float(coded.error) * (1 + 1e-9)
    assert errors[3] < errors[0] < float((target - closed.d @ closed.dense()).norm())


def test_the_refit_is_least_squares():
    target, codes = normal(20, 60), rocket(normal(20, 60, seed=1), 8, 3)
    best = np.linalg.lstsq(codes.dense().numpy().T, target.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(refitted(target, codes).d, best, atol=1e-9)


def test_rocket_keeps_what_weighs_most():
    """By numpy: eigenvectors of T T^T, and for each column the s largest |c_ij| ||L^-1 b_i||^0.5."""
    weight, x = normal(30, 12), normal(60, 12, seed=1) * torch.logspace(0, -2, 12)
    upper = np.linalg.cholesky((x.T @ x).numpy()).T
    target = upper @ weight.numpy().T
    _, vectors = np.linalg.eigh(target @ target.T)
    basis = vectors[:, ::-1][:, :8]
    weighed = np.abs(basis.T @ target) * np.linalg.norm(np.linalg.inv(upper) @ basis, axis=0)[:, None] ** 0.5
    kept = np.sort(np.argsort(-weighed, axis=0)[:3].T)
    codes = CoSpaDi("rocket", ridge=0.0).codes(weight, x.T @ x, 8, 3)
    np.testing.assert_array_equal(np.sort(codes.support.numpy()), kept)
    plain = CoSpaDi("rocket", ridge=0.0, importance=0.0).codes(weight, x.T @ x, 8, 3)
    assert not torch.equal(plain.support.sort().values, codes.support.sort().values)


@pytest.mark.parametrize("x", [normal(500, 64, seed=5), torch.eye(64).double()], ids=["tokens", "no calibration"])
def test_a_union_of_subspaces_is_met_where_low_rank_of_equal_bytes_fails(x):
    weight = union_of_subspaces(256, 64, 4, 8).float()
    statistics = Statistics(gram=x.T @ x)
    structure = CoSpaDi(rho=4.0, sweeps=10).build(weight, statistics, parameters=64 * 32 + 256 * 8 + 256)
    assert structure.atoms >= 32
    rank = int(structure.nbytes() / 4 // (256 + 64)) + 1
    low = svd_llm_error(weight.double(), x, rank)
    assert output_error(weight.double(), x, structure.dense()) < 0.05 * low
    assert low > 0.4 * float((x @ weight.double().T).norm())


def test_on_one_subspace_it_ties_with_low_rank():
    weight, x = union_of_subspaces(100, 64, 1, 8), normal(200, 64, seed=5)
    codes = CoSpaDi(ridge=0.0).codes(weight, x.T @ x, 8, 8)
    scale = float((x @ weight.T).norm())
    assert output_error(weight, x, (codes.d @ codes.dense()).T) < 1e-6 * scale
    assert svd_llm_error(weight, x, 8) < 1e-6 * scale


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fewer_tokens_than_features(solver, tokens):
    """A singular Gram matrix: finite, sensible where no input tells, and exact on few tokens."""
    weight, x = normal(30, 12).float(), normal(tokens, 12, seed=1)
    structure = CoSpaDi(solver).build(weight, Statistics(gram=x.T @ x), parameters=300)
    found = structure.dense()
    assert bool(found.isfinite().all())
    assert float(found.detach().abs().max()) < 100
    assert output_error(weight.double(), x, found) <= 0.2 * float((x @ weight.double().T).norm()) + 1e-9


def test_the_scale_of_tokens_and_balance_do_not_change_the_weight():
    weight, x = normal(30, 12), normal(60, 12, seed=1)
    one, other = (CoSpaDi().codes(weight, c * x.T @ x, 8, 4) for c in (1.0, 1e16))
    torch.testing.assert_close(one.d @ one.dense(), other.d @ other.dense(), rtol=0, atol=1e-8)
    torch.testing.assert_close(one.d.norm(dim=0), one.dense().norm(dim=1), rtol=1e-9, atol=0)
    lopsided = one._replace(d=one.d * 1e9, values=one.values / 1e9)
    again = balanced(lopsided)
    torch.testing.assert_close(again.d, one.d)
    dead = balanced(one._replace(d=torch.cat([one.d[:, :7], torch.zeros(12, 1)], 1)))
    assert bool(dead.d.isfinite().all())
    assert bool(dead.values.isfinite().all())


# --------------------------------------------------------------------------------------------------- bytes and sizes


def test_the_formula_of_the_paper():
    """16-bit words: n k + s m + k m / 16 with a mask, k = (1 - gamma) m n / (n + m / rho + m / 16)."""
    m, n, gamma = 1536, 576, 0.2
    found = layout((m, n), int(2 * (1 - gamma) * m * n), 2)
    assert found.positions == "mask"
    assert found.atoms == int((1 - gamma) * m * n / (n + m / 2 + m / 16))
    assert found.sparsity == found.atoms // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rho", [1.0, 2.0, 20.0])
@pytest.mark.parametrize("stored", ["smaller", "mask", "index"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (600, 4), (4, 600)], ids=str)
def test_the_layout_fills_the_budget_and_its_bytes_are_those_of_the_tensors(shape, stored, rho, dtype):
    (m, n), item = shape, dtype.itemsize
    for share in (0.2, 0.5, 0.9):
        size = int(share * m * n * item)
        found = layout(shape, size, item, rho=rho, stored=stored)
        if found is None:
            assert item * (n + m) + m * positions_bytes(1, 1, "mask") > size
            continue
        k, s, positions = found
        assert stored in ("smaller", positions)
        structure = SparseDictionary(n, m, k, s, positions=positions, dtype=dtype)
        assert structure.nbytes() <= size
        assert structure.nbytes() == item * (n * k + m * s) + m * positions_bytes(k, s, positions)
        assert k / s <= 2 * rho + 1
        # One atom, or one nonzero a column, more does not fit.
        more = max(1, min(n, int((k + 1) / rho)))
        larger = positions_bytes(k + 1, more, smaller_positions(k + 1, more) if stored == "smaller" else stored)
        assert k == m or item * (n * (k + 1) + m * more) + m * larger > size
        if s < min(n, k):
            larger = positions_bytes(k, s + 1, smaller_positions(k, s + 1) if stored == "smaller" else stored)
            assert item * (n * k + m * (s + 1)) + m * larger > size


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_stores_no_more_than_it_may_and_nothing_where_nothing_fits(solver):
    weight, x = normal(48, 32).float(), normal(99, 32, seed=1)
    statistics = Statistics(gram=x.T @ x)
    for dtype in (torch.float32, torch.bfloat16):
        for parameters in (150, 500, 1400):
            structure = CoSpaDi(solver).build(weight.to(dtype), statistics, parameters)
            assert structure.dtype == dtype
            assert structure.nbytes() <= parameters * dtype.itemsize
            assert structure.nbytes() == sum(t.numel() * t.element_size() for t in structure.state_dict().values())
    assert CoSpaDi(solver).build(weight, statistics, 60) is None
    errors = [
        output_error(weight.double(), x, CoSpaDi(solver).build(weight, statistics, p).dense()) for p in (200, 600, 1200)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_half_precision_costs_its_rounding_and_the_room_for_positions(solver):
    weight, x = normal(48, 32).bfloat16(), normal(99, 32, seed=1)
    statistics = Statistics(gram=x.T @ x)
    half = CoSpaDi(solver).build(weight, statistics, 1190)
    wide = CoSpaDi(solver).build(weight.float(), statistics, 1190)
    assert half.positions == wide.positions == "mask"
    assert half.atoms < wide.atoms
    # With as many atoms and nonzeros as in half precision, the error is that of half precision.
    codes = CoSpaDi(solver).codes(weight.float(), x.T @ x, half.atoms, half.sparsity)
    same = output_error(weight.double(), x, (codes.d @ codes.dense()).T)
    assert output_error(weight.double(), x, half.dense()) == pytest.approx(same, rel=1e-3)


def test_a_wide_layer_may_have_more_atoms_than_inputs():
    weight, x = normal(512, 16).float(), normal(99, 16, seed=1)
    statistics = Statistics(gram=x.T @ x)
    structure = CoSpaDi().build(weight, statistics, int(0.8 * 512 * 16))
    assert structure.atoms > 16
    limited = CoSpaDi("rocket").build(weight, statistics, int(0.8 * 512 * 16))
    assert limited.atoms == 16  # there are no more eigenvectors
    assert limited.sparsity / limited.atoms > structure.sparsity / structure.atoms


# -------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("positions", ["mask", "index"])
def test_codes_may_come_in_any_order(positions):
    dictionary, values = normal(5, 300), normal(7, 4, seed=1)
    index = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(i))[:4] for i in range(7)])
    layer = SparseDictionary.from_codes(dictionary, index, values, positions=positions)
    wanted = np.zeros((7, 300))
    for row in range(7):
        for place, value in zip(index[row].tolist(), values[row].tolist(), strict=True):
            wanted[row, place] = value
    np.testing.assert_array_equal(layer.codes().detach(), wanted)
    assert layer.get_buffer(positions).dtype == (torch.uint8 if positions == "mask" else torch.int16)
    assert layer.get_buffer(positions).shape == ((7, 38) if positions == "mask" else (7, 4))


@pytest.mark.parametrize("positions", ["mask", "index"])
def test_forward_never_holds_the_matrix(positions):
    shapes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                shapes.add(tuple(out.shape))
            return out

    index = torch.arange(4).expand(30, -1)
    layer = SparseDictionary.from_codes(normal(20, 9), index, normal(30, 4), positions=positions)
    with Watch(), torch.no_grad():
        layer(normal(3, 20))
    assert (3, 30) in shapes
    assert not shapes & {(30, 20), (20, 30)}


def test_codes_that_do_not_fit_are_refused():
    d, index, values = normal(4, 3), torch.tensor([[0, 2], [1, 2]]), normal(2, 2)
    for wrong, message in (
        ((d, index[:1], values), r"must be \(n, k\), \(m, s\) and \(m, s\), got \(4, 3\), \(1, 2\), \(2, 2\)"),
        ((d, index + 1, values), "index must hold numbers from 0 to 2, not 1 to 3"),
        ((d, index - 1, values), "index must hold numbers from 0 to 2, not -1 to 1"),
        ((d, index * 0, values), "index names an atom twice for one output"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseDictionary.from_codes(*wrong)
    with pytest.raises(ValueError, match=r"bias must be \(2,\), got \(4,\)"):
        SparseDictionary.from_codes(d, index, values, bias=normal(4))
    with pytest.raises(ValueError, match='positions must be "mask" or "index", not \'bits\''):
        SparseDictionary.from_codes(d, index, values, positions="bits")
    with pytest.raises(ValueError, match="sparsity must be from 1 to the 3 atoms, not 4"):
        SparseDictionary(4, 2, 3, 4)
    with pytest.raises(LinalgError, match=r"hold NaN or Inf in torch.float16"):
        SparseDictionary.from_codes(d * 1e6, index, values, dtype=torch.float16)


# ----------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("options", [{}, {"solver": "rocket"}, {"positions": "index", "rho": 4.0}], ids=str)
def test_a_compressed_model_is_smaller_and_loads_with_the_same_logits(options, tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    data = [tiny_models.inputs(model, 6, 40)]
    weights = {ref.name: ref.weight.detach().double().clone() for ref in linears(model).linears}
    seen = inputs_by_hooks(model, weights, data)
    result = compress(model, "cospadi", ratio=0.3, data=data, progress=False, **options)
    assert result.bytes[1] <= result.bytes[0] - 0.3 * 4 * result.selected_parameters[0]
    for layer in result.layers:
        found = model.get_submodule(layer.name)
        assert isinstance(found, SparseDictionary)
        x, weight = seen[layer.name].double(), weights[layer.name]
        error = output_error(weight, x, found.dense()) / float((x @ weight.T).norm())
        assert layer.error == pytest.approx(error, rel=1e-3)
    save(model, tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    loaded = again.get_submodule(result.layers[0].name)
    assert isinstance(loaded, SparseDictionary)
    assert {t.dtype for t in loaded.buffers()} == {torch.uint8}


def test_at_equal_bytes_the_sweeps_beat_rocket_and_both_answer_to_the_tokens():
    errors = {}
    for name, options in {"k-svd": {}, "rocket": {"solver": "rocket", "importance": 0.0}}.items():
        model = tiny_models.FAMILIES["llama"]()
        result = compress(
            model, "cospadi", ratio=0.3, data=[tiny_models.inputs(model, 6, 40)], progress=False, **options
        )
        errors[name] = np.array([layer.error for layer in result.layers if ".0." in layer.name])
    assert (errors["k-svd"] < errors["rocket"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "lasso"}, "solver must be one of k-svd, rocket, not 'lasso'"),
        ({"positions": "bits"}, "positions must be one of smaller, mask, index, not 'bits'"),
        ({"rho": 0.5}, "rho must be a number of at least 1, not 0.5"),
        ({"ridge": -1.0}, "ridge must be a number of at least 0, not -1"),
        ({"importance": float("nan")}, "importance must be a number of at least 0, not nan"),
        ({"sweeps": -1}, "sweeps must be a whole number of at least 0, not -1"),
        ({"sweeps": None}, "sweeps must be a whole number of at least 0, not None"),
        ({"pursuit_steps": 0}, "pursuit_steps must be a whole number of at least 1, not 0"),
        ({"pursuit_steps": 1.5}, "pursuit_steps must be a whole number of at least 1, not 1.5"),
        ({"atoms": 7}, "cospadi has no option atoms; it has: solver, rho"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, message):
    model = tiny_models.FAMILIES["llama"]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        compress(model, "cospadi", ratio=0.3, data=[tiny_models.inputs(model, 2, 8)], progress=False, **options)
    assert_unchanged(model, before)
    assert CoSpaDi(pursuit_steps=None).gathers == {"gram"}
    assert layout((4, 4), 10, 4) is None
    assert layout((4, 4), 64, 4, rho=1.0) == Layout(1, 1, "index")
