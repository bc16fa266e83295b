from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny_models
from eckart import catalog
from eckart.catalog import UnknownMethodError
from eckart.compression import WeightMethod, compress
from eckart.compression.asvd import ASVD
from eckart.linalg import LinalgError
from eckart.models import calibrate
from eckart.structures import EckartWarning, LowRank
from model_state import assert_unchanged, snapshot

# Those that read text and work on the linears of any model.
WITH_TEXT = [
    row.name
    for row in catalog.select(family="compression")
    if row.target and row.needs and getattr(row.load(), "on_linears", True)
]


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


def assert_refused(model: nn.Module, error: type[BaseException], message: str, *args: Any, **options: Any) -> None:
    """One line that says what to do, and a model as it was to the last bit."""
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        compress(model, *args, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("svdllm", {}, UnknownMethodError, "unknown method 'svdllm'; did you mean svd-llm"),
        ("qqqq", {}, UnknownMethodError, "unknown method 'qqqq'; `eckart methods` lists all"),
        (
            "cycleqd",
            {},
            ValueError,
            r"cycleqd \(merging, planned\) cannot compress a model; methods that can: afm-ctr, asvd, ",
        ),
        ("asvd", {"beta": 1}, ValueError, "asvd has no option beta; it has: alpha"),
        ("svd", {"alpha": 1}, ValueError, "svd has no option alpha; it has: none"),
        ("asvd", {"alpha": "big"}, ValueError, "asvd cannot use {'alpha': 'big'}: .*see `eckart methods asvd`"),
        ("asvd", {"alpha": 7}, ValueError, r"alpha must lie in \[0, 2\], not 7"),
        (ASVD(), {"alpha": 1}, ValueError, r"ASVD has its options already; put \['alpha'\] there"),
        ("svd", {"ratio": 0.2, "rank": 3}, ValueError, "give one budget, not ratio and rank"),
        ("svd", {"ratio": 1.2}, ValueError, "ratio must lie between 0 and 1"),
        ("svd", {"ratio": 0.999}, ValueError, "use a ratio of at most 0.9"),
        ("svd", {"rank": 0}, ValueError, "rank must be a whole number of at least 1"),
        ("svd", {"bytes": 10}, ValueError, "10 bytes cannot be reached"),
        ("svd", {"allocation": "greedy"}, ValueError, "allocation must be one of uniform, threshold, .*, not 'greedy'"),
        ("svd", {"form": "round"}, ValueError, "form must be one of plain, pivoted, not 'round'"),
        ("svd", {"where": "nothing"}, ValueError, "where='nothing' matches no layer; nearest"),
        ("svd", {"where": "lm_head"}, ValueError, "none of the selected layers can be compressed: lm_head: outside"),
        ("svd-llm", {}, ValueError, "svd-llm needs calibration data: give data=batches, or tokenizer="),
        ("svd-llm", {"data": []}, ValueError, "no data: the iterable of batches is empty"),
        ("pifa", {"data": ["text"]}, ValueError, "a batch must be a dictionary of tensors or a tensor, not str"),
        ("svd", {"energy": 0.9, "allocation": "x"}, ValueError, "allocation must be one of"),
    ],
)
def test_a_bad_request_is_refused(model, method, options, error, message):
    assert_refused(model, error, message, method, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"],
)
@pytest.mark.parametrize("method", ["svd", "pifa"])
def test_nan_and_inf_are_named_by_weight(model, data, method, name, value):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    message = f"{name} has NaN or Inf in it; repair or re-download the checkpoint"
    assert_refused(model, ValueError, message, method, data=data)
    assert_refused(model, ValueError, message, method, data=data, where="*.q_proj")


def test_a_compressed_model_is_refused(model):
    quiet(model, "svd", ratio=0.3)
    assert_refused(model, ValueError, "compressed by Eckart already; start from the dense one", "svd", ratio=0.3)


def test_a_quantized_model_is_refused(model):
    model.config.quantization_config = {"quant_method": "gptq"}
    assert_refused(model, ValueError, "the checkpoint is quantized with gptq; start from the dense one", "svd")


def test_models_without_anything_to_do():
    assert_refused(nn.Sequential(nn.ReLU()), ValueError, "Sequential has no linear layers", "svd")
    assert_refused(nn.Sequential(nn.Linear(3, 3)), ValueError, "has no repeated blocks", "svd")


@pytest.mark.parametrize("method", WITH_TEXT)
def test_an_error_in_the_data_comes_before_any_change(model, method):
    def broken():
        yield torch.ones(1, 4, dtype=torch.long)
        raise KeyboardInterrupt

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        compress(model, method, data=broken(), progress=False)
    assert_unchanged(model, before)
    with pytest.raises(IndexError):
        compress(model, method, data=[torch.full((1, 4), 10**6)], progress=False)
    assert_unchanged(model, before)


def test_statistics_that_do_not_fit_are_refused(model, data):
    some = calibrate(model, data, where="*.q_proj", progress=False)
    message = r"no entry for model\.layers\.0\.self_attn\.k_proj; calibrate with the same `where`"
    assert_refused(model, ValueError, message, "svd-llm", statistics=some)
    message = r"statistics of model\.layers\.0\.self_attn\.q_proj have no 'absmean'; calibrate with needs=\['absmean'\]"
    assert_refused(model, ValueError, message, "asvd", statistics=some, where="*.q_proj")
    # What a method only needs to share a budget is asked for too.
    mean = calibrate(model, data, ["mean"], progress=False)
    assert_refused(model, ValueError, "have no 'gram'", "pifa", statistics=mean, data=data, allocation="threshold")


# ------------------------------------------------------------------------------------------- interrupted on the way


@dataclass(frozen=True)
class Breaks(WeightMethod):
    """A method that stops at a weight which begins with 123."""

    error: type[BaseException] = KeyboardInterrupt

    def weight_of_inputs(self, statistics: Any) -> None:
        return None

    def factorize(self, weight: Tensor, statistics: Any, rank: int) -> Any:
        if weight[0, 0] == 123:
            raise self.error("stop")
        return super().factorize(weight, statistics, rank)


@pytest.mark.parametrize("error", [KeyboardInterrupt, LinalgError])
def test_an_interruption_in_the_middle_leaves_a_sound_model(model, error, tmp_path):
    model.train()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = 123
    with pytest.raises(error, match="stop") as caught:
        compress(model, Breaks(error), ratio=0.3, progress=False)
    if error is LinalgError:
        assert str(caught.value) == "model.layers.1.self_attn.k_proj: stop"
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["model.layers.0.mlp.down_proj"] is LowRank
    assert kinds["model.layers.1.mlp.down_proj"] is nn.Linear
    assert all(module.training for module in model.modules())
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())
    # Half compressed, but nobody can save it as something else than it is.
    (entry,) = model.config.quantization_config.history
    assert entry["interrupted"] is True
    model.eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    with pytest.raises(ValueError, match="compressed by Eckart already"):
        compress(model, "svd", progress=False)
