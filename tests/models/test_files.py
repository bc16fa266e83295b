from __future__ import annotations

import os
from pathlib import Path

import pytest

from eckart.models import CheckpointError, atomic_directory, check_target


def _write(path: Path, text: str = "new", **options) -> None:
    with atomic_directory(path, **options) as partial:
        assert partial.parent == path.parent  # the same file system, so that the rename is one
        (partial / "config.json").write_text(text)


def _tree(path: Path) -> dict[str, str | None]:
    return {str(p.relative_to(path)): p.read_text() if p.is_file() else None for p in path.rglob("*")}


def test_the_directory_appears_whole(tmp_path):
    _write(tmp_path / "a" / "b" / "model")
    assert _tree(tmp_path) == {"a": None, "a/b": None, "a/b/model": None, "a/b/model/config.json": "new"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x"), SystemExit(1)]
)
@pytest.mark.parametrize("force", [False, True])
def test_after_an_error_nothing_is_left_and_nothing_is_lost(tmp_path, error, force):
    path = tmp_path / "a" / "model"
    if force:
        _write(path, "old")
    before = _tree(tmp_path)
    expected = CheckpointError if isinstance(error, OSError) else type(error)

    def interrupted() -> None:
        with atomic_directory(path, force=force) as partial:
            (partial / "config.json").write_text("half")
            raise error

    with pytest.raises(expected) as caught:
        interrupted()
    assert _tree(tmp_path) == before
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {path}: No space left on device; nothing was left behind"


@pytest.mark.parametrize("kind", ["model", "empty", "file", "other"])
def test_an_existing_path_is_refused(tmp_path, kind):
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        if kind != "empty":
            (path / ("config.json" if kind == "model" else "thesis.tex")).write_text("mine")
    before = _tree(tmp_path)
    with pytest.raises(FileExistsError, match=r"exists already; .* force"):
        check_target(path)
    with pytest.raises(FileExistsError):
        _write(path)
    assert _tree(tmp_path) == before
    if kind in ("model", "empty"):
        _write(path, force=True)
        assert _tree(tmp_path) == {"model": None, "model/config.json": "new"}
    else:
        with pytest.raises(FileExistsError, match="is not a model directory"):
            _write(path, force=True)
        assert _tree(tmp_path) == before


def test_a_directory_that_appears_in_the_meantime_is_not_overwritten(tmp_path):
    path = tmp_path / "model"

    def overtaken() -> None:
        with atomic_directory(path) as partial:
            (partial / "config.json").write_text("mine")
            _write(path, "theirs")

    with pytest.raises(FileExistsError):
        overtaken()
    assert _tree(tmp_path) == {"model": None, "model/config.json": "theirs"}


def test_if_the_last_rename_fails_the_old_directory_comes_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    _write(path, "old")
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        _write(path, force=True)
    assert _tree(tmp_path) == {"model": None, "model/config.json": "old"}


def test_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "link", force=True) as partial:
            (partial / "config.json").write_text(text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model" / "config.json").read_text() == "two"


def test_files_get_the_mode_of_any_new_file(tmp_path):
    with atomic_directory(tmp_path / "model") as partial:
        (partial / "config.json").touch(mode=0o600)
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert (tmp_path / "model" / "config.json").stat().st_mode == ordinary.stat().st_mode


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"^cannot write .*file/model: .*file is a file, not a directory"):
        _write(tmp_path / "file" / "model")


def test_a_place_without_permission_is_one_clear_line(tmp_path, monkeypatch):
    # Asked of the system and not tried, because tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(CheckpointError, match=r"^cannot write .*model: no permission to write in "):
        _write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
