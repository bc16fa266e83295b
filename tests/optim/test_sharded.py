"""Options that the laws of sharded training leave at their defaults, in three processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from processes import launch


@pytest.mark.parametrize(
    "script",
    [
        "sharded_bases_run.py",  # bases that are trained
        "sharded_heads_run.py",  # heads and single entries
        "sharded_methods_run.py",  # selections, error feedback and masks
        "sharded_sides_run.py",  # either side of a wavelet transform
    ],
)
def test_sharded_matrices_give_what_whole_ones_do(script):
    launch(Path(__file__).with_name(script), 3)
