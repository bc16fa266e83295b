"""Imports only go down, families do not know each other, and every decomposition goes through ``linalg``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import eckart

SOURCE = Path(__file__).parents[1] / "src" / "eckart"
FAMILIES = (
    "adapters", "alignment", "analysis", "compression", "diffusion", "federated", "fields", "merging",
    "optim", "pretraining", "quantization", "serving",
)  # fmt: skip
# The catalog is plain data that everyone may read; the package and its loading hook stand above all rooms.
LEVELS = (
    ("catalog",),
    ("options",),
    ("linalg",),
    ("structures",),
    ("models",),
    FAMILIES,
    ("recipe", "bench", "report"),
    ("cli",),
    ("_hooks",),
    ("",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

NO_DECOMPOSITION = "norm|vector_norm|matrix_norm|vecdot|multi_dot|cross|diagonal"
OF_A_TENSOR = "svd|qr|geqrf|cholesky|cholesky_inverse|cholesky_solve|inverse|pinverse|lu|triangular_solve|lstsq|slogdet"
FORBIDDEN = re.compile(
    rf"(torch|numpy|scipy|scipy\.sparse)\.linalg(?!\.({NO_DECOMPOSITION})$)(\.\w+)*$"
    rf"|torch\.({OF_A_TENSOR}|svd_lowrank|pca_lowrank|lobpcg|orgqr|ormqr|lu_solve|lu_factor)$"
)
FORBIDDEN_CALL = re.compile(rf"\?\.(.*\.)?({OF_A_TENSOR})$", re.DOTALL)


def _modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = ("eckart", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Every module of ours that a source text imports, at any depth and by any spelling."""
    package = module if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            # `from eckart import linalg` is the room, `from eckart import svd` the room that has it
            found |= (
                {eckart._LAZY.get(alias.name, _submodule(alias.name)) for alias in node.names}
                if origin == "eckart"
                else {origin}
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in found if name == "eckart" or name.startswith("eckart.")}


def _submodule(name: str) -> str:
    return f"eckart.{name}" if name in LEVEL else "eckart"


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports that break the order of the rooms."""
    room = _room(module)
    return sorted(
        target
        for target in imported_modules(source, module, is_package)
        if target != "eckart" and _room(target) != room and LEVEL[_room(target)] >= LEVEL[room]
    )


def _imported_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: {"np": "numpy", "svd": "torch.linalg.svd"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            origin = "eckart" if node.level else node.module
            names |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    return names


def decompositions(source: str) -> list[str]:
    """References to a decomposition or a solve of torch, numpy or scipy, under whatever name."""
    tree = ast.parse(source)
    names = _imported_names(tree)
    nodes = list(ast.walk(tree))
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    found = []
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
            head, *rest = ast.unparse(node).split(".")
            name = ".".join([names.get(head, "?"), *rest])  # "?" is an object, perhaps a tensor
            if FORBIDDEN.match(name) or (id(node) in called and FORBIDDEN_CALL.match(name)):
                found.append(name)
    return found


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_imports_go_down(path):
    assert _room(_name(path)) in LEVEL
    assert upward_imports(path.read_text(encoding="utf-8"), _name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", [path for path in _modules() if _room(_name(path)) != "linalg"], ids=_name)
def test_decompositions_stay_in_linalg(path):
    assert decompositions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "violations"),
    [
        ("eckart.linalg.svd", "import eckart.models", ["eckart.models"]),
        ("eckart.linalg.svd", "from .rank import allocate", []),
        ("eckart.linalg.svd", "from ..structures import LowRank", ["eckart.structures"]),
        ("eckart.structures.low_rank", "from eckart.linalg import svd", []),
        ("eckart.structures.low_rank", "from eckart import linalg, svd, __version__", []),
        ("eckart.structures.low_rank", "from eckart import compress", ["eckart.compression"]),
        ("eckart.structures.low_rank", "from eckart import models", ["eckart.models"]),
        ("eckart.structures.low_rank", "from ..models.load import load", ["eckart.models.load"]),
        ("eckart.structures.low_rank", "def f():\n    from eckart.cli import main", ["eckart.cli"]),
        ("eckart.models.load", "import importlib\nimportlib.import_module('eckart.cli')", ["eckart.cli"]),
        ("eckart.compression.svd", "from ..analysis.spectra import spectra", ["eckart.analysis.spectra"]),
        ("eckart.compression.svd", "from .contract import WeightMethod\nfrom eckart.catalog import get", []),
        ("eckart.catalog", "from eckart.linalg import svd", ["eckart.linalg"]),
        ("eckart.cli.compress", "from eckart.compression import compress", []),
        ("eckart.models.load", "import eckart._hooks", ["eckart._hooks"]),
    ],
)
def test_the_check_sees_an_upward_import(module, source, violations):
    assert upward_imports(source, module) == violations


def test_the_check_resolves_relative_imports_of_a_package():
    assert upward_imports("from .svd import svd\nfrom ..models import load", "eckart.linalg", True) == ["eckart.models"]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import torch\ntorch.linalg.svd(a)", 1),
        ("import torch\nf = torch.linalg.eigh", 1),
        ("import torch\ntorch.linalg.vector_norm(a)", 0),
        ("import torch\ntorch.svd_lowrank(a)", 1),
        ("import torch\nla = torch.linalg", 1),
        ("import torch as t\nt.linalg.lstsq(a, b)", 1),
        ("from torch.linalg import cholesky as c\nc(a)", 1),
        ("from torch import linalg\nlinalg.inv(a)", 1),
        ("import torch.linalg as tl\ntl.qr(a)", 1),
        ("import numpy as np\nnp.linalg.svd(a)", 1),
        ("from scipy import linalg\nlinalg.qr(a)", 1),
        ("import scipy.sparse.linalg as sl\nsl.svds(a)", 1),
        ("a.cholesky()", 1),
        ("(a @ b).mT.inverse()", 1),
        ("self.inverse = 1", 0),
        ("from eckart import linalg\nlinalg.svd(a)", 0),
        ("from .. import linalg\nlinalg.svd(a)", 0),
        ("import eckart\neckart.linalg.qr(a)", 0),
        ("from eckart.linalg import svd\nsvd(a)", 0),
        ("import torch\na.norm() + torch.matmul(a, b).sum()", 0),
    ],
)
def test_the_check_sees_a_decomposition(source, count):
    assert len(decompositions(source)) == count
