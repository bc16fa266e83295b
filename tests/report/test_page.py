"""The page is whole or absent, carries its figures unharmed, and needs nothing else."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files

import pytest

import tiny_checkpoints
from browser import embedded
from eckart.report import Source, check_page, render, report_figures, write_pages
from eckart.report.page import encode

NASTY = "</script><script>alert(1)</script> & \u2028 'ä'"


def test_a_name_cannot_break_out_of_the_page(tmp_path):
    figures = report_figures(Source.of(tiny_checkpoints.model(), NASTY), progress=False)
    page = tmp_path / "page.html"
    page.write_text(render(figures))
    assert json.loads(embedded(page)) == figures
    assert "<script>alert" not in page.read_text()


def test_the_page_refers_to_nothing_outside(alone):
    text = alone[0].read_text()
    assert re.findall(r"""(?:src|href)=["'](?!data:,|#)[^"']*""", text) == []
    assert set(re.findall(r"https?://[^\s\"'<)]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text
    assert "$" not in re.sub(r"\$\{", "", text.partition("<script>")[0])  # no placeholder is left


def test_the_json_file_is_what_the_page_holds(both):
    page, figures = both
    assert embedded(page) == page.with_name("figures.json").read_text().rstrip("\n")
    assert json.loads(encode(figures)) == figures


def test_assets_are_in_the_package():
    names = {entry.name for entry in (files("eckart.report") / "assets").iterdir()}
    assert names == {"template.html", "style.css", "charts.js", "map.js", "details.js", "report.js"}


def test_files_are_written_together_or_not_at_all(tmp_path):
    page, other = tmp_path / "report.html", tmp_path / "missing" / "figures.json"
    page.write_text("before")
    with pytest.raises(FileNotFoundError):
        write_pages({page: "after", other: "{}"})
    assert page.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_pages({tmp_path / "report.html": "text"})
    assert list(tmp_path.iterdir()) == []


def test_only_a_report_is_replaced(tmp_path, alone):
    page = tmp_path / "report.html"
    assert check_page(page) == page
    page.write_text(alone[0].read_text())
    assert check_page(page) == page
    page.write_text("<!doctype html><title>mine</title>")
    with pytest.raises(FileExistsError, match="exists and is no report"):
        check_page(page)
    assert check_page(page, force=True) == page
    with pytest.raises(FileExistsError, match="is a directory"):
        check_page(tmp_path, force=True)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        check_page(tmp_path / "missing" / "report.html")
