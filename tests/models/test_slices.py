from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from eckart.models.select import LinearRef
from eckart.models.slices import columns_of, rows_of_linear

LAYERS = {
    "linear": LinearRef("", nn.Linear(5, 4), "linear"),
    "conv1d": LinearRef("", Conv1D(4, 5), "conv1d"),
    "no bias": LinearRef("", nn.Linear(5, 4, bias=False).to(torch.bfloat16), "linear"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_and_columns_are_those_of_the_map(kind):
    ref = LAYERS[kind]
    x = torch.randn(3, 5, dtype=ref.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if ref.bias is not None:
            ref.bias.fill_(0.5)
        rows = rows_of_linear(ref, [3, 1])
        torch.testing.assert_close(rows(x), ref.module(x)[:, [3, 1]], rtol=1e-2, atol=1e-2)
        columns = columns_of(ref, torch.tensor([4, 0]))
        whole = torch.zeros_like(x)
        whole[:, [4, 0]] = x[:, [4, 0]]
        torch.testing.assert_close(columns(x[:, [4, 0]]), ref.module(whole), rtol=1e-2, atol=1e-2)
    assert (rows.dense().dtype, columns.dense().dtype) == (ref.dtype, ref.dtype)
    assert rows.dense().equal(ref.weight[[3, 1]])
    assert columns.dense().equal(ref.weight[:, [4, 0]])
    assert (rows.bias is None) == (columns.bias is None) == (ref.bias is None)


def test_a_slice_shares_no_memory_with_the_map():
    ref = LAYERS["linear"]
    before = ref.weight.detach().clone()
    with torch.no_grad():
        rows_of_linear(ref, [0]).dense().fill_(7)
        columns_of(ref, [0]).bias.fill_(7)
    assert ref.weight.equal(before)
    assert not bool((ref.bias == 7).any())
