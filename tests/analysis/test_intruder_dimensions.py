"""Intruder dimensions: the closed forms of planted directions, LAPACK's cosines, and adapters merged on the fly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import eckart
from eckart import analyze
from eckart.analysis.intruder_dimensions import correction, leading, random_cosine
from eckart.linalg import SingularBasis
from eckart.models import linears
from model_state import assert_unchanged, snapshot
from tiny_models import FAMILIES, low_rank


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm()


def _planted(m: int = 200, n: int = 120) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W0, W = W0 + 2 s_1 u vᵀ for a random u off the ten leading directions of W0, and u."""
    w0 = _draw(m, n)
    left = torch.linalg.svd(w0, full_matrices=False)[0]
    u = _draw(m, 1, seed=1)
    u = _unit(u - left[:, :10] @ (left[:, :10].mT @ u))
    return w0, w0 + 2 * torch.linalg.matrix_norm(w0, 2) * u @ _unit(_draw(1, n, seed=2)), u


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)])
def test_cosines_equal_two_full_decompositions(shape):
    w0 = _draw(*shape)
    w = w0 + 0.5 * _draw(*shape, seed=1)
    u0 = torch.linalg.svd(w0, full_matrices=False)[0]
    u, s, _ = torch.linalg.svd(w, full_matrices=False)
    found = leading(w, SingularBasis(w0), top=10)
    assert torch.allclose(found.cosines, (u.mT @ u0).abs().amax(1)[:10], atol=1e-8)
    assert torch.allclose(found.s, s[:10])
    sweep = [len(found.intruders(t)) for t in (0.2, 0.5, 0.9)]
    assert sweep == [int(((u.mT @ u0).abs().amax(1)[:10] < t).sum()) for t in (0.2, 0.5, 0.9)]


def test_no_change_has_no_intruders_and_signs_do_not_count():
    w0 = _draw(50, 30)
    for basis in (SingularBasis(w0), SingularBasis(-w0)):
        found = leading(w0, basis)
        assert torch.allclose(found.cosines, torch.ones(10, dtype=w0.dtype), atol=1e-6)
        assert len(found.intruders(0.999)) == 0


def test_permuting_the_basis_makes_intruders():
    w0 = _draw(150, 100)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    assert len(leading(w0[order], SingularBasis(w0)).intruders(0.5)) == 10
    # on the input side alone it does not: left directions are what is looked at
    assert len(leading(w0[:, order[order < 100]], SingularBasis(w0)).intruders(0.999)) == 0


def test_a_planted_direction_is_the_only_intruder_and_the_first():
    w0, w, u = _planted()
    basis = SingularBasis(w0)
    found = leading(w, basis)
    # the card's figures for a Gaussian of this size: 0.29, and max |u·u0| = 0.23
    reachable = float(basis.left_products(u).abs().max())
    assert reachable < float(found.cosines[0]) < 0.4
    assert found.intruders(0.5).tolist() == [0]
    assert float(found.cosines[1:].min()) > 0.6
    assert float(abs(found.u[:, 0] @ u[:, 0])) > 0.9


def test_falling_in_rank_is_no_intrusion():
    s = torch.arange(30, 0, -1.0, dtype=torch.float64)
    w0, w = torch.diag(s), torch.diag(s.flip(0) * torch.linspace(1, 1.2, 30, dtype=torch.float64))
    assert torch.allclose(leading(w, SingularBasis(w0)).cosines, torch.ones(10, dtype=s.dtype))


def test_the_reduction_is_the_closed_form():
    w0, w, _ = _planted()
    found = leading(w, SingularBasis(w0))
    s, v = found.s[0], found.vh[0]
    for scale in (1.0, 0.75, 0.5, 0.0, 2.0):
        left, right = correction(found, scale=scale)
        new = w + left @ right
        assert float((new - w).norm()) == pytest.approx(abs(1 - scale) * float(s), abs=1e-9)
        # the larger the scale, the less is removed
        assert torch.allclose(new @ v, scale * s * found.u[:, 0], atol=1e-8)
    assert torch.equal(w + correction(found, threshold=1e-3, scale=0.0)[0] @ correction(found, 1e-3, 0.0)[1], w)


def test_near_equal_values_are_judged_by_the_space_that_they_span():
    """A rotation inside a pair of equal singular values lowers the plain cosine and not the robust one."""
    s = torch.tensor([5.0, 5.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    w0 = torch.diag(torch.cat([s, s / 100]))
    turn = torch.eye(10, dtype=torch.float64)
    c = math.sqrt(0.5)
    turn[:2, :2] = torch.tensor([[c, -c], [c, c]])
    w = turn @ torch.diag(torch.cat([s * torch.tensor([1.02, 1.0, 1, 1, 1]), s / 100]))
    found = leading(w, SingularBasis(w0), top=3)
    assert found.cosines[:2].tolist() == pytest.approx([c, c], abs=1e-6)
    assert found.robust.tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    apart = leading(w, SingularBasis(torch.diag(torch.cat([s + torch.tensor([1, 0, 0, 0, 0]), s / 100]))), top=3)
    assert apart.robust[:2].tolist() == pytest.approx([c, c], abs=1e-6)


def test_directions_that_a_weight_does_not_have_do_not_count():
    w0, low = _draw(40, 30), _draw(40, 3) @ _draw(3, 30, seed=1)
    assert len(leading(low, SingularBasis(w0)).cosines) == 3
    assert len(leading(torch.zeros(4, 3), SingularBasis(w0[:4, :3])).cosines) == 0
    # no pre-trained direction is near where there is none
    assert leading(w0, SingularBasis(torch.zeros(40, 30))).cosines.tolist() == [0] * 10


def test_random_directions_reach_the_floor():
    basis = SingularBasis(_draw(400, 400))
    u = torch.nn.functional.normalize(_draw(400, 200, seed=4), dim=0)
    reached = float(basis.left_products(u).abs().amax(1).median())
    assert reached == pytest.approx(random_cosine((400, 400)), rel=0.15)
    assert random_cosine((768, 768)) == pytest.approx(0.13, abs=0.005)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_left_side_is_the_output_side_however_the_weight_is_stored(family):
    base, model = FAMILIES[family](), FAMILIES[family]()
    ref = linears(model).linears[1]
    size = torch.linalg.matrix_norm(ref.weight.detach(), 2)
    m, n = ref.shape
    with torch.no_grad():  # a new input direction on an old output direction is no intruder
        left = torch.linalg.svd(ref.weight.detach().double())[0][:, :1].float()
        ref.weight.add_(2 * size * left @ _unit(_draw(1, n)).float())
    found = analyze(model, "intruder-dimensions", base=base, progress=False)
    rows = {row["layer"]: row for row in found.rows}
    assert (rows[ref.name]["rows"], rows[ref.name]["columns"]) == (m, n)
    assert rows[ref.name]["cosines"][0] > 0.9
    changed = [name for name, row in rows.items() if min(row["cosines"]) < 1 - 1e-4]
    assert changed == [ref.name]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "dora", "eckart"])
def test_adapters_are_merged_without_changing_the_model(family, kind):
    base = FAMILIES[family]()
    if kind == "eckart":
        model = eckart.adapt(copy.deepcopy(base), "pissa", 2, progress=False)
    else:
        names = [ref.name for ref in linears(base).linears]
        config = LoraConfig(
            r=2, target_modules=names, use_dora=kind == "dora", init_lora_weights=False, fan_in_fan_out=family == "gpt2"
        )
        model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    before = snapshot(model)
    found = analyze(model, "intruder-dimensions", progress=False)
    assert_unchanged(model, before)
    assert analyze(model, "intruder-dimensions", base=base, progress=False).rows == found.rows
    merged = copy.deepcopy(model).merge_and_unload()
    plain = analyze(merged, "intruder-dimensions", base=base, progress=False)
    for one, other in zip(found.rows, plain.rows, strict=True):
        assert one["layer"] == other["layer"]
        assert one["cosines"] == pytest.approx(other["cosines"], abs=1e-4)
    assert min(min(row["cosines"]) for row in found.rows) < 0.9
    with model.disable_adapter():
        none = analyze(model, "intruder-dimensions", progress=False)
    assert min(min(row["cosines"]) for row in none.rows) > 1 - 1e-5
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into the weight; unmerge_adapter\(\) first"):
        analyze(model, "intruder-dimensions", progress=False)


def test_structures_count_as_their_product():
    base, model = FAMILIES["llama"](), FAMILIES["llama"]()
    low_rank(model, rank=4)
    found = analyze(model, "intruder-dimensions", base=base, progress=False)
    assert all(len(row["cosines"]) == 4 for row in found.rows)
    # the truncated SVD keeps the directions that it keeps
    assert min(min(row["cosines"]) for row in found.rows) > 0.99
    assert found.figures["directions"] == 4 * len(found.rows)


def test_short_outputs_are_said_to_show_nothing():
    base = FAMILIES["llama"]()
    found = analyze(copy.deepcopy(base), "intruder-dimensions", base=base, progress=False)
    blind = [row["layer"] for row in found.rows if row["random cosine"] >= 0.5]
    assert {name.rpartition(".")[2] for name in blind} == {"k_proj", "v_proj"}
    assert f"{len(blind)} weights" in found.warnings[0]
    assert found.figures["counts"] == [0] * 9
    quiet = analyze(copy.deepcopy(base), "intruder-dimensions", base=base, where="mlp.*", progress=False)
    assert quiet.warnings == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be at least 1"),
        ({"threshold": 1.5}, "a threshold is a cosine"),
        ({"sweep": (0.5, 0.0)}, "a threshold is a cosine"),
        ({"near": 1.0}, "near must be from 0"),
    ],
)
def test_bad_options(options, message):
    base = FAMILIES["llama"]()
    with pytest.raises(ValueError, match=message):
        analyze(base, "intruder-dimensions", base=base, progress=False, **options)
