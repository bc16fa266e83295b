"""The walk over parts of blocks: what it refuses, what it keeps, and what is left when it is interrupted."""

from __future__ import annotations

import signal
import warnings
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from eckart.compression import compress, compress_checkpoint, modules
from eckart.compression.contract import Change, ModuleMethod
from eckart.compression.lorap import LoRAP
from eckart.compression.modegpt import MoDeGPT
from eckart.linalg import LinalgError
from eckart.models import calibrate, linears
from eckart.models.geometry import geometry_of
from eckart.models.slices import rows_of_linear
from eckart.structures import Dense, EckartWarning
from model_state import assert_unchanged, snapshot


@pytest.fixture
def model():
    return tiny_models.FAMILIES["llama"]()


@pytest.fixture(scope="module")
def data():
    return [tiny_models.inputs(tiny_models.FAMILIES["llama"](), 8, 20)]


def quiet(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, *args, progress=False, **options)


def assert_refused(model, error, message, *args, **options):
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        compress(model, *args, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["modegpt", "lorap"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "threshold"}, "allocation must be uniform or block-influence, not threshold"),
        ({"allocation": "lorap"}, "allocation must be uniform or block-influence, not lorap"),
        ({"rank": 3}, "a budget in rank says nothing here; give a ratio or bytes"),
        ({"energy": 0.9}, "a budget in energy says nothing here; give a ratio or bytes"),
        ({"bytes": 10}, "10 bytes cannot be reached"),
        ({"data": None}, "needs calibration data: give data=batches"),
        ({"where": "*.q_proj"}, "finds no attention and no MLP that it can change here: is no part of attention"),
    ],
)
def test_bad_requests(model, data, name, options, message):
    assert_refused(model, ValueError, message, name, **{"data": data, **options})


@pytest.mark.parametrize("name", ["modegpt", "lorap"])
def test_nan_is_named_by_weight(model, data, name):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    assert_refused(model, ValueError, r"model\.layers\.1\.mlp\.up_proj\.weight has NaN or Inf", name, data=data)


@pytest.mark.parametrize("name", ["modegpt", "lorap"])
def test_a_checkpoint_on_disk_cannot_be_streamed(model, data, name, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=f"{name} changes attention and MLPs as wholes; it cannot be streamed"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", name, data=data, ratio=0.3, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_statistics_that_lack_something_are_refused(model, data):
    gram = calibrate(model, data, ["gram"], progress=False)
    message = r"q_proj have no 'mean'; calibrate with needs=\['gram', 'mean'\]"
    assert_refused(model, ValueError, message, "modegpt", statistics=gram, data=data)
    found = calibrate(model, data, ["meansquare"], progress=False)
    message = "lorap calibrates on what it has compressed already; statistics= is no use"
    assert_refused(model, ValueError, message, "lorap", statistics=found)


# ----------------------------------------------------------------------------------------------------------- budgets


def test_statistics_serve_several_times(data):
    models = [tiny_models.FAMILIES["llama"]() for _ in range(3)]
    statistics = calibrate(models[0], data, MoDeGPT.needs, progress=False)
    before = {name: entry.gram.clone() for name, entry in statistics.items()}
    quiet(models[0], "modegpt", statistics=statistics, ratio=0.3, allocation="uniform")
    quiet(models[1], "modegpt", statistics=statistics, ratio=0.3, allocation="uniform")
    quiet(models[2], "modegpt", data=data, ratio=0.3, allocation="uniform")
    assert all(torch.equal(statistics[name].gram, gram) for name, gram in before.items())
    logits = [tiny_models.logits(one) for one in models]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("allocation", ["uniform", "block-influence"])
@pytest.mark.parametrize("name", ["modegpt", "lorap"])
def test_the_ratio_is_kept_to_a_width(model, data, name, allocation):
    result = quiet(model, name, data=data, ratio=0.3, allocation=allocation)
    assert 0.3 <= result.ratio < 0.4  # pairs of eight coordinates
    assert result.parameters[0] - result.parameters[1] == result.selected_parameters[0] - result.selected_parameters[1]
    kept = {index: sum(x.parameters for x in result.layers if f".{index}." in x.name) for index in (0, 1)}
    assert (kept[0] == kept[1]) == (allocation == "uniform")


@pytest.mark.parametrize("name", ["modegpt", "lorap"])
def test_bytes(model, data, name):
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    result = quiet(model, name, data=data, bytes=0.8 * whole, form="plain")
    assert 0.75 * whole < result.bytes[1] <= 0.8 * whole


def test_what_is_too_narrow_stays_and_is_said(model, data):
    with pytest.warns(EckartWarning, match=r"self_attn.* stay as they are: no smaller width fits") as caught:
        result = compress(model, "modegpt", data=data, ratio=0.9, allocation="uniform", progress=False)
    assert [str(warning.message) for warning in caught] == result.warnings
    # A tenth of eight coordinates is none. That does not save the MLPs, which cannot make up for it.
    forms = {layer.name.split(".")[3]: layer.form for layer in result.layers}
    assert forms == {"self_attn": "dense", "mlp": "pruned"}
    assert {layer.rank for layer in result.layers if layer.form == "pruned"} == {int(0.1 * 48)}


def test_mlps_make_up_for_attention_that_is_too_coarse(model, data):
    """A fifth of eight coordinates goes, in pairs: 6 stay instead of 6.4, and the MLPs keep what that saved."""
    result = quiet(model, "modegpt", data=data, ratio=0.2, allocation="uniform")
    assert geometry_of(model.model.layers[0].self_attn).attributes == {"head_dim": 6}
    width = model.model.layers[0].mlp.up_proj.out_features
    assert width == (int(0.8 * 7680) - 6 * 384) // 96 > int(0.8 * 48)
    assert result.ratio == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------ what a method does wrong


@dataclass(frozen=True)
class Halves(ModuleMethod):
    """Drops the last half of an MLP's channels, and can do it wrongly."""

    fault: str = ""

    def compress(self, part, statistics, parameters, form):
        if part.name.endswith("attn"):
            return None
        if self.fault == "linalg" and ".1." in part.name:
            raise LinalgError("stop")
        rows = range(part.width if self.fault == "large" else part.width // 2)
        structures = {ref.name: rows_of_linear(ref, rows) for ref in part.inputs}
        weight = part.output.weight.detach()[:, : len(rows)]
        if self.fault == "infinite":
            weight = weight * float("inf")
        return Change({**structures, part.output.name: Dense.from_weight(weight)})


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("large", RuntimeError, r"model\.layers\.0\.mlp: Halves kept 4,608 numbers of at most 2,304"),
        ("infinite", LinalgError, r"mlp\.down_proj: the new weights do not fit in torch\.float32"),
    ],
)
def test_a_method_that_breaks_its_promise_changes_nothing(model, fault, error, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        quiet(model, Halves(fault), ratio=0.5, where="*.mlp.*")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failed_factorisation_is_named_by_part(model):
    with pytest.raises(LinalgError, match=r"^model\.layers\.1\.mlp: stop$"):
        quiet(model, Halves("linalg"), ratio=0.5, where="*.mlp.*")
    (entry,) = model.config.quantization_config.history
    assert entry["interrupted"] is True


def test_a_method_without_needs_wants_no_data(model):
    result = quiet(model, Halves(), ratio=0.5, where="*.mlp.*")
    assert result.ratio == 0.5
    assert {layer.form for layer in result.layers} == {"pruned"}
    assert {layer.rank for layer in result.layers} == {24}


# -------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", [MoDeGPT(), LoRAP()], ids=["modegpt", "lorap"])
def test_ctrl_c_between_two_linears_leaves_a_model_that_can_be_saved(family, method, monkeypatch, tmp_path):
    model = tiny_models.FAMILIES[family]().train()
    data, real, calls = [tiny_models.inputs(model, 8, 20)], modules.replace, []

    def replace(*args, **options):
        real(*args, **options)
        calls.append(args[1])
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(modules, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, method, data=data, ratio=0.5, allocation="uniform")
    assert len({name.rpartition(".")[0] for name in calls}) == 1, "one attention and nothing else"
    attention = model.get_submodule(calls[0].rpartition(".")[0])
    narrow = isinstance(method, MoDeGPT)
    assert not narrow or len(calls) == 4
    assert (geometry_of(attention) is not None) == narrow
    assert all(module.training for module in model.modules())
    changed = [ref.name for ref in linears(model).linears if ref.kind == "structure"]
    assert sorted(changed) == sorted(calls)
    (entry,) = model.config.quantization_config.history
    assert entry["interrupted"] is True
    model.eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))


def test_hooks_and_frozen_weights_stay(model, data):
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    quiet(model, "modegpt", data=data, ratio=0.5, allocation="uniform")
    seen.clear()
    tiny_models.logits(model)
    assert seen == [1]
    attention = model.model.layers[0].self_attn
    assert type(attention.k_proj) is Dense
    assert not attention.k_proj.weight.requires_grad
    assert attention.q_proj.weight.requires_grad


@pytest.mark.parametrize("name", ["modegpt", "lorap"])
def test_what_is_compressed_in_inference_mode_can_be_trained(model, data, name):
    other = tiny_models.FAMILIES["llama"]()
    with torch.inference_mode():
        quiet(model, name, ratio=0.3, data=data)
    quiet(other, name, ratio=0.3, data=data)
    assert torch.equal(tiny_models.logits(model), tiny_models.logits(other))
    model(**data[0], labels=data[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
def test_roles_for_an_allocation_are_found_in_inference_mode_too(model, data, method):
    with torch.inference_mode():
        result = quiet(model, method, ratio=0.3, data=data, allocation="lorap")
    assert result.ratio >= 0.3
