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
from eckart.models import Statistics, calibrate, linears
from eckart.models.calibrate import SEQUENTIAL
from eckart.structures import EckartWarning, Structure

ROWS = [row for row in catalog.select(family="compression") if row.target]
WITH_DATA = [row for row in ROWS if row.needs]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_row_with_data = pytest.mark.parametrize("row", WITH_DATA, ids=lambda row: row.name)
# Plain weights, transposed ones with biases, and an encoder with a decoder.
FEW = ("llama", "gpt2", "t5")
few_families = pytest.mark.parametrize("family", FEW)
# Where it costs more, all families for the default method only: the others take the same way through the model.
row_and_family = pytest.mark.parametrize(
    ("row", "family"),
    [(row, family) for row in ROWS for family in tiny_models.FAMILIES if row.name == "pifa" or family in FEW],
    ids=lambda value: value if isinstance(value, str) else value.name,
)

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


@every_row
@few_families
def test_full_rank_is_the_weight(row, family):
    model, method = build(family), row.load()()
    statistics = statistics_of(model, method, batch_for(model))
    for ref in linears(model).linears:
        weight = ref.weight.detach()
        factors = method.factorize(weight, statistics[ref.name], min(ref.shape))
        lost = (weight.double() - factors.up.double() @ factors.down.double()).norm() / weight.norm()
        # A basis in float32, and numbers of order one.
        assert lost < 2e-6, ref.name


@every_row
@few_families
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


@every_row
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


@every_row
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


@row_and_family
def test_every_layer_is_handled_and_the_saved_model_loads_with_the_same_logits(row, family, tmp_path):
    model = build(family)
    dense = {ref.name: ref.shape for ref in linears(model).linears}
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    result = run(model, row, [batch_for(model)], ratio=0.3)
    assert [layer.name for layer in result.layers] == list(dense)
    assert all(isinstance(model.get_submodule(name), Structure) for name in dense)
    assert all(0 < layer.error < 1 for layer in result.layers)
    assert 0.3 <= result.ratio < 0.36
    assert result.bytes[1] < result.bytes[0]
    logits = tiny_models.logits(model)
    assert torch.isfinite(logits).all()

    model.save_pretrained(tmp_path)
    auto = getattr(transformers, AUTO.get(family, "AutoModelForCausalLM"))
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(tiny_models.logits(again), logits)
    for one in (model, again):
        head = one.get_output_embeddings()
        assert (head is not None and head.weight is one.get_input_embeddings().weight) == tied
    assert again.config.quantization_config.history == model.config.quantization_config.history


@every_row
@few_families
def test_dtype_and_device_are_kept(row, family):
    model = build(family, torch.bfloat16)
    before = {(p.dtype, p.device) for p in model.parameters()}
    run(model, row, [batch_for(model)], ratio=0.3)
    assert {(p.dtype, p.device) for p in model.parameters()} == before == {(torch.bfloat16, torch.device("cpu"))}
    assert tiny_models.logits(model).dtype == torch.bfloat16


@every_row
def test_half_precision_costs_no_more_than_its_own_rounding(row):
    """The same weights, once rounded to bfloat16 and once as float32 copies of those."""
    half = build("llama", torch.bfloat16)
    wide = copy.deepcopy(half).float()
    data = [batch_for(wide, 8, 20)]
    errors = {}
    for model in (half, wide):
        result = run(model, row, data, ratio=0.3)
        errors[model] = np.array([layer.error for layer in result.layers])
    np.testing.assert_allclose(errors[half], errors[wide], rtol=0.05)


@every_row_with_data
@pytest.mark.parametrize(("family", "side"), [("llama", "left"), ("llama", "right"), ("opt", "left"), ("bert", "right"),
                                              ("t5", "right")])  # fmt: skip
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
    run(plain, row, [batch], ratio=0.3)
    run(padded, row, [longer], ratio=0.3)
    for one, other in zip(linears(plain).linears, linears(padded).linears, strict=True):
        torch.testing.assert_close(other.weight, one.weight, rtol=0, atol=1e-6)


@every_row_with_data
@few_families
def test_how_sequences_are_batched_does_not_change_the_result(row, family):
    one, other = (build(family, torch.float64) for _ in range(2))
    batch = batch_for(one, 8, 12)
    pairs = [{key: value[i : i + 2] for key, value in batch.items()} for i in range(0, 8, 2)]
    run(one, row, [batch], ratio=0.3)
    run(other, row, pairs, ratio=0.3)
    for a, b in zip(linears(one).linears, linears(other).linears, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-5)


@every_row
def test_a_larger_budget_is_never_worse_for_a_layer_whose_inputs_do_not_depend_on_it(row):
    errors = []
    for ratio in (0.7, 0.5, 0.3, 0.1):
        model = build("llama")
        result = run(model, row, [batch_for(model)], ratio=ratio)
        errors.append([layer.error for layer in result.layers if layer.name.endswith("0.self_attn.q_proj")])
    assert errors == sorted(errors, reverse=True)
