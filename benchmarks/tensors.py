"""Tensor decompositions of a 4096 x 4096 float32 matrix, in units of one randomized SVD of rank 16 of the same matrix.

python benchmarks/tensors.py
"""

from __future__ import annotations

import torch
from common import interleaved, medians, ratio, record

from eckart.linalg import singular_values, svd
from eckart.linalg.tensors import kronecker_svd, matrix_product_operator, rearrange, tensor_train, tucker

SIZE, BLOCK, RANK = 4096, 64, 16


def decaying() -> torch.Tensor:
    """Q1 diag(1/i) Q2^T of full rank, with random orthogonal Q1, Q2."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0] for _ in range(2))
    return (left / torch.arange(1.0, SIZE + 1)) @ right


def main() -> None:
    figures: dict[str, float | str] = {}
    plain = decaying()
    # "plain": the spectrum of the matrix decays, that of its blocks is flat; "blocks": the other way round
    for name, a in (("plain", plain), ("blocks", rearrange(plain, (BLOCK, BLOCK)))):
        t = a.reshape(BLOCK, BLOCK, BLOCK, BLOCK)
        contenders = {
            "svd": lambda a=a: svd(a, RANK),
            "kronecker": lambda a=a: kronecker_svd(a, RANK, (BLOCK, BLOCK)),
            "tucker 8": lambda t=t: tucker(t, 8),
            "tucker 16": lambda t=t: tucker(t, 16),
            "hosvd 16": lambda t=t: tucker(t, 16, method="hosvd"),
            "hooi 16": lambda t=t: tucker(t, 16, method="hooi"),
            "tensor train 16": lambda t=t: tensor_train(t, 16),
            "matrix product operator 16": lambda a=a: matrix_product_operator(a, (16, 16, 16), (16, 16, 16), 16),
        }
        seconds = interleaved(contenders, repeats=7)
        figures[f"{name}: seconds, svd"] = medians(seconds)["svd"]
        for key in list(contenders)[1:]:
            bar = " (<= 3)" if key in ("kronecker", "tucker 8", "tucker 16") else ""
            figures[f"{name}: time / svd, {key}{bar}"] = ratio(seconds, key, "svd")
        found = contenders["kronecker"]()
        best = float(singular_values(rearrange(a, (BLOCK, BLOCK)))[RANK:].square().sum().sqrt())
        true = float((a.double() - found.reconstruct().double()).norm())
        figures[f"{name}: error / best error, kronecker (<= 1.01)"] = true / best
        figures[f"{name}: reported error / true error, kronecker"] = float(found.error) / true
        for key in ("tucker 16", "hosvd 16", "hooi 16", "tensor train 16"):
            found = contenders[key]()
            true = float((t.double() - found.reconstruct().double()).norm())
            figures[f"{name}: error / norm, {key}"] = true / float(t.norm())
            figures[f"{name}: reported error / true error, {key}"] = float(found.error) / true
        x = torch.randn(256, SIZE, generator=torch.Generator().manual_seed(1))
        terms, operator = contenders["kronecker"](), contenders["matrix product operator 16"]()
        applied = interleaved(
            {
                "dense": lambda a=a, x=x: x @ a.T,
                "kronecker": lambda x=x, terms=terms: terms.apply(x),
                "operator": lambda x=x, operator=operator: operator.apply(x),
            }
        )
        for key in ("kronecker", "operator"):
            figures[f"{name}: apply to 256 rows, time / dense, {key}"] = ratio(applied, key, "dense")
    record("tensors", figures)


if __name__ == "__main__":
    main()
