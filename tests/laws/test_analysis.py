"""What is true of every analysis: the model stays as it was, the figures are plain, finite and the same each time."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from eckart import analyze, catalog
from eckart.analysis import Analysis
from model_state import assert_unchanged, snapshot
from tiny_models import FAMILIES

BUILT = [row for row in catalog.select(family="analysis") if row.status != "planned"]
KINDS = ("llama", "qwen3", "gemma3", "phi3", "gpt2")  # GQA, norms of queries and keys, fused layers, Conv1D with biases
every = pytest.mark.parametrize("row", BUILT, ids=lambda row: row.name)
on_every_kind = pytest.mark.parametrize("kind", KINDS)


def _shifted(kind: str) -> Any:
    """A model and one that was made from it."""
    model, base = FAMILIES[kind](), FAMILIES[kind]()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model, base


def _run(row: catalog.Method, model: Any, base: Any, **options: Any) -> Analysis:
    ids = torch.arange(3, 13).unsqueeze(0)
    batch = {"input_ids": ids}
    if "labels" in row.needs:
        batch["labels"] = torch.where(torch.arange(10) < 4, -100, ids)
    given = {"base": base} if "base" in row.needs else {}
    if {"data", "labels"} & set(row.needs):
        given["data"] = [batch]
    return analyze(model, row.name, **given, progress=False, **options)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for one in value.values() for number in _numbers(one)]
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, float) else []


@every
@on_every_kind
def test_figures_are_plain_finite_and_the_same_again_and_the_model_is_as_it_was(row, kind):
    model, base = _shifted(kind)
    model.train()
    before, before_base = snapshot(model), snapshot(base)
    found = _run(row, model, base)
    assert_unchanged(model, before)
    assert_unchanged(base, before_base)
    text = json.dumps({"figures": found.figures, "rows": found.rows}, allow_nan=False)
    assert all(map(math.isfinite, _numbers([found.figures, found.rows])))
    assert found.figures
    assert found.rows
    assert [list(one) for one in found.rows] == [list(found.rows[0])] * len(found.rows)
    again = _run(row, model, base)
    assert json.dumps({"figures": again.figures, "rows": again.rows}) == text
    assert json.loads(json.dumps(found.to_dict()))["method"] == row.name


@every
def test_what_is_missing_is_named(row):
    model, _ = _shifted("llama")
    with pytest.raises(ValueError, match=r"needs|has no option"):
        analyze(model, row.name, progress=False, **({} if row.needs else {"no_such_option": 1}))


@every
def test_a_weight_with_nan_is_named(row):
    model, base = _shifted("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        _run(row, model, base)


def test_inputs_longer_than_the_context_and_foreign_shapes_are_refused():
    model, _ = _shifted("llama")
    with pytest.raises(ValueError, match="100 tokens is longer than the model's context of 64"):
        analyze(model, "matrix-nuclear-norm", data=[torch.zeros(100, dtype=torch.long)], progress=False)
    for row in BUILT:
        if "base" in row.needs:
            with pytest.raises(ValueError, match="made from"):
                _run(row, model, FAMILIES["gpt2"]())
