"""The project's own promises: files agree with each other, documents name what exists, nothing is left unfinished."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import eckart
from eckart.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = sorted((ROOT / "src" / "eckart").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MADE = {".git", ".venv", "build", "dist", "demo-compressed", "cache", "__pycache__"}
MADE |= {f".{tool}_cache" for tool in ("pytest", "mypy", "ruff")} | {".hypothesis"}
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cfg", ".json", ".sh", ""}


def _texts() -> list[Path]:
    """Every text file of the project that is not made by a tool."""
    return sorted(
        path
        for path in ROOT.rglob("*")
        if path.suffix in TEXT and not MADE & set(path.relative_to(ROOT).parts) and path.is_file()
    )


def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", _source(ROOT / "Makefile"), re.MULTILINE))


def _constraints() -> dict[str, str]:
    lines = _source(ROOT / "constraints.txt").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_versions_agree():
    assert PROJECT["name"] == "eckart"
    assert PROJECT["version"] == eckart.__version__
    assert eckart.__version__ in _source(ROOT / "CHANGELOG.md")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n" in _source(ROOT / "LICENSE")
    assert "END OF TERMS AND CONDITIONS" in _source(ROOT / "LICENSE")


def test_constraints_are_exact_and_inside_the_accepted_ranges():
    pinned = _constraints()
    assert pinned["torch"] == "2.13.0"
    # datasets is imported only for a hub data set, and is not part of the tested environment
    extras = [extra for name, extra in PROJECT["optional-dependencies"].items() if name != "data"]
    for text in [*PROJECT["dependencies"], *(item for extra in extras for item in extra)]:
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert requirement.specifier.contains(pinned[name]), f"{text} against {pinned[name]}"
    assert not {"llm", "llama-cpp-python"} & set(pinned), "the demo needs the weights' carrier alone"


def test_ci_runs_the_tests_with_a_browser_and_nothing_else():
    shebang, *lines = _source(ROOT / ".ci" / "run").splitlines()
    assert shebang == "#!/usr/bin/env bash"
    start = ["set -euo pipefail", 'cd "$(dirname "$0")/.."']
    assert lines == [*start, "make browser", "export ECKART_BROWSER_REQUIRED=1", "exec make test"]


def test_make_has_the_promised_targets():
    assert {"install", "demo", "test", "test-slow", "browser", "bench", "clean"} <= _targets()
    for script in re.findall(r"\S+\.py\b", _source(ROOT / "Makefile")):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_what_exists(path):
    code = "\n".join(_code(_source(path)))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= _targets()
    assert set(re.findall(r"\beckart ([a-z]+)", code)) <= set(COMMANDS)
    for name in re.findall(r"\b(?:src|tests|benchmarks|docs)/[\w./-]*\w", code):
        if "name_it" not in name:
            assert (ROOT / name).exists(), name


def _code(text: str) -> list[str]:
    """Code blocks and code spans of a Markdown text."""
    return ["".join(groups) for groups in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL)]


def test_readme_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", _source(ROOT / "README.md")):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_example_of_the_readme_is_short_and_uses_public_names():
    (example,) = re.findall(r"```python\n(.*?)```", _source(ROOT / "README.md"), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    used = {
        node.attr
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "eckart"
    }
    assert {"load", "compress"} <= used <= set(eckart.__all__)


def test_no_package_registry_is_named():
    """Where packages come from is the business of whoever installs."""
    hosts = ["py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "conda.ana" + "conda.org"]
    flags = ["--index" + "-url", "--extra-index" + "-url", "--find" + "-links"]
    found = [(path.name, word) for path in _texts() for word in hosts + flags if word in _source(path)]
    assert found == []


def test_nothing_is_left_unfinished():
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", r"pytest\.mark\.(skip|xf" + "ail)")))
    found = [
        (path.name, match[0])
        for path in _texts()
        if path.suffix in (".py", ".md") and (match := words.search(_source(path)))
    ]
    assert found == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_source_file_is_short_and_introduces_itself(path):
    text = _source(path)
    assert text.count("\n") <= 300
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it holds"
    if len(tree.body) > 1 and path.name != "__init__.py":
        assert "from __future__ import annotations" in text
