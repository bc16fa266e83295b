"""Locally linear maps: the identity that defines them, in two precisions, against plain autograd."""

from __future__ import annotations

import pytest
import torch

from eckart import analyze
from eckart.models.detach import detached
from tiny_models import FAMILIES

FAMILIES_WITH_GATES = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3")
IDS = torch.tensor([[5, 17, 3, 60, 9, 22]])


def _last_state(model, embeddings):
    return model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, -1]


def _jacobian(output, embeddings):
    rows = [torch.autograd.grad(one, embeddings, retain_graph=True)[0][0] for one in output]
    return torch.stack(rows)  # (d, T, d)


@pytest.mark.parametrize("kind", FAMILIES_WITH_GATES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_the_maps_give_the_output_back(kind, dtype, bound):
    model = FAMILIES[kind]().to(dtype)
    found = analyze(model, "locally-linear", data=[IDS], progress=False)
    assert found.figures["error"] < bound
    assert abs(found.figures["constant"]) < max(bound, 1e-5)


@pytest.mark.parametrize("kind", FAMILIES_WITH_GATES)
def test_values_stay_and_the_jacobian_is_another_than_the_ordinary_one(kind):
    model = FAMILIES[kind]().double()
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(IDS)
    embeddings = embeddings.clone().requires_grad_()
    plain = _last_state(model, embeddings)
    with detached(model):
        held = _last_state(model, embeddings)
        detached_map = _jacobian(held, embeddings)
    # A model in float64 has norms that compute in float32; held, they keep float64.
    torch.testing.assert_close(held, plain, rtol=1e-4, atol=1e-5)
    exact = torch.einsum("otd,td->o", detached_map, embeddings[0])
    assert float((exact - held).norm() / held.norm()) < 1e-10
    ordinary = torch.einsum("otd,td->o", _jacobian(plain, embeddings), embeddings[0])
    assert float((ordinary - plain).norm() / plain.norm()) > 0.05


def test_biases_are_the_constant():
    """GPT-2 has biases and embeddings of positions: the map is affine, and the constant says by how much."""
    model = FAMILIES["gpt2"]().double()
    found = analyze(model, "locally-linear", data=[IDS], progress=False)
    assert found.figures["error"] < 1e-10
    assert abs(found.figures["constant"]) > 1e-3


def test_singular_values_are_those_of_the_map():
    model = FAMILIES["llama"]().double()
    found = analyze(model, "locally-linear", data=[IDS], progress=False)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(IDS)
    embeddings = embeddings.clone().requires_grad_()
    with detached(model):
        whole = _jacobian(_last_state(model, embeddings), embeddings)
    s = torch.linalg.svdvals(whole.flatten(1))
    row = next(row for row in found.rows if row["token"] == "all")
    assert row["largest"] == pytest.approx(float(s[0]), rel=1e-6)
    assert row["stable rank"] == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-6)
    free = analyze(model, "locally-linear", data=[IDS], matrix_free=True, progress=False)
    assert free.figures["largest"] == pytest.approx(found.figures["largest"], rel=1e-4)


def test_both_gatings_are_exact_and_differ():
    model = FAMILIES["llama"]().double()
    gate, up = (analyze(model, "locally-linear", data=[IDS], gating=one, progress=False) for one in ("gate", "up"))
    assert max(gate.figures["error"], up.figures["error"]) < 1e-10
    assert gate.figures["largest"] != pytest.approx(up.figures["largest"], rel=1e-3)
