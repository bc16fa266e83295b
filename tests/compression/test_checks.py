"""The promises that are checked after every compression; a broken one must not go unseen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eckart.compression.checks import check_promises, describe
from eckart.models import LayerResult, Result, Skipped

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
    check_promises(RESULT, 2)
    # Nothing factored, nothing smaller: that is said in a warning and is no broken promise.
    nothing = replace(RESULT, layers=[KEPT], parameters=(1000, 1000), selected_parameters=(100, 100))
    check_promises(nothing, 1)


@pytest.mark.parametrize(
    ("changes", "selected", "message"),
    [
        ({}, 3, "1 selected layers were not visited"),
        ({"selected_parameters": (200, 200), "parameters": (1000, 1000)}, 2, "no fewer than the 200 before"),
        ({"parameters": (1000, 1080)}, 2, "lost -80 numbers, its selected weights 49: a tie broke"),
    ],
)
def test_a_broken_promise(changes, selected, message):
    with pytest.raises(RuntimeError, match=message):
        check_promises(replace(RESULT, **changes), selected)


def test_skipped_layers_in_words():
    assert describe(Skipped("lm_head", "outside the repeated blocks", 4096)) == (
        "lm_head: outside the repeated blocks (4,096 parameters)"
    )
