"""Tensor decompositions, and decompositions of a matrix seen as a tensor.

Every result is a tuple of tensors with the ``error`` that was made, a ``reconstruct()`` and, where it stands for a
matrix, an ``apply(x)`` that never forms it. Both are differentiable in the tensors, so that trained ones may take their
place; the decompositions themselves are not. One tensor at a time; `kronecker_svd` also takes batches of matrices.

The separable, grouped and depthwise schemes for a convolution (F, C, h, w) need no function of their own: each is one
`svd` of an unfolding, batched over the groups.

Example:
    >>> import torch
    >>> from eckart.linalg import svd
    >>> w, g = torch.ones(6, 4, 3, 3), 2
    >>> spatial = svd(w.transpose(1, 2).flatten(2).flatten(0, 1), rank=5)  # (F h, C w)
    >>> grouped_inputs = svd(w.unflatten(1, (g, -1)).transpose(0, 1).flatten(2), rank=5)  # g times (F, C/g h w)
    >>> grouped_outputs = svd(w.unflatten(0, (g, -1)).transpose(1, 2).flatten(2), rank=3)  # g times (C, F/g h w)
    >>> spatial.u.shape, grouped_inputs.u.shape, grouped_outputs.u.shape
    (torch.Size([18, 5]), torch.Size([2, 6, 5]), torch.Size([2, 4, 3]))
"""

from __future__ import annotations

from .cp import CP, CPInit, cp
from .kronecker import KroneckerChoice, KroneckerSVD, choose_kronecker_shape, kronecker_svd, rearrange
from .matrix_product_operator import MatrixProductOperator, matrix_product_operator
from .products import khatri_rao, mode_product, multilinear_product, unfold
from .shapes import balanced_factors, kronecker_shape, kronecker_shapes
from .tensor_ring import TensorRing, tensor_ring
from .tensor_train import TensorTrain, tensor_train
from .tucker import Tucker, TuckerMethod, tucker

__all__ = [
    "CP",
    "CPInit",
    "KroneckerChoice",
    "KroneckerSVD",
    "MatrixProductOperator",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "TuckerMethod",
    "balanced_factors",
    "choose_kronecker_shape",
    "cp",
    "khatri_rao",
    "kronecker_shape",
    "kronecker_shapes",
    "kronecker_svd",
    "matrix_product_operator",
    "mode_product",
    "multilinear_product",
    "rearrange",
    "tensor_ring",
    "tensor_train",
    "tucker",
    "unfold",
]
