from __future__ import annotations

import pytest
import torch

from eckart.linalg.tensors.products import khatri_rao, mode_product, multilinear_product, unfold


def test_unfolding_has_the_fibres_as_columns(gaussian):
    t = gaussian(2, 3, 4)
    for d, (i, j) in enumerate([(1, 2), (0, 2), (0, 1)]):
        matrix = unfold(t, d)
        assert matrix.shape == (t.shape[d], t.shape[i] * t.shape[j])
        fibre = [slice(None)] * 3
        fibre[i], fibre[j] = 1, 2
        assert torch.equal(matrix[:, 1 * t.shape[j] + 2], t[tuple(fibre)])


@pytest.mark.parametrize("mode", [0, 1, 2, 3, -1, -4])
def test_mode_product_is_a_product_with_the_unfolding(mode, gaussian):
    t = gaussian(5, 2, 3, 4).movedim(0, 3)  # not contiguous
    matrix = gaussian(6, t.shape[mode], seed=1)
    product = mode_product(t, matrix, mode)
    assert torch.allclose(unfold(product, mode), matrix @ unfold(t, mode))
    assert torch.allclose(mode_product(gaussian(3), gaussian(2, 3), 0), gaussian(2, 3) @ gaussian(3))


def test_multilinear_product_is_that_of_einsum(gaussian):
    t, a, c = gaussian(2, 3, 4), gaussian(5, 2, seed=1), gaussian(1, 4, seed=2)
    assert torch.allclose(multilinear_product(t, [a, None, c]), torch.einsum("ijk,ai,ck->ajc", t, a, c))
    assert multilinear_product(t, [None] * 3) is t


def test_khatri_rao_is_a_column_wise_kronecker_product(gaussian):
    a, b, c = gaussian(2, 4), gaussian(3, 4, seed=1), gaussian(5, 4, seed=2)
    result = khatri_rao([a, b, c])
    for k in range(4):
        assert torch.allclose(result[:, k], torch.kron(torch.kron(a[:, k], b[:, k]), c[:, k]))
    assert torch.equal(khatri_rao([a]), a)
