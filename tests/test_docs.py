"""The documentation site: every method has its whole page, and what is broken ends the build."""

from __future__ import annotations

import dataclasses
import doctest
import html
import importlib
import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from browser import PHONE
from eckart import catalog
from eckart.cli import _docstring
from report.conftest import browser as browser  # the fixture

ROOT = Path(__file__).parents[1]
BUILT = [method for method in catalog.METHODS if method.target is not None]
NAMES = ("examples", "generate", "markdown_text", "measured", "methods")


@pytest.fixture(scope="module")
def docs():
    """The modules beside the guides, which MkDocs finds in the same way."""
    sys.path.insert(0, str(ROOT / "docs"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path.remove(str(ROOT / "docs"))
    for name in NAMES:
        sys.modules.pop(name, None)


def _section(page: str, heading: str) -> str:
    return re.split(rf"^## {heading}.*$", page, flags=re.MULTILINE)[1].split("\n## ")[0]


def _cells(text: str) -> list[list[str]]:
    """Rows of the tables of a Markdown text, heads and rules not counted, as plain text."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and not re.fullmatch(r"[| :-]+", line)]
    return [[html.unescape(re.sub(r"</?code>", "", cell)) for cell in row[2:-2].split(" | ")] for row in rows][1:]


@pytest.mark.parametrize("method", BUILT, ids=lambda method: method.name)
def test_page_of_a_method(docs, method):
    page, target = docs.methods.page(method), method.load()
    assert page.startswith(f"# {method.name}\n")
    assert html.unescape(page.splitlines()[2]).startswith(f"**{method.title}**")
    paper = f"(https://arxiv.org/abs/{method.arxiv})" if method.arxiv else docs.markdown_text.prose(method.reference)
    assert paper in page.split("## The method")[0]
    assert f"[{method.family}](index.md)" in page
    assert _docstring.equation(sys.modules[target.__module__].__doc__) in _section(page, "The method")
    found = [(name, default) for name, _, default, _ in _cells(_section(page, "Options"))]
    fields = [field for field in dataclasses.fields(target) if field.init]
    assert found == [(field.name, _default(field)) for field in fields]
    assert all(meaning for *_, meaning in _cells(_section(page, "Options")))
    assert doctest.DocTestParser().get_examples(_section(page, "Example"))
    measured = _section(page, "Measured")
    assert ("Not measured: " in measured) != bool(re.search(r"\(\.\./\.\./measured/\w+\.md\)", measured))


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"


def test_types_are_spelled_out(docs):
    options = {name: kind for name, kind, *_ in _cells(_section(docs.methods.page(catalog.get("svd-llm")), "Options"))}
    assert options == {"whitening": "'output' | 'eigen' | 'cholesky'", "update": "bool"}


def test_every_figure_of_a_method_is_on_its_page(docs):
    """The rows of one method, looked for in the file without the code that makes the page."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "perplexity.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["method"] == "svd-llm"]
    [section] = [part for part in docs.measured.of_method("svd-llm").split("### ") if part.startswith("perplexity")]
    found = _cells(section)
    assert len(found) == len(rows) > 1
    for cells, row in zip(found, rows, strict=True):
        assert cells[0] == row["form"]
        assert [float(cell) for cell in cells[1:3]] == pytest.approx([row["ratio"], row["perplexity"]], rel=1e-3)


def test_every_row_and_picture_is_on_a_page(docs):
    for job, data in docs.measured.jobs().items():
        rows = data if isinstance(data, list) else data.get("rows")
        if rows is not None and len(rows) > 1:
            assert len(_cells(docs.measured.job_page(job, data))) == len(rows), job
    texts = [*docs.generate.pages().values(), *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    for picture in (ROOT / "docs" / "images").iterdir():
        assert any(f"images/{picture.name})" in text for text in texts), picture.name


def test_columns_are_the_figures_that_differ(docs):
    """Nested and by epoch too; curves and what a choice was made by are left out, what agrees is said below."""
    watched = {str(step): 1.0 for step in range(6)}
    one = {"method": "svd", "test": {"0": 0.5, "40": 0.9}, "peak memory": 2_500_000, "seed": 0, "watched": watched}
    two = {
        "baseline": "random",
        "test": {"0": 0.1, "40": 0.8},
        "peak memory": 12_000_000,
        "seed": 0,
        "watched": watched,
    }
    one |= {"loss by rate": {"0.1": 2.0}, "curve": [3.0, 1.0]}
    rows = _section(docs.measured.job_page("svd", {"rows": {"ours": one, "theirs": two}}), "Rows")
    assert "| row | test: 0 | test: 40 | peak memory |\n" in rows
    assert _cells(rows) == [["ours", "0.5", "0.9", "2.5 MB"], ["*theirs*", "0.1", "0.8", "12.0 MB"]]
    assert "The same in all rows: seed 0." in rows


def _leaves(navigation: object) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    values = navigation.values() if isinstance(navigation, dict) else navigation
    return [leaf for value in values for leaf in _leaves(value)]


def test_the_navigation_leads_to_every_generated_page(docs):
    leaves = _leaves(docs.generate.navigation())
    assert sorted(leaves) == sorted(docs.generate.pages())
    assert {f"methods/{method.family}/{method.name}.md" for method in BUILT} <= {*leaves}


def test_a_method_without_measurement_or_example_ends_the_build(docs, monkeypatch):
    with pytest.raises(docs.examples.DocsError, match=r"^unheard-of: no row .* and no reason in .*; add one$"):
        docs.measured.of_method("unheard-of")
    with pytest.raises(docs.examples.DocsError, match=r"^benchmarks/results/svd.json holds neither `rows` nor"):
        docs.measured.job_page("svd", {"rows": {}})
    monkeypatch.setitem(sys.modules, "bare", ModuleType("bare"))
    bare = dataclasses.make_dataclass("Bare", [], namespace={"__module__": "bare"})
    sys.modules["bare"].Bare = bare
    method = catalog.Method("bare", "fields", "Bare", target="bare:Bare")
    with pytest.raises(
        docs.examples.DocsError, match=r"^bare: no docstring of bare has an example; add one to bare.Bare$"
    ):
        docs.examples.shown(method)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">>> 1 + 1\n3", "example of it: `1 + 1` gave '2', not '3'"),
        (">>> int('x')", "example of it: `int('x')` raised ValueError: invalid literal for int"),
        (">>> if True:\n...     print(1)\n2", "example of it: `if True: print(1)` gave '1', not '2'"),
    ],
)
def test_a_failing_example_is_one_line(docs, text, message):
    with pytest.raises(docs.examples.DocsError) as error:
        docs.examples.run([doctest.DocTestParser().get_doctest(text, {}, "it", None, 0)])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_example_is_shown_as_it_is_written(docs):
    text = ">>> for i in range(2):\n...     print(i)\n0\n1\n>>> {}\n{}"
    assert docs.examples.source(doctest.DocTestParser().get_doctest(text, {}, "it", None, 0)) == text


def test_a_failing_block_of_a_guide_is_one_line(docs, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    for path in [*(ROOT / "tests").glob("tiny_*.py"), ROOT / "tests" / "test_documents.py"]:
        shutil.copy(path, tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "README.md").write_text("```python\nassert 1 + 1 == 2\n```\n")
    (tmp_path / "docs" / "guide.md").write_text("```python\nraise ValueError('this is wrong')\n```\n")
    with pytest.raises(docs.examples.DocsError, match=r"^Python block of guide\.md: ValueError: this is wrong"):
        docs.examples.run_guides(tmp_path)


@settings(deadline=None)  # a busy machine may take longer for one text
@given(st.text("ab *_`[]()<>&|#\\~^$!{}-+.:\n1", min_size=1))
def test_docstrings_keep_every_character(docs, text):
    """What Markdown would take for a mark comes out as it went in, also in a cell."""
    markdown = pytest.importorskip("markdown")
    text = " ".join(f"a {text} b".replace("`", "").split())
    page = markdown.markdown(docs.markdown_text.table(["x"], [[docs.markdown_text.prose(text)]]), extensions=["tables"])
    (cell,) = re.findall(r"<td>(.*)</td>", page)
    assert html.unescape(cell) == text


def test_marks_of_a_docstring(docs):
    assert docs.markdown_text.prose("``a|b`` of :func:`make`") == "<code>a&#124;b</code> of <code>make</code>"
    assert docs.markdown_text.prose("arXiv 2403.07378.") == "[arXiv 2403.07378](https://arxiv.org/abs/2403.07378)."
    assert docs.markdown_text.prose("see https://a.org/x_y.") == "see <https://a.org/x_y>."


@pytest.fixture
def build(docs, tmp_path, monkeypatch):
    """A copy of the project's documents, and `mkdocs build --strict` in it: exit code and what was printed."""
    pytest.importorskip("material")
    from click.testing import CliRunner
    from mkdocs.__main__ import cli

    for name in ("benchmarks", "src", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    monkeypatch.setattr(docs.examples, "run_guides", lambda root: None)  # tests/test_documents.py runs them

    def run() -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["build", "--strict", "-f", str(tmp_path / "mkdocs.yml")])
        return result.exit_code, result.output

    return tmp_path, run


@pytest.fixture
def small(docs, monkeypatch):
    """Few generated pages, for a quick build."""
    planned = catalog.Method("unheard-of", "compression", "A paper")
    monkeypatch.setattr(catalog, "METHODS", (catalog.get("svd"), catalog.get("svd-llm"), planned))
    jobs = docs.measured.jobs()
    monkeypatch.setattr(docs.measured, "jobs", lambda: {name: jobs[name] for name in ("perplexity", "stream")})


def test_the_whole_site_builds_and_loads_nothing_from_elsewhere(docs, build, monkeypatch):
    monkeypatch.setattr(docs.examples, "run", lambda tests: None)  # pytest runs all docstrings of the package
    project, run = build
    code, output = run()
    assert code == 0, output
    site = project / "site"
    for method in BUILT:
        assert (site / "methods" / method.family / f"{method.name}.html").exists()
    loads = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
    )
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text(encoding="utf-8")), page
    assert not list(site.rglob("*.py"))


def test_every_broken_link_anchor_and_page_counts(build, small):
    project, run = build
    guide = project / "docs" / "compress.md"
    guide.write_text(guide.read_text() + "\n[a](nowhere.md) [b](python.md#nowhere)\n")
    (project / "docs" / "unlisted.md").write_text("# Unlisted\n")
    config = project / "mkdocs.yml"
    config.write_text(config.read_text().replace("  - Guides:\n", "  - Guides:\n      - Gone: gone.md\n"))
    code, output = run()
    assert code == 1
    for words in ("'nowhere.md'", "'#nowhere'", "unlisted.md", "'gone.md'"):
        assert words in output
    assert "Aborted with 4 warnings in strict mode!" in output  # so each of them alone would have ended it


def test_a_failing_example_ends_the_build(docs, build, small, monkeypatch):
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3", {}, "svd", None, 0)
    monkeypatch.setattr(docs.examples, "shown", lambda method: [wrong])
    project, run = build
    code, output = run()
    assert code == 1
    assert "ERROR   -  example of svd: `1 + 1` gave '2', not '3'" in output
    assert "Traceback" not in output
    assert not (project / "site" / "index.html").exists()


def test_the_site_works_from_disk_in_the_dark_and_on_a_phone(build, small, request):
    browser = request.getfixturevalue("browser")
    project, run = build
    code, output = run()
    assert code == 0, output
    browser.open(project / "site" / "index.html", theme="dark", part="")
    assert browser.run("return document.body.dataset.mdColorScheme") == "slate"
    assert browser.complaints() == []
    field = browser.find(".md-search__input")
    field.click()
    field.send_keys("svd")
    for _ in range(100):  # ten seconds for the index, which is read when the field is first used
        if "matching" in browser.text(".md-search-result__meta"):
            break
        time.sleep(0.1)
    assert "methods/compression/svd.html" in browser.find(".md-search-result__list").get_attribute("innerHTML")
    assert {url.partition(":")[0] for url in browser.requests()} <= {"file", "data"}
    browser.open(project / "site" / "methods" / "compression" / "svd-llm.html", PHONE, part="")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), "equations scroll in their own box"
