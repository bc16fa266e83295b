from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from eckart import catalog
from eckart.compression import LayerMethod, ModuleMethod, WeightMethod, compress
from eckart.compression.pair import _same_weights
from eckart.compression.svd import SVD
from eckart.compression.svd_llm import SVDLLM
from eckart.linalg import energy_rank, singular_values
from eckart.models import calibrate, linears
from eckart.structures import EckartWarning, LowRank, low_rank
from model_state import assert_unchanged, snapshot

KINDS = {row.name: row.load() for row in catalog.select(family="compression") if row.target}
# Those that make two factors of a weight, and all that go through the model block by block.
METHODS = [name for name, kind in KINDS.items() if issubclass(kind, WeightMethod)]
BLOCKWISE = [name for name, kind in KINDS.items() if issubclass(kind, LayerMethod | ModuleMethod)]


@pytest.fixture
def model():
    return tiny_models.FAMILIES["llama"]()


@pytest.fixture(scope="module")
def data():
    return [tiny_models.inputs(tiny_models.FAMILIES["llama"](), 4, 20)]


def quiet(model: nn.Module, *args: Any, **options: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, *args, progress=False, **options)


# ------------------------------------------------------------------------------------------------------ what is done


def test_only_what_is_selected_is_changed(model, data):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    where = ["*.v_proj", lambda name, _: name.endswith("1.mlp.up_proj")]
    result = quiet(model, "svd-llm", ratio=0.4, data=data, where=where)
    expected = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"]
    assert [layer.name for layer in result.layers] == expected
    assert {name for name, module in model.named_modules() if isinstance(module, LowRank)} == set(expected)
    after = model.state_dict()
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in expected:
            assert torch.equal(after[name], tensor), name
    assert result.settings["where"][0] == "*.v_proj"
    assert "lambda" in result.settings["where"][1]
    assert result.selected_parameters[0] == 2 * 16 * 32 + 48 * 32
    # The rest of the model is not part of the ratio.
    assert 0.4 <= result.ratio < 0.5


def test_a_head_that_is_asked_for_is_reported(model):
    result = quiet(model, "svd", ratio=0.3, where=["lm_head", "*.q_proj"])
    assert result.skipped == ["lm_head: outside the repeated blocks (4,096 parameters)"]
    assert len(result.layers) == 2


def test_what_cannot_be_treated_is_reported():
    moe = tiny_models.FAMILIES["mixtral"]()
    result = quiet(moe, "svd", ratio=0.3)
    assert len(result.layers) == 8
    assert any("experts" in line and "bank of matrices" in line for line in result.skipped)


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("method", METHODS)
def test_the_result_says_what_was_done(model, data, method, form):
    refs = {ref.name: ref.shape for ref in linears(model).linears}
    before = sum(p.numel() for p in model.parameters())
    result = quiet(model, method, ratio=0.3, data=data, form=form)
    assert result.verb == "compress"
    assert result.method == method
    assert result.model is model
    after = sum(p.numel() for p in model.parameters())
    assert result.parameters == (before, after)
    assert [layer.name for layer in result.layers] == list(refs)
    assert result.selected_parameters == (
        sum(m * n for m, n in refs.values()),
        sum(layer.parameters for layer in result.layers),
    )
    assert 0.3 <= result.ratio < 0.36
    assert result.bytes[1] < result.bytes[0]
    for layer in result.layers:
        structure = model.get_submodule(layer.name)
        assert (layer.shape, layer.rank, layer.form) == (refs[layer.name], structure.rank, structure.form)
        assert layer.form == form
        assert layer.parameters == structure.num_parameters()
        assert 0 < layer.error < 1
    assert result.seconds > 0
    assert result.warnings == []
    assert result.worst(1)[0].error == max(layer.error for layer in result.layers)
    loaded = json.loads(json.dumps(result.to_dict()))
    assert loaded["ratio"] == result.ratio
    assert len(loaded["layers"]) == 14
    assert f"{result.method}: {result.ratio:.1%} of the selected weights removed, 14 layers factored" in str(result)
    (entry,) = model.config.quantization_config.history
    assert entry == {"verb": "compress", "method": method, **result.settings, "ratio": result.ratio}
    assert entry["budget"] == {"ratio": 0.3}
    json.dumps(model.config.to_dict())


def test_the_defaults_are_pifa_and_a_fifth(model, data):
    result = quiet(model, data=data)
    assert (result.method, result.settings["budget"]) == ("pifa", {"ratio": 0.2})
    assert {layer.form for layer in result.layers} == {"pivoted"}


@pytest.mark.parametrize(("form", "rank"), [("pivoted", 32), ("plain", 20), ("plain", 10**9)])
def test_a_rank_above_break_even_stays_dense_and_says_so(model, form, rank):
    before = snapshot(model)
    with pytest.warns(
        EckartWarning, match=r"q_proj.*stay dense: the chosen rank would not make them smaller"
    ) as caught:
        result = compress(model, "svd", rank=rank, form=form, where="*.[qo]_proj", progress=False)
    assert "and 1 more" in str(caught[0].message)
    assert [str(warning.message) for warning in caught] == result.warnings
    assert {layer.form for layer in result.layers} == {"dense"}
    assert {layer.error for layer in result.layers} == {0.0}
    assert (result.ratio, result.bytes[0]) == (0.0, result.bytes[1])
    assert_unchanged(model, before)


def test_a_mixture_of_dense_and_factored(model):
    """k and v are 16 x 32: at rank 15 the pivoted form saves, at rank 16 it does not."""
    result = quiet(model, "svd", rank=16)
    dense = {layer.name.rpartition(".")[2] for layer in result.layers if layer.form == "dense"}
    assert dense == {"k_proj", "v_proj"}
    assert {layer.rank for layer in result.layers} == {16}


@pytest.mark.parametrize("method", BLOCKWISE)
def test_the_same_call_gives_the_same_bits(data, method):
    one, two = (tiny_models.FAMILIES["llama"]() for _ in range(2))
    torch.manual_seed(1)
    quiet(one, method, ratio=0.3, data=data)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    quiet(two, method, ratio=0.3, data=data)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_change_the_result(data, method):
    one, two = (tiny_models.FAMILIES["llama"]() for _ in range(2))
    quiet(one, method, ratio=0.3, data=data, allocation="threshold")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        quiet(two, method, ratio=0.3, data=data, allocation="threshold")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(linears(one).linears, linears(two).linears, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-5)


def test_mode_gradients_hooks_and_ties_are_kept(data):
    model = tiny_models.FAMILIES["opt"]().train()
    model.model.decoder.layers[0].eval()
    model.model.decoder.layers[1].fc1.requires_grad_(False)
    calls: list[str] = []
    handle = model.model.decoder.layers[1].fc2.register_forward_hook(lambda *_: calls.append("fc2"))
    modes = {name: module.training for name, module in model.named_modules()}
    quiet(model, "pifa", ratio=0.3, data=data)
    assert {name: model.get_submodule(name).training for name in modes} == modes
    assert not any(p.requires_grad for p in model.model.decoder.layers[1].fc1.parameters())
    assert all(p.requires_grad for p in model.model.decoder.layers[0].fc1.parameters())
    assert all(p.grad is None for p in model.parameters())
    calls.clear()
    tiny_models.logits(model)
    assert calls == ["fc2"]
    handle.remove()
    tiny_models.logits(model)
    assert calls == ["fc2"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("method", BLOCKWISE)
def test_what_is_compressed_in_inference_mode_can_be_trained(data, method):
    one, two = (tiny_models.FAMILIES["llama"]() for _ in range(2))
    with torch.inference_mode():
        quiet(one, method, ratio=0.3, data=data)
    quiet(two, method, ratio=0.3, data=data)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    one(**data[0], labels=data[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in one.parameters())


def test_a_method_with_its_options_is_the_same_by_name(data):
    one, two = (tiny_models.FAMILIES["llama"]() for _ in range(2))
    first = quiet(one, "svd-llm", ratio=0.3, data=data, whitening="cholesky")
    second = quiet(two, SVDLLM("cholesky"), ratio=0.3, data=data)
    assert first.method == second.method == "svd-llm"
    assert first.settings == second.settings
    assert first.settings["options"] == {"whitening": "cholesky", "update": False}
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize(("method", "needs"), [("svd-llm", "gram"), ("asvd", "absmean"), ("fwsvd", "fisher")])
def test_one_calibration_serves_several_compressions(data, method, needs):
    dense = tiny_models.FAMILIES["llama"]()
    statistics = calibrate(dense, data, [needs], progress=False)
    for ratio in (0.2, 0.5):
        one, two = (tiny_models.FAMILIES["llama"]() for _ in range(2))
        quiet(one, method, ratio=ratio, data=data)
        quiet(two, method, ratio=ratio, statistics=statistics)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_default_text_goes_through_the_tokenizer(model):
    asked: list[int] = []

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        asked.append(len(text))
        return {"input_ids": [3 + ord(letter) % 100 for letter in text[: 2 * 512]]}

    result = quiet(tiny_models.FAMILIES["gpt_neox"](), "svd", ratio=0.3, tokenizer=tokenizer)
    assert not asked, "no data is needed, so none is read"
    result = quiet(model, "asvd", ratio=0.3, tokenizer=tokenizer)
    assert asked
    assert len(result.layers) == 14


@pytest.mark.parametrize("allocation", ["uniform", "threshold", "svd-llm-v2", "welore", "fisher"])
@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_share_a_budget_meets_it(model, data, method, allocation):
    result = quiet(model, method, ratio=0.4, data=data, allocation=allocation)
    assert 0.4 <= result.ratio < 0.46
    ranks = {layer.rank for layer in result.layers if layer.shape == (48, 32)}
    assert (len(ranks) == 1) == (allocation == "uniform")


def test_energy_is_kept_in_the_measure_of_the_method(data):
    for method in ("svd", "svd-llm"):
        model = tiny_models.FAMILIES["llama"]()
        weights = {ref.name: ref.weight.detach().clone() for ref in linears(model).linears}
        grams = calibrate(model, data, progress=False)
        result = quiet(model, method, energy=0.9, data=data)
        for layer in result.layers:
            scaled = weights[layer.name].double()
            if method == "svd-llm":
                scaled = scaled @ torch.linalg.cholesky(grams[layer.name].gram)
            assert layer.rank == energy_rank(singular_values(scaled), 0.9)
            assert layer.error == pytest.approx((1 - 0.9) ** 0.5, abs=0.06)


# ---------------------------------------------------------------------------------------------------------- warnings


def test_layers_that_rounding_forces_into_plain_factors_are_named_and_within_budget(model, monkeypatch):
    """A weight of rank four, but for its own rounding, leaves no truncation error to hide rounding in."""
    monkeypatch.setattr(low_rank, "ROUNDING_FACTOR", 0.0)
    for ref in linears(model.bfloat16()).linears:
        factors = SVD().factorize(ref.weight.detach().double(), None, 4)
        ref.weight.data.copy_(factors.up @ factors.down)
    with pytest.warns(
        EckartWarning, match="are stored as plain factors of a lower rank: rounding would cost"
    ) as caught:
        result = compress(model, "svd", ratio=0.3, progress=False)
    assert len(caught) == len(result.warnings) == 1
    assert "q_proj" in result.warnings[0]
    assert "plain" in {layer.form for layer in result.layers}
    assert result.ratio >= 0.3


def test_warnings_of_others_are_not_swallowed(model):
    @dataclass(frozen=True)
    class Talks(SVD):
        def factorize(self, weight: Tensor, statistics: Any, rank: int) -> Any:
            warnings.warn("mind the gap", FutureWarning, stacklevel=1)
            return super().factorize(weight, statistics, rank)

    with pytest.warns(FutureWarning, match="mind the gap"):
        result = compress(model, Talks(), ratio=0.3, progress=False)
    assert result.warnings == []


# --------------------------------------------------------------------------------------------------------- the pair


def test_the_dense_block_that_is_kept_shares_its_weights(model):
    block = model.model.layers[0]
    copy = _same_weights(block)
    assert copy is not block
    assert [p.data_ptr() for p in copy.parameters()] == [p.data_ptr() for p in block.parameters()]
    kept = copy.mlp.up_proj
    block.mlp.up_proj = nn.Identity()
    assert copy.mlp.up_proj is kept
