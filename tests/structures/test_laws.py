"""What is true of every structure: one table of cases, one set of laws."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eckart.structures import (
    STRUCTURES,
    BlockSparseDictionary,
    Dense,
    LowRank,
    MatrixProductOperator,
    SemiStructuredDictionary,
    SparseDictionary,
    Structure,
    Sum,
    structure_from_spec,
)


class Case(NamedTuple):
    structure: Structure
    weight: Tensor  # W in float64, by the definition and not by the class under test
    bias: Tensor | None


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(m: int, n: int, biased: bool) -> Case:
    weight, bias = random(m, n), random(m, seed=3) if biased else None
    return Case(Dense.from_weight(weight, bias=bias), weight, bias)


def low_rank(m: int, n: int, rank: int, biased: bool, **options: str) -> Case:
    up, down, bias = random(m, rank), random(rank, n, seed=1), random(m, seed=3) if biased else None
    return Case(LowRank.from_factors(up, down, bias=bias, **options), up @ down, bias)


def block_sparse(m: int, n: int, atoms: int, sparsity: int, block: int, biased: bool) -> Case:
    dictionary, values = random(n, atoms), random(m // block, sparsity, block, seed=1)
    chosen = torch.stack([torch.randperm(atoms, generator=torch.Generator().manual_seed(i)) for i in range(m // block)])
    index, bias = chosen[:, :sparsity], random(m, seed=3) if biased else None
    weight = torch.cat([(dictionary[:, own] @ part).mT for own, part in zip(index, values, strict=True)])
    return Case(BlockSparseDictionary.from_codes(dictionary, index, values, bias=bias), weight, bias)


def sparse(m: int, n: int, atoms: int, sparsity: int, biased: bool, **options: str) -> Case:
    dictionary, values, bias = random(n, atoms), random(m, sparsity, seed=1), random(m, seed=3) if biased else None
    chosen = [torch.randperm(atoms, generator=torch.Generator().manual_seed(i))[:sparsity] for i in range(m)]
    weight = torch.stack([dictionary[:, own] @ column for own, column in zip(chosen, values, strict=True)])
    return Case(
        SparseDictionary.from_codes(dictionary, torch.stack(chosen), values, bias=bias, **options), weight, bias
    )


def semi_structured(m: int, n: int, atoms: int, n_of_m: tuple[int, int], biased: bool) -> Case:
    kept, group = n_of_m
    generator = torch.Generator().manual_seed(0)
    starts = range(0, atoms, group)
    chosen = [
        [start + int(i) for start in starts for i in torch.randperm(group, generator=generator)[:kept]]
        for _ in range(m)
    ]
    dictionary, values, bias = (
        random(n, atoms),
        random(m, len(chosen[0]), seed=1),
        random(m, seed=3) if biased else None,
    )
    weight = torch.stack([dictionary[:, own] @ column for own, column in zip(chosen, values, strict=True)])
    layer = SemiStructuredDictionary.from_codes(dictionary, torch.tensor(chosen), values, n_of_m, bias=bias)
    return Case(layer, weight, bias)


def chain(outputs: tuple[int, ...], inputs: tuple[int, ...], ranks: tuple[int, ...], biased: bool) -> Case:
    left, right = (1, *ranks), (*ranks, 1)
    cores = [random(*shape, seed=i) for i, shape in enumerate(zip(left, outputs, inputs, right, strict=True))]
    # Entry by entry, by the definition: the product of one matrix a site.
    rows, columns = (list(itertools.product(*map(range, factors))) for factors in (outputs, inputs))
    entries = [[functools.reduce(torch.matmul, (g[:, o, i] for g, o, i in zip(cores, row, column, strict=True)))
                for column in columns] for row in rows]  # fmt: skip
    weight = torch.stack([torch.stack([entry.squeeze() for entry in row]) for row in entries])
    bias = random(len(rows), seed=3) if biased else None
    return Case(MatrixProductOperator.from_cores(cores, bias=bias), weight, bias)


def total(*cases: Case, bias: Tensor | None = None) -> Case:
    structure = Sum([case.structure for case in cases], bias=bias is not None)
    if structure.bias is not None:
        structure.bias.data.copy_(bias)
    return Case(structure, sum(case.weight for case in cases), bias)


BUILDERS: dict[str, Callable[[bool], Case]] = {
    "dense": lambda b: dense(7, 5, b),
    "dense one row": lambda b: dense(1, 6, b),
    "plain": lambda b: low_rank(9, 6, 3, b, form="plain"),
    "plain above full rank": lambda b: low_rank(4, 3, 8, b, form="plain"),
    "rows": lambda b: low_rank(6, 9, 3, b),
    "rows of a tall matrix": lambda b: low_rank(9, 6, 3, b, side="rows"),
    "columns": lambda b: low_rank(9, 6, 3, b),
    "columns of a wide matrix": lambda b: low_rank(6, 9, 3, b, side="columns"),
    "rows rank one": lambda b: low_rank(6, 9, 1, b),
    "columns rank one": lambda b: low_rank(9, 6, 1, b),
    "rows full rank": lambda b: low_rank(6, 9, 6, b),
    "columns full rank": lambda b: low_rank(9, 6, 6, b),
    "one by one": lambda b: low_rank(1, 1, 1, b),
    "block sparse": lambda b: block_sparse(8, 6, 5, 2, 4, b),
    "block sparse, columns of their own": lambda b: block_sparse(9, 6, 4, 3, 1, b),
    "block sparse, many atoms": lambda b: block_sparse(4, 3, 300, 2, 2, b),
    "sparse, mask": lambda b: sparse(7, 6, 10, 4, b, positions="mask"),
    "sparse, index": lambda b: sparse(7, 6, 10, 4, b, positions="index"),
    "sparse, many atoms": lambda b: sparse(4, 3, 300, 2, b),
    "sparse, all atoms": lambda b: sparse(5, 4, 3, 3, b),
    "sparse, one of one": lambda b: sparse(3, 1, 1, 1, b),
    "semi-structured 2:4": lambda b: semi_structured(7, 6, 12, (2, 4), b),
    "semi-structured 1:2": lambda b: semi_structured(5, 4, 6, (1, 2), b),
    "semi-structured 3:5": lambda b: semi_structured(4, 3, 10, (3, 5), b),
    "semi-structured 2:30": lambda b: semi_structured(4, 3, 30, (2, 30), b),
    "semi-structured, all atoms": lambda b: semi_structured(3, 4, 3, (3, 3), b),
    "chain of one": lambda b: chain((4,), (3,), (), b),
    "chain of two": lambda b: chain((2, 3), (3, 2), (4,), b),
    "chain of three": lambda b: chain((3, 1, 2), (2, 2, 2), (3, 2), b),
    "chain from the end": lambda b: chain((4, 1, 2), (1, 3, 3), (2, 3), b),
    "low-rank chain": lambda b: chain((5, 1), (1, 6), (2,), b),
    "sum": lambda b: total(dense(6, 9, False), low_rank(6, 9, 2, False), bias=random(6, seed=3) if b else None),
    "sum of one": lambda b: total(low_rank(9, 6, 2, False), bias=random(9, seed=3) if b else None),
    "sum of sums": lambda b: total(
        total(dense(6, 9, False), low_rank(6, 9, 4, False, form="plain")),
        low_rank(6, 9, 2, False),
        bias=random(6, seed=3) if b else None,
    ),
}


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def biased(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=BUILDERS.values(), ids=BUILDERS.keys())
def case(request: pytest.FixtureRequest, biased: bool) -> Case:
    return request.param(biased)


def expected(case: Case, x: Tensor) -> Tensor:
    y = x.double() @ case.weight.T
    return y if case.bias is None else y + case.bias


def same(a: Structure, b: Structure) -> bool:
    """Equal tensors under equal names, dtypes included."""
    mine, other = a.state_dict(), b.state_dict()
    equal = (torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
    return a.spec() == b.spec() and mine.keys() == other.keys() and all(equal)


def test_every_structure_has_a_case() -> None:
    assert {builder(True).structure.type_name for builder in BUILDERS.values()} == set(STRUCTURES)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2), (0,), (2, 0)], ids=str)
def test_forward_is_the_matrix_product(case: Case, shape: tuple[int, ...]) -> None:
    x = random(*shape, case.structure.in_features, seed=5)
    # Products of at most 9 terms of size 1 in float64: rounding below 1e-13.
    torch.testing.assert_close(case.structure(x), expected(case, x), rtol=0, atol=1e-12)


def test_forward_takes_non_contiguous_input(case: Case) -> None:
    x = random(case.structure.in_features, 3, 4, seed=5).permute(2, 1, 0)
    torch.testing.assert_close(case.structure(x), expected(case, x), rtol=0, atol=1e-12)


def test_forward_refuses_another_width(case: Case) -> None:
    n = case.structure.in_features
    for width in (n + 1, 2 * n):
        with pytest.raises(RuntimeError):
            case.structure(random(4, width))


def test_dense_is_the_matrix(case: Case) -> None:
    torch.testing.assert_close(case.structure.dense(), case.weight, rtol=0, atol=1e-13 * 9)


def test_counts_are_those_of_the_stored_tensors(case: Case) -> None:
    stored = case.structure.state_dict()
    assert case.structure.num_parameters() == sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert case.structure.nbytes() == sum(len(t.numpy().tobytes()) for t in stored.values())


@pytest.mark.parametrize("tokens", [1, 7])
def test_flops_are_those_of_forward(case: Case, tokens: int) -> None:
    with FlopCounterMode(display=False) as counter:
        case.structure(random(tokens, case.structure.in_features))
    assert case.structure.flops(tokens) == counter.get_total_flops()


def test_spec_survives_json(case: Case) -> None:
    spec = json.loads(json.dumps(case.structure.spec()))
    for device in ("cpu", "meta"):
        rebuilt = structure_from_spec(spec, device=device, dtype=torch.float64)
        assert type(rebuilt) is type(case.structure)
        assert rebuilt.spec() == spec
        assert rebuilt.num_parameters() == case.structure.num_parameters()
        assert rebuilt.nbytes() == case.structure.nbytes()
        rebuilt.load_state_dict(case.structure.state_dict(), assign=device == "meta")
        assert same(rebuilt, case.structure)


def test_spec_with_wrong_entries_is_refused(case: Case) -> None:
    spec = case.structure.spec()
    missing = {name: value for name, value in spec.items() if name not in ("in_features", "terms")}
    for wrong in (missing, spec | {"colour": "red"}):
        with pytest.raises(ValueError, match="spec"):
            structure_from_spec(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_survive_safetensors(case: Case, dtype: torch.dtype) -> None:
    structure = case.structure.to(dtype)
    rebuilt = structure_from_spec(structure.spec(), dtype=dtype)
    rebuilt.load_state_dict(load(save({name: t.contiguous() for name, t in structure.state_dict().items()})))
    assert same(rebuilt, structure)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(case: Case, clone: Callable[[Structure], Structure]) -> None:
    other = clone(case.structure)
    assert same(other, case.structure)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not same(other, case.structure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_in_another_dtype(case: Case, dtype: torch.dtype) -> None:
    structure = case.structure.to(dtype)
    assert structure.dtype == structure.dense().dtype == dtype
    assert not any(t.is_floating_point() for t in structure.buffers())
    x = random(3, structure.in_features, seed=5).to(dtype)
    y = structure(x)
    assert y.dtype == dtype
    # The stored numbers, in float64: what is left is the rounding of forward, of a few intermediate values.
    exact = copy.deepcopy(structure).to(torch.float64)
    truth = x.double() @ exact.dense().T + (0 if exact.bias is None else exact.bias)
    scale = x.double().norm() * exact.dense().norm() + truth.norm()
    eps = torch.finfo(dtype).eps
    assert (y.double() - truth).norm() <= 4 * eps * scale
    assert (structure.dense().double() - exact.dense()).norm() <= eps * exact.dense().norm()


def test_device_is_kept(case: Case) -> None:
    structure = case.structure.to("meta")
    assert structure.device.type == "meta"
    x = torch.empty(2, 3, structure.in_features, device="meta", dtype=torch.float64)
    assert structure(x).shape == (2, 3, structure.out_features)
    assert structure.dense().shape == (structure.out_features, structure.in_features)


def test_gradients_are_those_through_the_dense_matrix(case: Case) -> None:
    structure = case.structure
    x = random(2, 4, structure.in_features, seed=5).requires_grad_()
    seen = random(2, 4, structure.out_features, seed=6)
    inputs = [x, *structure.parameters()]
    y = x @ structure.dense().T
    y = y if structure.bias is None else y + structure.bias
    wanted = torch.autograd.grad((y * seen).sum(), inputs)
    found = torch.autograd.grad((structure(x) * seen).sum(), inputs)
    assert len(wanted) == len(list(structure.named_parameters())) + 1
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_repr_and_bias(case: Case) -> None:
    text = repr(case.structure)
    assert text.startswith(type(case.structure).__name__)
    assert f"in_features={case.structure.in_features}, out_features={case.structure.out_features}" in text
    assert (case.structure.bias is None) == (case.bias is None)
    assert case.structure.spec()["bias"] == (case.bias is not None)


@pytest.mark.parametrize(
    "name",
    ["plain", "rows", "columns", "sum", "sparse, mask", "sparse, index", "semi-structured 2:4", "chain from the end"],
)
def test_forward_compiles_into_one_graph(name: str) -> None:
    case = BUILDERS[name](True)
    compiled = torch.compile(case.structure, backend="eager", fullgraph=True)
    x = random(2, 3, case.structure.in_features, seed=5)
    torch.testing.assert_close(compiled(x), expected(case, x), rtol=0, atol=1e-12)


def test_unknown_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown structure type 'butterfly'.*dense, low_rank, .*sum"):
        structure_from_spec({"type": "butterfly"})
    with pytest.raises(ValueError, match="Dense reads specs of type 'dense', got 'sum'"):
        Dense.from_spec({"type": "sum"})


def test_two_structures_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="two structures carry the type name 'dense'"):
        type("Impostor", (Structure,), {"type_name": "dense"})
    assert STRUCTURES["dense"] is Dense


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (-1, 3)])
def test_sizes_must_be_positive(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Dense(*shape)


def test_a_sum_refuses_terms_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one or more terms"):
        Sum([])
    with pytest.raises(ValueError, match="one shape"):
        Sum([Dense(2, 3), Dense(3, 2)])
    with pytest.raises(ValueError, match=r"add\(a, b\)"):
        Sum([Dense(2, 3), Dense(2, 3, bias=True)])
