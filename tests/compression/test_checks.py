"""The promises that are checked after every compression; a broken one must not go unseen."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tiny_models
from eckart.compression.budget import Budget
from eckart.compression.checks import check_promises, describe
from eckart.compression.runner import Plan, Walk
from eckart.compression.svd import SVD
from eckart.models import LayerResult, Result, Skipped, blocks, linears

LAYER = LayerResult("a", (10, 10), 3, "pivoted", 51, 0.1)
KEPT = LayerResult("b", (10, 10), 10, "dense", 100, 0.0)
RESULT = Result(
    verb="compress",
    method="svd",
    settings={},
    parameters=(1000, 951),
    selected_parameters=(200, 151),
    bytes=(4000, 3804),
    layers=[LAYER, KEPT],
    error_of="weight",
    seconds=1.0,
    peak_memory=1,
)


def test_a_kept_promise():
    check_promises(RESULT)
    # Nothing factored, nothing smaller: that is said in a warning and is no broken promise.
    nothing = replace(RESULT, layers=[KEPT], parameters=(1000, 1000), selected_parameters=(100, 100))
    check_promises(nothing)
    check_promises(nothing, whole=True)


def test_biases_that_became_shorter_are_no_broken_tie():
    check_promises(replace(RESULT, parameters=(1000, 946)), biases=5)
    # A method of the whole model may have put other layers in the place of those it took away.
    check_promises(replace(RESULT, parameters=(1000, 990)), whole=True)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"selected_parameters": (200, 200), "parameters": (1000, 1000)}, {}, "no fewer than the 200 before"),
        ({"parameters": (1000, 1080)}, {}, "lost -80 numbers, its selected weights 49: a tie broke"),
        ({"parameters": (1000, 946)}, {}, "lost 54 numbers, its selected weights 49: a tie broke"),
        ({}, {"biases": 5}, "lost 49 numbers, its selected weights 54: a tie broke"),
        ({"parameters": (1000, 1000)}, {"whole": True}, "the model holds 1,000 numbers, no fewer than the 1,000"),
        ({"selected_parameters": (200, 201)}, {"whole": True}, "hold 201 numbers, no fewer than the 200 before"),
    ],
)
def test_a_broken_promise(changes, options, message):
    with pytest.raises(RuntimeError, match=message):
        check_promises(replace(RESULT, **changes), **options)


def test_skipped_layers_in_words():
    assert describe(Skipped("lm_head", "outside the repeated blocks", 4096)) == (
        "lm_head: outside the repeated blocks (4,096 parameters)"
    )


def test_layers_that_were_not_visited():
    model = tiny_models.FAMILIES["llama"]()
    members = linears(model).linears
    plan = Plan(SVD(), Budget("ratio", 0.3), "uniform", "pivoted", members, 1)
    with pytest.raises(RuntimeError, match=r"7 selected layers were not visited, such as model\.layers\.1\.self_attn"):
        Walk(plan, model, blocks(model)[:1], [], progress=False).run()
