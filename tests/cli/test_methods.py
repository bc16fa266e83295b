"""``eckart methods``: what it prints is the catalog, no more and no less."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

from eckart import catalog
from eckart.catalog import METHODS
from eckart.cli.main import main

BUILT = [method.name for method in METHODS if method.status != "planned"]


def _run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["methods", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _json(capsys: pytest.CaptureFixture[str], *args: str):
    code, out, err = _run(capsys, *args, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_is_the_catalog(capsys):
    rows = [{**row, "needs": tuple(row["needs"])} for row in _json(capsys)]
    assert rows == [dataclasses.asdict(method) for method in METHODS]


@pytest.mark.parametrize("family", catalog.FAMILIES)
def test_family_and_status_filter(capsys, family):
    names = [row["name"] for row in _json(capsys, "--family", family, "--status", "planned")]
    assert names == [m.name for m in METHODS if m.family == family and m.status == "planned"]


def test_table_names_every_method_under_its_family_and_counts_them(capsys):
    code, out, err = _run(capsys)
    assert (code, err) == (0, "")
    *listed, _, last = out.splitlines()
    headings = [line for line in listed if not line.startswith(" ")]
    assert headings == list(catalog.FAMILIES)
    rows = [line.split() for line in listed if line.startswith(" ")]
    assert [row[:2] for row in rows] == [[method.name, method.status] for method in METHODS]
    assert all(method.title in out and (method.arxiv or "") in out for method in METHODS)
    counts = Counter(method.status for method in METHODS)
    assert last.startswith(f"{len(METHODS)} methods: ")
    assert all(f"{count} {status}" in last for status, count in counts.items())


def test_a_narrow_terminal_shortens_the_title_alone(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = _run(capsys)
    assert max(map(len, out.splitlines())) <= 80
    assert all(method.name in out and (method.arxiv or "") in out for method in METHODS)


def test_no_such_methods(capsys):
    code, out, _ = _run(capsys, "--family", "federated", "--status", "stable")
    assert (code, out) == (0, "no such methods\n")
    assert _json(capsys, "--family", "federated", "--status", "stable") == []


def test_page_of_a_planned_method(capsys):
    code, out, err = _run(capsys, "cycleqd")
    method = catalog.get("cycleqd")
    assert (code, err) == (0, "")
    for text in ("cycleqd", "merging, planned", method.title, "2410.14735", "2024", "no code yet"):
        assert text in out
    page = _json(capsys, "cycleqd")
    assert page["options"] == [] == page["needs"]
    assert page["equation"] == ""


@pytest.mark.parametrize("name", BUILT)
def test_page_of_a_built_method(capsys, name):
    method = catalog.get(name)
    page = _json(capsys, name)
    assert page["title"] == method.title
    assert page["summary"].endswith(".")
    assert page["equation"]
    assert not page["equation"].startswith(" ")
    names = [option["name"] for option in page["options"]]
    assert names == [field.name for field in dataclasses.fields(method.load()) if field.init]
    for option in page["options"]:
        assert option["meaning"], f"{name}: the class docstring does not say what {option['name']} is"
        assert option["type"]
        assert option["default"]
    code, out, _ = _run(capsys, name)
    assert code == 0
    assert page["equation"].splitlines()[0] in out
    for text in (method.arxiv or "none", method.status, method.target, *method.needs, *names):
        assert text in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["svdllm"], "unknown method 'svdllm'; did you mean svd-llm"),
        (["galore", "--family", "compression"], "method 'galore' belongs to optim, not to compression"),
        (["--family", "compresion"], "unknown family 'compresion'; choose one of linalg, compression"),
        (
            ["--status", "done"],
            "unknown status 'done'; choose one of planned, experimental, measured, stable",
        ),
    ],
)
def test_a_mistake_is_one_line_on_standard_error(capsys, args, message):
    code, out, err = _run(capsys, *args)
    assert (code, out) == (1, "")
    assert err.startswith(f"eckart: error: {message}")
    assert err.count("\n") == 1
