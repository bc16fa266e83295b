from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_models
from eckart.compression import compress
from eckart.compression.contract import Factors
from eckart.compression.svd import SVD
from eckart.compression.svd_llm import SVDLLM, update_up, whitened_svd
from eckart.models import Statistics, linears
from model_state import inputs_by_hooks

FORMS = ["output", "eigen", "cholesky"]
SHAPES = [(10, 16), (16, 10), (12, 12), (1, 5), (5, 1)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(factors: Factors) -> torch.Tensor:
    return factors.up.double() @ factors.down.double()


def paper(weight: torch.Tensor, x: torch.Tensor, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """W_k and all singular values, by the QR of X instead of its Gram matrix: S^T = R, no square of X."""
    r = np.linalg.qr(x.numpy(), mode="r")
    u, s, vh = np.linalg.svd(weight.numpy() @ r.T, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ np.linalg.solve(r, vh[:rank].T).T, s


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_on_the_tokens_is_the_tail_of_the_singular_values(shape, form):
    weight, x = normal(*shape), normal(80, shape[1], seed=1)
    gram = Statistics(gram=x.T @ x)
    for rank in range(1, min(shape) + 1):
        best, s = paper(weight, x, rank)
        b = product(SVDLLM(form).factorize(weight, gram, rank))
        loss = float((x @ (weight - b).T).norm())
        assert loss == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-9, abs=1e-7)
        np.testing.assert_allclose(b, best, atol=1e-8)
    np.testing.assert_allclose(SVDLLM(form).spectrum(weight, gram), s, rtol=1e-8)


def test_both_papers_and_the_output_form_are_the_same_weight():
    weight, x = normal(14, 11), normal(60, 11, seed=1)
    v1, v2, output = (product(SVDLLM(form).factorize(weight, Statistics(gram=x.T @ x), 5)) for form in FORMS)
    torch.testing.assert_close(v1, v2, rtol=0, atol=1e-9)
    torch.testing.assert_close(v1, output, rtol=0, atol=1e-9)


def test_it_is_atomic_feature_mimicking_without_centring():
    """PCA of the layer's OUTPUTS, projected: U_k U_k^T W with U_k from the covariance of y = W x."""
    weight, x = normal(14, 11), normal(60, 11, seed=1)
    y = (x @ weight.T).numpy()
    _, vectors = np.linalg.eigh(y.T @ y)
    leading = vectors[:, -4:]
    b = product(SVDLLM().factorize(weight, Statistics(gram=x.T @ x), 4))
    np.testing.assert_allclose(b, leading @ leading.T @ weight.numpy(), atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_orthonormal_tokens_are_the_plain_svd(form):
    weight, x = normal(10, 8), torch.linalg.qr(normal(30, 8, seed=1)).Q
    b = product(SVDLLM(form).factorize(weight, Statistics(gram=x.T @ x), 3))
    torch.testing.assert_close(b, product(SVD().factorize(weight, Statistics(), 3)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_is_the_weight(shape, form):
    weight, x = normal(*shape), normal(80, shape[1], seed=1)
    b = product(SVDLLM(form).factorize(weight, Statistics(gram=x.T @ x), min(shape)))
    torch.testing.assert_close(b, weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_tokens_and_their_scale_do_not_matter(form):
    weight, x = normal(10, 8), normal(40, 8, seed=1)
    one, other = (product(SVDLLM(form).factorize(weight, Statistics(gram=c * x.T @ x), 3)) for c in (1.0, 1e24))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_fewer_tokens_than_features(form, tokens):
    """A singular Gram matrix: no loss on the tokens as soon as the rank reaches their number, and never a crash."""
    weight, x = normal(10, 8), normal(tokens, 8, seed=1)
    b = product(SVDLLM(form).factorize(weight, Statistics(gram=x.T @ x), 4))
    assert torch.isfinite(b).all()
    assert float((x @ (weight - b).T).norm()) <= 1e-5 * (1 + float((x @ weight.T).norm()))
    if tokens == 0:
        torch.testing.assert_close(b, product(SVD().factorize(weight, Statistics(), 4)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_update_on_the_same_tokens_changes_nothing(form):
    weight, x = normal(10, 8), normal(40, 8, seed=1)
    factors = SVDLLM(form).factorize(weight, Statistics(gram=x.T @ x), 3)
    again = update_up(weight, factors, x.T @ x)
    torch.testing.assert_close(again.up, factors.up.double(), rtol=0, atol=1e-10)
    assert torch.equal(again.down, factors.down.double())


def test_the_update_is_least_squares_on_the_tokens_that_arrive():
    weight, x = normal(10, 8), normal(40, 8, seed=1)
    arriving = x + 0.3 * normal(40, 8, seed=2)
    factors = SVDLLM().factorize(weight, Statistics(gram=x.T @ x), 3)
    updated = update_up(weight, factors, arriving.T @ arriving)
    z, target = arriving @ factors.down.T, arriving @ weight.T
    truth = np.linalg.lstsq(z.numpy(), target.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(updated.up, truth, atol=1e-10)
    before, after = (float((arriving @ (weight - product(f)).T).norm()) for f in (factors, updated))
    assert after < before * 0.999
    statistics = Statistics(gram=x.T @ x, compressed_gram=arriving.T @ arriving)
    through = SVDLLM(update=True).factorize(weight, statistics, 3)
    torch.testing.assert_close(product(through), product(updated), rtol=0, atol=1e-10)


def test_the_update_leaves_alone_what_no_token_tells_about():
    weight, x = normal(10, 8), normal(40, 8, seed=1)
    factors = SVDLLM().factorize(weight, Statistics(gram=x.T @ x), 3)
    nothing = update_up(weight, factors, torch.zeros(8, 8).double())
    torch.testing.assert_close(nothing.up, factors.up.double(), rtol=0, atol=0)
    one = normal(1, 8, seed=5)
    updated = product(update_up(weight, factors, one.T @ one))
    torch.testing.assert_close(one @ updated.T, one @ weight.T, rtol=0, atol=1e-9)
    # Only what that token touches has moved: a change of rank one.
    assert torch.linalg.matrix_rank(updated - product(factors), tol=1e-8) == 1


def test_options_are_checked():
    with pytest.raises(ValueError, match="whitening must be one of output, eigen, cholesky, not 'qr'"):
        SVDLLM("qr")
    with pytest.raises(ValueError, match="update must be true or false, not 'yes'"):
        SVDLLM(update="yes")
    assert SVDLLM().gathers == SVDLLM().surveys == {"gram"}
    assert not SVDLLM().sequential
    assert SVDLLM(update=True).gathers == {"gram", "compressed_gram"}
    assert SVDLLM(update=True).surveys == {"gram"}
    assert SVDLLM(update=True).sequential


def test_the_recipe_of_the_papers_works_on_float32_weights_too():
    weight, x = normal(10, 8), normal(40, 8, seed=1)
    for form in ("eigen", "cholesky"):
        factors = whitened_svd(weight.float(), x.T @ x, 3, form)
        np.testing.assert_allclose(product(factors), paper(weight, x, 3)[0], atol=1e-5)


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_every_weight_of_a_model_is_the_papers(family):
    model = tiny_models.FAMILIES[family]().double()
    data = [tiny_models.inputs(model, 6, 40)]
    weights = {ref.name: ref.weight.detach().clone() for ref in linears(model).linears}
    seen = inputs_by_hooks(model, weights, data)
    result = compress(model, "svd-llm", rank=7, data=data, progress=False)
    assert result.error_of == "output"
    for layer in result.layers:
        weight, x = weights[layer.name], seen[layer.name]
        _, s = paper(weight, x, 7)
        found = model.get_submodule(layer.name).dense().detach()
        loss = float((x @ (weight - found).T).norm())
        assert loss == pytest.approx(np.linalg.norm(s[7:]), rel=1e-6)
        # Errors are worked out in float32.
        assert layer.error == pytest.approx(np.linalg.norm(s[7:]) / np.linalg.norm(s), rel=1e-3)


def test_with_the_update_every_layer_answers_to_what_arrives():
    model = tiny_models.FAMILIES["llama"]().double()
    data = [tiny_models.inputs(model, 6, 20), tiny_models.inputs(model, 4, 15)]
    weights = {ref.name: ref.weight.detach().clone() for ref in linears(model).linears}
    dense = inputs_by_hooks(model, weights, data)
    compress(model, "svd-llm", rank=7, data=data, progress=False, update=True)
    # Layers before a layer are final when it is fitted, so its inputs in the finished model are those it was fitted to.
    arriving = inputs_by_hooks(model, weights, data)
    for name, weight in weights.items():
        x, arrived = dense[name], arriving[name]
        first = SVDLLM().factorize(weight, Statistics(gram=x.T @ x), 7)
        z, target = arrived @ first.down.T, arrived @ weight.T
        truth = np.linalg.lstsq(z.numpy(), target.numpy(), rcond=None)[0].T @ first.down.numpy()
        np.testing.assert_allclose(model.get_submodule(name).dense().detach(), truth, atol=1e-6)
