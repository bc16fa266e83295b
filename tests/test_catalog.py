"""Laws of the catalog: rows and files match one to one, and no method claims a status without evidence."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from eckart import catalog
from eckart.catalog import METHODS, Method

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "eckart"
ROOMS = {
    "adapters", "alignment", "analysis", "compression", "diffusion", "federated", "fields", "linalg",
    "merging", "optim", "pretraining", "quantization", "serving",
}  # fmt: skip
BUILT = [method for method in METHODS if method.status != "planned"]
every = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
built = pytest.mark.parametrize("method", BUILT, ids=lambda method: method.name)


def _file(method: Method) -> Path:
    return SOURCE / method.family / f"{method.name.replace('-', '_')}.py"


def _method_classes(path: Path) -> list[str]:
    """Classes of a file that are methods by its family's contract."""
    if not (path.parent / "contract.py").exists() or path.stem == "contract":
        return []
    contract = importlib.import_module(f"eckart.{path.parent.name}.contract")
    kinds = tuple(value for name, value in vars(contract).items() if name.endswith("Method"))
    module = importlib.import_module(f"eckart.{path.parent.name}.{path.stem}")
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return [name for name, value in own.items() if isinstance(value, type) and issubclass(value, kinds)]


def _measured_names(value: Any) -> set[str]:
    """Every value under a key ``method``, at any depth of a results file."""
    if isinstance(value, dict):
        own = {value["method"]} if isinstance(value.get("method"), str) else set()
        return own.union(*map(_measured_names, value.values()))
    return set().union(*map(_measured_names, value)) if isinstance(value, list) else set()


def _results() -> set[str]:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return set().union(*(_measured_names(json.loads(file.read_text(encoding="utf-8"))) for file in files))


def _not_measured() -> dict[str, str]:
    file = ROOT / "benchmarks" / "not_measured.toml"
    return tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def test_names_are_unique():
    names = [method.name for method in METHODS]
    assert sorted(set(names)) == sorted(names)


@every
def test_row_is_well_formed(method):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method.name)
    assert method.family in ROOMS
    assert method.status in catalog.STATUSES
    assert method.title == method.title.strip() != ""
    assert method.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", method.arxiv)
    assert method.arxiv is None or method.year == 2000 + int(method.arxiv[:2])
    assert (method.target is None) == (method.status == "planned")
    assert isinstance(method.needs, tuple)


def test_families_stand_together():
    """A listing prints each family's heading once."""
    order = [method.family for method in METHODS]
    assert order == sorted(order, key=catalog.FAMILIES.index)


@built
def test_built_method_cites_its_paper(method):
    assert method.arxiv or method.reference
    doc = ast.get_docstring(ast.parse(_file(method).read_text(encoding="utf-8")))
    assert doc
    assert (method.arxiv or str(method.year)) in doc


@built
def test_target_is_the_method_class_of_its_own_file(method):
    module, symbol = method.target.split(":")
    assert module == f"eckart.{method.family}.{_file(method).stem}"
    assert symbol in _method_classes(_file(method))
    target = method.load()
    assert target.__module__ == module
    assert target.__dataclass_params__.frozen
    assert set(target().needs) == set(method.needs)  # with its defaults: an option may ask for more


def test_every_method_file_has_a_row():
    targets = {method.target for method in BUILT}
    found = {
        f"eckart.{path.parent.name}.{path.stem}:{name}"
        for room in ROOMS
        for path in (SOURCE / room).glob("*.py")
        for name in _method_classes(path)
    }
    assert found == targets


@built
def test_built_method_has_an_oracle(method):
    path = ROOT / "tests" / method.family / f"test_{_file(method).name}"
    assert path.exists()
    assert re.search(r"^\s*def test_", path.read_text(encoding="utf-8"), re.MULTILINE)


@built
def test_built_method_is_measured_or_says_why_not(method):
    reason = _not_measured().get(method.name, "")
    assert (method.name in _results()) != bool(reason)
    if method.status in ("measured", "stable"):
        assert not reason


def test_every_reason_belongs_to_a_built_method():
    assert set(_not_measured()) <= {method.name for method in BUILT}


def test_reading_the_catalog_loads_no_method():
    assert sys.modules["eckart.catalog"].__dict__.keys().isdisjoint({"torch", "eckart.compression"})
    with pytest.raises(ValueError, match="'cycleqd' is planned and has no code yet"):
        catalog.get("cycleqd").load()


@pytest.mark.parametrize("name", ["svd-llm", "SVD-LLM", "svd_llm", " svd-llm "])
def test_get_forgives_spelling(name):
    assert catalog.get(name).target == "eckart.compression.svd_llm:SVDLLM"
    assert catalog.get(name, family="compression").name == "svd-llm"


def test_get_names_the_nearest():
    with pytest.raises(catalog.UnknownMethodError, match="unknown method 'svdllm'; did you mean svd-llm"):
        catalog.get("svdllm")
    with pytest.raises(catalog.UnknownMethodError, match="unknown method 'qqqq'; `eckart methods` lists all"):
        catalog.get("qqqq")
    with pytest.raises(catalog.UnknownMethodError, match="'galore' belongs to optim, not to compression"):
        catalog.get("galore", family="compression")
    with pytest.raises(catalog.UnknownMethodError) as error:
        catalog.get("pisa", family="compression")
    assert "pissa" not in str(error.value), "an adapter is no answer to a question about compression"


def test_select():
    assert catalog.select() == METHODS
    assert {method.family for method in catalog.select(family="optim")} == {"optim"}
    assert {method.status for method in catalog.select(status="planned")} == {"planned"}
    planned, compression = catalog.select(status="planned"), catalog.select(family="compression")
    assert {*catalog.select(family="compression", status="planned")} == {*planned} & {*compression}
    with pytest.raises(ValueError, match="unknown family 'compresion'; choose one of linalg, compression"):
        catalog.select(family="compresion")
    with pytest.raises(ValueError, match="unknown status 'done'; choose one of planned, experimental"):
        catalog.select(status="done")
