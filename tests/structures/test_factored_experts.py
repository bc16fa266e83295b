"""A bank of experts with shared factors: the same numbers and the same answers as the dense bank of its matrices."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from eckart.models import linears
from eckart.structures.factored_experts import ExpertGroup, FactoredExperts
from eckart.structures.shared_factor import SharedFactor

GROUPS = [
    ExpertGroup((0, 3, 4), (3, 2, 4), ("left", "left", "left")),
    ExpertGroup((2,), (2, 2, 1), ("left", "right", "left")),
    ExpertGroup((1, 5), (4, 3, 2), ("right", "right", "left")),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bank(dtype: torch.dtype = torch.float64) -> FactoredExperts:
    """Six experts of width 6 in a model of width 8, in three groups."""
    made = FactoredExperts(8, 6, GROUPS, nn.SiLU(), dtype=torch.float64)
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    return made.to(dtype)


def matrices(made: FactoredExperts, part: str) -> np.ndarray:
    """(E, m, n) by the definition, from the stored tensors one by one."""
    found = {}
    for group, factors in zip(made.layout, made.groups, strict=True):
        factor = getattr(factors, part)
        shared, own = factor.shared.detach().numpy().T, factor.own.detach().numpy().transpose(0, 2, 1)
        for place, member in enumerate(group.members):
            found[member] = shared @ own[place] if factor.side == "left" else own[place] @ shared
    return np.stack([found[index] for index in range(made.count)])


def by_definition(made: FactoredExperts, x: Tensor, chosen: Tensor, weights: Tensor) -> np.ndarray:
    """Token by token, with the dense matrix of every expert, in numpy."""
    gate, up, down = (matrices(made, part) for part in ("gate", "up", "down"))
    out = np.zeros(x.shape)
    for token, row in enumerate(x.numpy()):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            if expert < made.count:
                inner = gate[expert] @ row
                out[token] += weight * down[expert] @ (inner / (1 + np.exp(-inner)) * (up[expert] @ row))
    return out


def routed(tokens: int = 9, experts: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    return normal(tokens, 8, seed=8), chosen, torch.rand(tokens, 2, generator=generator).double()


def test_dense_is_the_bank_that_transformers_would_hold():
    made = bank()
    dense = made.dense()
    gate_up = np.concatenate([matrices(made, "gate"), matrices(made, "up")], axis=1)
    np.testing.assert_allclose(dense["gate_up_proj"].detach(), gate_up, atol=1e-13)
    np.testing.assert_allclose(dense["down_proj"].detach(), matrices(made, "down"), atol=1e-13)


def test_forward_is_that_of_the_dense_matrices_and_leaves_out_numbers_beyond_the_last():
    made, (x, chosen, weights) = bank(), routed()
    chosen[0, 1] = chosen[4, 0] = 6  # how transformers says that an expert is elsewhere
    np.testing.assert_allclose(made(x, chosen, weights).detach(), by_definition(made, x, chosen, weights), atol=1e-11)
    nothing = made(x[:0], chosen[:0], weights[:0])
    assert nothing.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_in_another_dtype_is_as_good_as_its_rounding(dtype):
    made, (x, chosen, weights) = bank(dtype), routed()
    x = x.to(dtype)
    found = made(x, chosen, weights.to(dtype))
    assert found.dtype == dtype
    truth = by_definition(copy.deepcopy(made).double(), x.double(), chosen, weights.to(dtype).double())
    scale = np.abs(truth).max()
    np.testing.assert_allclose(found.double().detach() / scale, truth / scale, atol=8 * torch.finfo(dtype).eps)


def test_gradients_are_those_through_the_dense_matrices():
    made, (x, chosen, weights) = bank(), routed()
    x.requires_grad_()
    inputs = [x, *made.parameters()]
    found = torch.autograd.grad(made(x, chosen, weights).square().sum(), inputs)
    dense = made.dense()
    gate, up = dense["gate_up_proj"].chunk(2, dim=1)
    y = torch.zeros_like(x)
    for slot in range(2):
        hidden = nn.functional.silu(torch.einsum("emh,th->tem", gate, x)) * torch.einsum("emh,th->tem", up, x)
        every = torch.einsum("ehm,tem->teh", dense["down_proj"], hidden)
        y = y + every[torch.arange(len(x)), chosen[:, slot]] * weights[:, slot, None]
    wanted = torch.autograd.grad(y.square().sum(), inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_no_expert_is_built_in_the_forward_pass():
    made, (x, chosen, weights) = bank(), routed(tokens=2)
    shapes = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                shapes.add(tuple(found.shape))
            return found

    with Watch(), torch.no_grad():
        made(x, chosen, weights)
    assert (2, 6) in shapes
    assert not {(6, 8), (8, 6), (6, 6, 8), (12, 8)} & shapes


def test_counts_are_those_of_the_stored_tensors():
    made = bank(torch.bfloat16)
    # left: r (m + c n), right: r (n + c m), with m = 6 and n = 8 for gate and up, turned round for down
    gate = 3 * (6 + 3 * 8) + 2 * (6 + 8) + 4 * (8 + 2 * 6)
    up = 2 * (6 + 3 * 8) + 2 * (8 + 6) + 3 * (8 + 2 * 6)
    down = 4 * (8 + 3 * 6) + 1 * (8 + 6) + 2 * (8 + 2 * 6)
    assert made.num_parameters() == gate + up + down
    assert made.nbytes() == 2 * made.num_parameters() == sum(t.nbytes for t in made.state_dict().values())


def test_spec_and_tensors_survive_json_and_safetensors():
    made = bank(torch.float32)
    spec = json.loads(json.dumps(made.spec()))
    again = FactoredExperts.from_spec(spec, made.act_fn, device="meta", dtype=torch.float32)
    assert again.spec() == made.spec()
    assert again.layout == tuple(GROUPS)
    stored = load(save({name: t.contiguous() for name, t in made.state_dict().items()}))
    again.load_state_dict(stored, assign=True)
    x, chosen, weights = routed()
    for other in (again, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x.float(), chosen, weights), made(x.float(), chosen, weights))


def test_what_does_not_fit_is_refused():
    for groups, message in (
        ([], "groups must hold every expert from 0 on once, got "),
        ([ExpertGroup((0, 1), (1, 1, 1)), ExpertGroup((1,), (1, 1, 1))], r"once, got \[0, 1, 1\]"),
        ([ExpertGroup((0, 2), (1, 1, 1))], r"once, got \[0, 2\]"),
        ([ExpertGroup((0,), (1, 0, 1))], "sizes must be positive"),
        ([ExpertGroup((0,), (1, 1, 1), ("left", "both", "left"))], 'side "left" or "right", not .* \'both\''),
    ):
        with pytest.raises(ValueError, match=message):
            FactoredExperts(8, 6, groups, nn.SiLU())
    with pytest.raises(ValueError, match="experts need an activation, not None"):
        FactoredExperts(8, 6, GROUPS, None)
    spec = bank().spec()
    for wrong in ({"type": "low_rank"}, {"groups": [{"members": [0]}]}, {"colour": "red"}):
        with pytest.raises(ValueError, match="spec"):
            FactoredExperts.from_spec(spec | wrong, nn.SiLU())
    with pytest.raises(ValueError, match=r"spec .* wrong entries"):
        FactoredExperts.from_spec({key: value for key, value in spec.items() if key != "groups"}, nn.SiLU())


@pytest.mark.parametrize("side", ["left", "right"])
def test_factors_come_back_as_their_products(side):
    shared, own = (normal(7, 3), normal(4, 3, 5)) if side == "left" else (normal(3, 5), normal(4, 7, 3))
    factor = SharedFactor.from_factors(shared, own, side)
    products = [(shared @ one if side == "left" else one @ shared).numpy() for one in own]
    np.testing.assert_allclose(factor.dense().detach(), np.stack(products), atol=1e-13)
    x = normal(6, 5, seed=4)
    np.testing.assert_allclose(factor(x, 2).detach(), x.numpy() @ products[2].T, atol=1e-12)
    half = SharedFactor.from_factors(shared, own, side, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_its_factors_are_told_from_a_bank_that_could_be_treated():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": bank(), "linear": nn.Linear(4, 4)})])})
    found = linears(model)
    assert [ref.name for ref in found.linears] == ["layers.0.linear"]
    assert found.skipped
    assert all("factored already" in skipped.reason for skipped in found.skipped), found.skipped
