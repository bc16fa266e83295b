"""What is true of every compression method, whatever its paper says: one test a law, over the rows of the catalog."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import tiny_models
from eckart import catalog
from eckart.compression import WeightMethod, compress
from eckart.compression.contract import LayerMethod, ModuleMethod, StructureMethod
from eckart.compression.policies import known, needs_text
from eckart.models import Statistics, calibrate, linears
from eckart.models.calibrate import SEQUENTIAL
from eckart.models.parts import parts
from eckart.structures import EckartWarning, Structure

ROWS = [row for row in catalog.select(family="compression") if row.target]


def of_scope(scope: type) -> list[catalog.Method]:
    return [row for row in ROWS if issubclass(row.load(), scope)]


def cases(rows: list[catalog.Method], families: tuple[str, ...]) -> list[Any]:
    """All families for the default method; one each for the others, which take the same way through the model."""
    found = [(row, families[sum(map(ord, row.name)) % len(families)]) for row in rows if row.name != "pifa"]
    found += [(row, family) for row in rows if row.name == "pifa" for family in families]
    return [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in found]


def each(rows: list[catalog.Method]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


# Factors: two scopes of method that compress single weights. Modules: attention and MLPs as wholes, whose linears may
# have other shapes afterwards. Methods of a whole model promise too little for laws; they have tests of their own.
FACTORS, LAYERS, MODULES = of_scope(WeightMethod), of_scope(LayerMethod), of_scope(ModuleMethod)
WITH_DATA = [row for row in LAYERS if row.needs]
# Plain weights, transposed ones with biases, and an encoder with a decoder.
FEW = ("llama", "gpt2", "t5")
# Biases everywhere, fused attention, and heads that are normalised: the last two are left alone by some.
OF_MODULES = ("llama", "opt", "gpt2", "qwen3")

AUTO = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM", "vit": "AutoModelForImageClassification"}


def build(family: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    return tiny_models.FAMILIES[family]().to(dtype)


def batch_for(model: Any, sequences: int = 4, tokens: int = 20) -> dict[str, torch.Tensor]:
    """Something to calibrate on, with labels where a loss needs them."""
    batch = tiny_models.inputs(model, sequences, tokens)
    if "pixel_values" in batch:
        batch["labels"] = torch.arange(sequences) % model.config.num_labels
    elif model.config.is_encoder_decoder:
        batch["labels"] = batch["decoder_input_ids"].roll(1, 1)
    return batch


def run(model: nn.Module, row: catalog.Method, data: list[dict[str, torch.Tensor]], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, row.name, data=data, progress=False, **options)


def statistics_of(model: nn.Module, method: WeightMethod, batch: dict[str, torch.Tensor]) -> dict[str, Statistics]:
    """All that a method may ask for, as if nothing before a layer had been compressed."""
    needs = (method.gathers | method.surveys) - SEQUENTIAL
    if not needs:
        return {ref.name: Statistics() for ref in linears(model).linears}
    found = calibrate(model, [batch], needs, progress=False)
    return {name: replace(entry, compressed_gram=entry.gram, cross_gram=entry.gram) for name, entry in found.items()}


def assert_alike(one: nn.Module, other: nn.Module, *, atol: float) -> None:
    """The same weights, compared as matrices: how a structure stores one need not be unique."""
    for a, b in zip(linears(one).linears, linears(other).linears, strict=True):
        torch.testing.assert_close(b.weight, a.weight, rtol=0, atol=atol)


def root_of(measure: torch.Tensor | None, width: int) -> np.ndarray:
    """S with S S^T = G, whatever form a method gives G in."""
    if measure is None:
        return np.eye(width)
    measure = measure.double().numpy()
    if measure.ndim == 1:
        return np.diag(np.sqrt(measure))
    values, vectors = np.linalg.eigh(measure)
    return vectors * np.sqrt(values.clip(min=0))


# ------------------------------------------------------------------------------------------- the method by itself


@pytest.mark.parametrize(("row", "family"), cases(FACTORS, FEW))
def test_full_rank_is_the_weight(row, family):
    model, method = build(family), row.load()()
    statistics = statistics_of(model, method, batch_for(model))
    for ref in linears(model).linears:
        weight = ref.weight.detach()
        factors = method.factorize(weight, statistics[ref.name], min(ref.shape))
        lost = (weight.double() - factors.up.double() @ factors.down.double()).norm() / weight.norm()
        # A basis in float32, and numbers of order one.
        assert lost < 2e-6, ref.name


@pytest.mark.parametrize(("row", "family"), cases(FACTORS, FEW))
def test_the_error_is_the_best_there_is_in_the_methods_own_measure(row, family):
    """Eckart and Young: no matrix of rank k is nearer than the tail of the singular values of W S."""
    model, method = build(family), row.load()()
    statistics = statistics_of(model, method, batch_for(model, 8, 40))
    for ref in linears(model).linears:
        weight = ref.weight.detach()
        scale = root_of(method.weight_of_inputs(statistics[ref.name]), ref.in_features)
        s = np.linalg.svd(weight.double().numpy() @ scale, compute_uv=False)
        for rank in (3, min(ref.shape) // 2):
            factors = method.factorize(weight, statistics[ref.name], rank)
            assert factors.rank == rank
            lost = weight.double() - factors.up.double() @ factors.down.double()
            error, best = np.linalg.norm(lost.numpy() @ scale), np.linalg.norm(s[rank:])
            # Up to the rounding of float32 factors, which is 1e-7 of everything.
            assert best * (1 - 1e-6) - 1e-6 * s[0] <= error <= best * (1 + 1e-4) + 1e-6 * s[0], (ref.name, rank)


@each(FACTORS)
def test_factors_are_ordered_so_that_they_can_be_cut(row):
    """Dropping the last columns is the answer at a smaller rank; the runner relies on it."""
    model, method = build("llama"), row.load()()
    statistics = statistics_of(model, method, batch_for(model))
    ref = linears(model, "*.0.mlp.up_proj").linears[0]
    weight, known = ref.weight.detach(), statistics[ref.name]
    large, small = (method.factorize(weight, known, rank) for rank in (12, 5))
    cut = large.truncate(5)
    assert cut.rank == 5
    torch.testing.assert_close(cut.up @ cut.down, small.up @ small.down, rtol=0, atol=1e-4 * float(weight.abs().max()))


@each(LAYERS)
def test_a_spectrum_has_one_finite_value_a_rank_in_falling_order(row):
    model, method = build("gpt2"), row.load()()
    statistics = statistics_of(model, method, batch_for(model))
    for ref in linears(model).linears:
        s = method.spectrum(ref.weight.detach(), statistics[ref.name])
        assert s.shape == (min(ref.shape),)
        assert torch.isfinite(s).all()
        assert (s >= 0).all()
        assert (s[:-1] >= s[1:]).all()


# --------------------------------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize(("row", "family"), cases(LAYERS, tuple(tiny_models.FAMILIES)))
def test_every_layer_is_handled_and_the_saved_model_loads_with_the_same_logits(row, family, tmp_path):
    model = build(family)
    dense = {ref.name: ref.shape for ref in linears(model).linears}
    result = saved_as_it_is(model, row, family, tmp_path)
    assert [layer.name for layer in result.layers] == list(dense)
    assert all(isinstance(model.get_submodule(name), Structure) for name in dense)
    assert all(0 < layer.error < 1 for layer in result.layers)
    assert result.ratio >= 0.3
    if not issubclass(row.load(), StructureMethod):  # some structures come in coarse steps
        assert result.ratio < 0.36


@pytest.mark.parametrize("family", OF_MODULES)
@each(MODULES)
def test_every_layer_is_in_a_part_or_skipped_and_the_saved_model_loads(row, family, tmp_path):
    model = build(family)
    dense = {ref.name: ref.shape for ref in linears(model).linears}
    result = saved_as_it_is(model, row, family, tmp_path)
    skipped = [line.partition(":")[0] for line in result.skipped]
    assert sorted([*skipped, *(layer.name for layer in result.layers)]) == sorted(dense)
    assert not skipped or family in ("gpt2", "qwen3")
    assert skipped or family != "gpt2"  # its attention is fused
    for layer in result.layers:
        assert layer.shape == dense[layer.name]
        assert isinstance(model.get_submodule(layer.name), Structure) == (layer.form != "dense")
        assert 0 <= layer.error < 1
    # Whole coordinates of heads, and whole channels.
    assert 0.3 <= result.ratio < 0.4


def saved_as_it_is(model: Any, row: catalog.Method, family: str, path: Any) -> Any:
    """Compress by 30 %; plain transformers must give the same model back."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    result = run(model, row, [batch_for(model)], ratio=0.3)
    assert result.bytes[1] < result.bytes[0]
    logits = tiny_models.logits(model)
    assert torch.isfinite(logits).all()
    model.save_pretrained(path)
    auto = getattr(transformers, AUTO.get(family, "AutoModelForCausalLM"))
    again, info = auto.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(tiny_models.logits(again), logits)
    for one in (model, again):
        head = one.get_output_embeddings()
        assert (head is not None and head.weight is one.get_input_embeddings().weight) == tied
    assert again.config.quantization_config.history == model.config.quantization_config.history
    return result


@pytest.mark.parametrize(("row", "family"), cases(MODULES, OF_MODULES))
def test_a_part_that_may_keep_everything_stays_as_it_is(row, family):
    model, method = build(family), row.load()()
    selected = linears(model).linears
    statistics = calibrate(model, [batch_for(model)], method.needs, progress=False) if method.needs else {}
    found, _ = parts(model, selected)
    kept = [part for part in found if method.refuses(part) is None]
    assert kept
    for part in kept:
        whole = sum(ref.in_features * ref.out_features for ref in part.linears)
        assert method.compress(part, statistics, whole, "pivoted") is None


@pytest.mark.parametrize(("row", "family"), cases(LAYERS, FEW) + cases(MODULES, OF_MODULES))
def test_dtype_and_device_are_kept(row, family):
    model = build(family, torch.bfloat16)
    before = {(p.dtype, p.device) for p in model.parameters()}
    run(model, row, [batch_for(model)], ratio=0.3)
    assert {(p.dtype, p.device) for p in model.parameters()} == before == {(torch.bfloat16, torch.device("cpu"))}
    assert tiny_models.logits(model).dtype == torch.bfloat16


@each(LAYERS)
def test_half_precision_costs_no_more_than_its_own_rounding(row):
    """The same weights, once rounded to bfloat16 and once as float32 copies of those."""
    half = build("llama", torch.bfloat16)
    wide = copy.deepcopy(half).float()
    data = [batch_for(wide, 8, 20)]
    errors = {}
    for model in (half, wide):
        result = run(model, row, data, ratio=0.3)
        errors[model] = np.array([layer.error for layer in result.layers])
    # Structures with indices have fewer other numbers beside halves, since indices count by their bytes.
    rtol = 0.1 if issubclass(row.load(), StructureMethod) else 0.05
    np.testing.assert_allclose(errors[half], errors[wide], rtol=rtol)


@pytest.mark.parametrize("policy", [policy for policy in known() if needs_text(policy)])
@each(LAYERS)
def test_a_policy_that_looks_at_text_meets_the_budget_and_spends_it_unevenly(row, policy):
    """Those that do not are covered by `tests/compression/test_runner.py`."""
    model = build("llama")
    result = run(model, row, [batch_for(model)], ratio=0.3, allocation=policy, evaluations=4)
    assert result.settings["allocation"] == policy
    if not issubclass(row.load(), StructureMethod):
        assert result.ratio >= 0.3
    elif result.ratio < 0.3:  # no structure is as small as some shares
        assert any("stay dense" in warning for warning in result.warnings)
    kept = {layer.parameters / (layer.shape[0] * layer.shape[1]) for layer in result.layers}
    assert len(kept) > 2  # two shapes of matrix round to their own fractions


# Where positions are absolute, padding on the other side would move the tokens.
PADDED = {"llama": ("left", "right"), "opt": ("left",), "bert": ("right",), "t5": ("right",)}
# Rounding decides between two atoms that are about as good, and everything after that; the errors stay the same.
CHOOSING = ("cospadi",)
PADDED_CASES = [
    pytest.param(*case.values, side, id=f"{case.id}-{side}")
    for case in cases(WITH_DATA, tuple(PADDED)) + cases(MODULES, ("llama", "opt"))
    for side in PADDED[case.values[1]]
]


@pytest.mark.parametrize(("row", "family", "side"), PADDED_CASES)
def test_padding_does_not_change_the_result(row, family, side):
    plain, padded = (build(family, torch.float64) for _ in range(2))
    batch = batch_for(plain, 4, 12)
    garbage = torch.full((4, 5), 7)

    def widened(key: str, filler: torch.Tensor) -> torch.Tensor:
        parts = [batch[key], filler] if side == "right" else [filler, batch[key]]
        return torch.cat(parts, 1)

    longer = {key: widened(key, garbage) for key in ("input_ids", "decoder_input_ids") if key in batch}
    longer["attention_mask"] = widened("attention_mask", torch.zeros_like(garbage))
    if "decoder_input_ids" in batch:
        ones = torch.ones_like(batch["decoder_input_ids"])
        longer["decoder_attention_mask"] = torch.cat([ones, torch.zeros_like(garbage)], 1)
        longer["labels"] = widened("labels", torch.full_like(garbage, -100))
    results = [run(plain, row, [batch], ratio=0.3), run(padded, row, [longer], ratio=0.3)]
    if row.name in CHOOSING:
        errors = [[layer.error for layer in result.layers] for result in results]
        torch.testing.assert_close(*map(torch.tensor, errors), rtol=0.1, atol=1e-6)
    else:
        assert_alike(plain, padded, atol=1e-6)


@pytest.mark.parametrize(("row", "family"), cases(WITH_DATA, FEW) + cases(MODULES, OF_MODULES))
def test_how_sequences_are_batched_does_not_change_the_result(row, family):
    one, other = (build(family, torch.float64) for _ in range(2))
    batch = batch_for(one, 8, 12)
    pairs = [{key: value[i : i + 2] for key, value in batch.items()} for i in range(0, 8, 2)]
    run(one, row, [batch], ratio=0.3)
    run(other, row, pairs, ratio=0.3)
    assert_alike(one, other, atol=1e-5)


@each(LAYERS)
def test_a_larger_budget_is_never_worse_for_a_layer_whose_inputs_do_not_depend_on_it(row):
    errors = []
    for ratio in (0.7, 0.5, 0.3, 0.1):
        model = build("llama")
        result = run(model, row, [batch_for(model)], ratio=ratio)
        errors.append([layer.error for layer in result.layers if layer.name.endswith("0.self_attn.q_proj")])
    assert errors == sorted(errors, reverse=True)
