"""MoDeGPT against matrices written out: projections of a dense model, least squares on the tokens, and an SVD."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from eckart.compression import compress
from eckart.compression.modegpt import MoDeGPT, best_coordinates, second_moment, value_maps
from eckart.models import Statistics, calibrate, export_dense, linears, load, save
from eckart.models.geometry import geometry_of
from eckart.models.parts import AttentionPart, parts
from eckart.models.select import LinearRef
from eckart.structures import Dense, EckartWarning
from model_state import assert_unchanged, inputs_by_hooks, snapshot


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quiet(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, *args, progress=False, **options)


def family(name: str):
    if name == "qwen2":
        return tiny_models._text("qwen2", "Qwen2")().double()
    if name == "llama with biases":
        return tiny_models._text("llama", "Llama", attention_bias=True, mlp_bias=True)().double()
    return tiny_models.FAMILIES[name]().double()


def parts_and_tokens(model, kind: str):
    """The first part of a kind, statistics for it, and the tokens that each of its linears sees."""
    batch = tiny_models.inputs(model, 8, 20)
    found, _ = parts(model, linears(model).linears)
    part = next(p for p in found if isinstance(p, AttentionPart) == (kind == "attention"))
    names = [ref.name for ref in part.linears]
    statistics = calibrate(model, [batch], MoDeGPT.needs, progress=False)
    with torch.no_grad():
        return part, statistics, inputs_by_hooks(model, names, [batch])


def size_of(part) -> int:
    return sum(ref.in_features * ref.out_features for ref in part.linears)


# ------------------------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("bias", [False, True])
def test_second_moments_are_those_of_the_outputs(bias):
    layer, x = torch.nn.Linear(5, 7, bias=bias).double(), normal(30, 5) + 1
    y = layer(x).detach()
    known = Statistics(count=30, gram=x.T @ x, mean=x.mean(0))
    torch.testing.assert_close(second_moment(LinearRef("", layer, "linear"), known), y.T @ y / 30)


def test_the_pairs_that_are_kept_carry_the_most():
    queries, keys = normal(4, 8).square(), normal(2, 8, seed=1).square()
    scores = [sum(float(queries[h, i] * keys[h // 2, i]) for h in range(4)) for i in range(8)]
    assert best_coordinates(queries, keys, 3, rotary=False) == sorted(sorted(range(8), key=lambda i: -scores[i])[:3])
    pairs = sorted(sorted(range(4), key=lambda i: -scores[i] - scores[i + 4])[:2])
    assert best_coordinates(queries, keys, 4, rotary=True) == [*pairs, *(pair + 4 for pair in pairs)]
    assert best_coordinates(queries, keys, 8, rotary=True) == list(range(8))


def test_what_is_lost_of_the_scores_is_what_was_dropped():
    q, k = normal(20, 8), normal(20, 8, seed=1)
    kept = best_coordinates(q.square().mean(0)[None], k.square().mean(0)[None], 5, rotary=False)
    dropped = [i for i in range(8) if i not in kept]
    lost = float((q @ k.T - q[:, kept] @ k[:, kept].T).norm())
    assert 0 < lost <= sum(float(q[:, i].norm() * k[:, i].norm()) for i in dropped)


@pytest.mark.parametrize("group", [1, 3])
def test_values_are_the_best_of_their_rank(group):
    """The tail of svd(C^1/2 W_V [W_O,1 ... W_O,g]), with C of the inputs, as in the paper."""
    x, value = normal(60, 16, seed=1), normal(6, 16, seed=2)
    readers = normal(group * 12, 6, seed=3)
    moments, vectors = np.linalg.eigh((x.T @ x / 60).numpy())
    root = vectors @ np.diag(np.sqrt(moments)) @ vectors.T
    product = root @ value.numpy().T @ readers.numpy().T
    s = np.linalg.svd(product, compute_uv=False)
    moment = value @ (x.T @ x / 60) @ value.T
    for rank in range(1, 7):
        down, up = value_maps(moment, readers, rank)
        narrow = root @ (value.T @ down @ up.T @ readers.T).numpy()
        assert np.linalg.norm(product - narrow) == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-9, abs=1e-8)


def test_values_that_lie_in_a_plane_need_two_coordinates():
    plane = normal(6, 2)
    down, up = value_maps(plane @ plane.T, normal(9, 6, seed=1), 2)
    torch.testing.assert_close(up @ (down.T @ plane), plane, rtol=0, atol=1e-6)
    down, up = value_maps(torch.zeros(6, 6).double(), normal(9, 6, seed=1), 2)
    assert not bool(down.any() or up.any())


# -------------------------------------------------------------------------------------------------------- one part


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "llama with biases"])
def test_the_output_of_an_mlp_is_refitted_by_least_squares(name):
    part, statistics, tokens = parts_and_tokens(family(name), "mlp")
    h, weight = tokens[part.output.name], part.output.weight.detach()
    width = part.width * 2 // 3
    size = width * (size_of(part) // part.width)
    change = MoDeGPT().compress(part, statistics, size, "pivoted")
    gram = (h.T @ h / len(h)).numpy()
    penalty = 1e-2 * np.trace(gram) / len(gram)
    scores = np.diag(gram @ np.linalg.inv(gram + penalty * np.eye(len(gram))))
    kept = np.sort(np.argsort(-scores)[:width])
    new = change.structures[part.output.name]
    truth, residual, *_ = np.linalg.lstsq(h[:, kept].numpy(), (h @ weight.T).numpy(), rcond=None)
    loss = float((h[:, kept] @ new.dense().T - h @ weight.T).norm())
    assert loss == pytest.approx(float(np.sqrt(residual.sum())), rel=1e-4)
    assert change.errors[part.output.name] == pytest.approx(loss / float((h @ weight.T).norm()), rel=1e-9)
    np.testing.assert_allclose(new.dense().detach(), truth.T, atol=1e-3)
    for ref in part.inputs:
        assert change.structures[ref.name].dense().equal(ref.weight[kept])
        assert ref.bias is None or change.structures[ref.name].bias.equal(ref.bias[kept])
    assert new.bias is None if part.output.bias is None else new.bias.equal(part.output.bias)
    plain = MoDeGPT(refit=False).compress(part, statistics, size, "pivoted").structures[part.output.name]
    assert plain.dense().equal(weight[:, kept])
    assert float((h[:, kept] @ plain.dense().T - h @ weight.T).norm()) > 1.05 * loss


def test_an_mlp_whose_channels_span_less_loses_nothing():
    part, statistics, _ = parts_and_tokens(family("llama"), "mlp")
    h = normal(200, 10) @ normal(10, 48, seed=1)
    statistics[part.output.name] = Statistics(count=200, gram=h.T @ h)
    change = MoDeGPT(ridge=1e-6).compress(part, statistics, size_of(part) // 2, "pivoted")
    assert change.errors[part.output.name] < 1e-5


@pytest.mark.parametrize("name", ["llama", "opt", "qwen2", "llama with biases"])
def test_attention_with_narrow_heads_is_the_dense_one_projected(name):
    """Zeros for the coordinates of queries and keys that go, and v -> Q P^T v, in a copy of the dense model."""
    model, whole = family(name), family(name)
    batch = tiny_models.inputs(model, 8, 20)
    result = quiet(model, "modegpt", data=[batch], ratio=0.5, where="*.self_attn.*", allocation="uniform")
    assert 0.5 <= result.ratio < 0.51
    tokens = calibrate(whole, [batch], ["gram", "mean"], progress=False)
    found, _ = parts(whole, linears(whole).linears)
    for part in [p for p in found if isinstance(p, AttentionPart)]:
        moments = {r.name: second_moment(r, tokens[r.name]) for r in (part.query, part.key, part.value)}
        squares = [moments[r.name].diagonal().reshape(-1, 8) for r in (part.query, part.key)]
        kept = best_coordinates(*squares, 4, rotary=part.rotary)
        geometry = geometry_of(model.get_submodule(part.name))
        assert geometry.attributes == {"head_dim": 4}
        assert geometry.rotary == (tuple(kept) if part.rotary else None)
        group = part.heads // part.kv_heads
        with torch.no_grad():
            readers = part.output.weight.clone()
            for ref in (part.query, part.key):
                for tensor in (ref.weight, *([] if ref.bias is None else [ref.bias])):
                    tensor.unflatten(0, (-1, 8))[:, [i for i in range(8) if i not in kept]] = 0
            for head in range(part.kv_heads):
                rows = slice(8 * head, 8 * head + 8)
                mine = readers[:, 8 * head * group : 8 * (head + 1) * group].reshape(-1, 8)
                down, up = value_maps(moments[part.value.name][rows, rows], mine, 4)
                part.value.weight[rows] = up @ down.T @ part.value.weight[rows]
                if part.value.bias is not None:
                    part.value.bias[rows] = up @ down.T @ part.value.bias[rows]
    torch.testing.assert_close(tiny_models.logits(model), tiny_models.logits(whole), rtol=0, atol=1e-9)
    lost = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in model.parameters())
    assert lost == result.parameters[0] - result.parameters[1]


def test_options():
    for ridge in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="ridge must be positive"):
            MoDeGPT(ridge=ridge)


# ---------------------------------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_saved_and_loaded_by_plain_transformers_it_generates_with_its_cache(name, tmp_path):
    model = tiny_models.FAMILIES[name]()
    batch = tiny_models.inputs(model, 8, 20)
    result = quiet(model, "modegpt", data=[batch], ratio=0.4)
    assert result.bytes[1] < result.bytes[0]
    save(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    prompt = {key: value[:2, :6] for key, value in batch.items()}
    with_cache, without = (
        again.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert with_cache.tolist() == without.tolist()
    cache = again(**prompt, use_cache=True).past_key_values
    width = geometry_of(again.get_submodule(result.layers[0].name.rpartition(".")[0])).attributes["head_dim"]
    assert cache.layers[0].keys.shape[-1] == cache.layers[0].values.shape[-1] == width < 8
    assert all(isinstance(again.get_submodule(one.name), Dense) == (one.form != "dense") for one in result.layers)
    # Nothing is left to do with it but to use it.
    with pytest.raises(ValueError, match="compressed by Eckart already"):
        compress(again, "svd", progress=False)
    loaded, _ = load(tmp_path / "model")
    for source in (loaded, tmp_path / "model"):
        with pytest.raises(
            ValueError, match=r"layers\.0\.self_attn has another shape than its configuration"
        ) as caught:
            export_dense(source, tmp_path / "dense")
        assert "\n" not in str(caught.value)
    before = snapshot(loaded)
    with pytest.raises(ValueError, match="another shape"):
        loaded.dequantize()
    assert_unchanged(loaded, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_heads_that_are_normalised_are_skipped_and_reported():
    model = tiny_models.FAMILIES["qwen3"]()
    result = quiet(model, "modegpt", data=[tiny_models.inputs(model, 8, 20)], ratio=0.3)
    assert len(result.skipped) == 8
    assert all("its heads cannot lose coordinates" in line for line in result.skipped)
    assert {layer.name.split(".")[3] for layer in result.layers} == {"mlp"}


def test_a_static_cache_has_the_narrow_heads_too():
    model = tiny_models.FAMILIES["llama"]()
    batch = tiny_models.inputs(model, 8, 20)
    quiet(model, "modegpt", data=[batch], ratio=0.4)
    prompt = {key: value[:2, :6] for key, value in batch.items()}
    kinds = [
        model.generate(**prompt, max_new_tokens=6, do_sample=False, **cache)
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True})
    ]
    assert kinds[0].tolist() == kinds[1].tolist()


def test_eager_attention_gives_the_same():
    model = tiny_models.FAMILIES["llama"]()
    quiet(model, "modegpt", data=[tiny_models.inputs(model, 8, 20)], ratio=0.4)
    logits = tiny_models.logits(model)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(tiny_models.logits(model), logits, rtol=0, atol=1e-5)


def test_the_refit_helps_the_model():
    data, errors = [tiny_models.inputs(family("llama"), 16, 30)], {}
    for refit in (True, False):
        model = family("llama")
        dense = tiny_models.logits(model)
        quiet(model, MoDeGPT(refit=refit), data=data, ratio=0.3, where="*.mlp.*", allocation="uniform")
        errors[refit] = float((tiny_models.logits(model) - dense).norm())
    assert errors[True] < errors[False]
