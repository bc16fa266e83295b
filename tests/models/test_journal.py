from __future__ import annotations

import os
from pathlib import Path

import pytest

from eckart.linalg import LinalgError
from eckart.models import CheckpointError
from eckart.models.journal import UNFINISHED, Journal, check_unfinished, resumable_directory

REQUEST = {"method": "svd", "budget": {"ratio": 0.2}, "layers": ["a", "b"]}


def _tree(path: Path) -> dict[str, str | None]:
    return {str(p.relative_to(path)): p.read_text() if p.is_file() else None for p in path.rglob("*")}


def _run(path: Path, until: int, error: BaseException | None = None, request: dict = REQUEST, **options) -> list:
    """Write parts up to a number; which of them were there already."""
    with resumable_directory(path, **options) as journal:
        journal.begin(request)
        found = list(journal.parts)
        for part in range(len(found), until):
            (journal.directory / f"{part}.txt").write_text("whole")
            journal.add(part)
        if error is not None:
            raise error
        (journal.directory / "config.json").write_text("{}")
    return found


def _ended(path: Path, until: int, error: BaseException, **options) -> BaseException:
    with pytest.raises(type(error) if not isinstance(error, OSError) else CheckpointError) as caught:
        _run(path, until, error, **options)
    return caught.value


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), MemoryError(), SystemExit(1)])
def test_what_is_finished_is_kept_and_gone_on_with(tmp_path, error):
    path = tmp_path / "a" / "model"
    raised = _ended(path, 2, error)
    partial = tmp_path / "a" / ".model.partial"
    assert raised.__notes__ == [f"what is finished is kept in {partial}: go on with --resume"]
    assert {file.name for file in partial.iterdir()} == {"0.txt", "1.txt", UNFINISHED}
    _ended(path, 3, KeyboardInterrupt(), resume=True)
    assert _run(path, 4, resume=True) == [0, 1, 2]
    assert {file.name for file in path.iterdir()} == {"0.txt", "1.txt", "2.txt", "3.txt", "config.json"}
    assert [file.name for file in path.parent.iterdir()] == ["model"]


def test_a_full_disk_is_one_line_that_says_what_is_kept(tmp_path):
    raised = _ended(tmp_path / "model", 1, OSError(28, os.strerror(28)))
    partial = tmp_path / ".model.partial"
    kept = f"what is finished is kept in {partial}: go on with --resume"
    assert str(raised) == f"cannot write {tmp_path / 'model'}: No space left on device; {kept}"
    assert _run(tmp_path / "model", 2, resume=True) == [0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, os.strerror(28)), ValueError("x")])
def test_before_anything_is_finished_nothing_is_left(tmp_path, error):
    raised = _ended(tmp_path / "a" / "model", 0, error)
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(raised, "__notes__")


@pytest.mark.parametrize("error", [ValueError("x"), LinalgError("x")])
def test_what_is_refused_leaves_nothing_unless_an_earlier_run_was_gone_on_with(tmp_path, error):
    path = tmp_path / "model"
    _ended(path, 2, error)
    assert list(tmp_path.iterdir()) == []
    _ended(path, 1, KeyboardInterrupt())
    _ended(path, 2, error, resume=True)
    assert _run(path, 3, resume=True) == [0, 1]


def test_without_resume_what_is_left_is_refused_or_replaced_by_force(tmp_path):
    path = tmp_path / "model"
    _ended(path, 2, KeyboardInterrupt())
    before = _tree(tmp_path)
    message = r"an earlier run for .*model left .*\.model\.partial; go on with resume \(--resume\), or start anew with"
    for refused in (lambda: check_unfinished(path), lambda: _run(path, 3)):
        with pytest.raises(FileExistsError, match=message):
            refused()
    # A request that is refused takes nothing away, by force either.
    with pytest.raises(ValueError, match="no such layer"), resumable_directory(path, force=True):
        raise ValueError("no such layer")
    assert _tree(tmp_path) == before
    assert _run(path, 1, force=True) == []
    assert _tree(tmp_path) == {"model": None, "model/0.txt": "whole", "model/config.json": "{}"}


def test_to_resume_without_anything_left_is_to_begin(tmp_path):
    assert _run(tmp_path / "model", 2, resume=True) == []
    with pytest.raises(FileExistsError, match="exists already"):
        _run(tmp_path / "model", 2, resume=True)
    _ended(tmp_path / "model", 1, KeyboardInterrupt(), force=True)
    assert (tmp_path / "model" / "1.txt").exists(), "the old one stays until the new one is whole"
    assert _run(tmp_path / "model", 1, resume=True, force=True) == [0]
    assert not (tmp_path / "model" / "1.txt").exists()


def test_another_request_is_named_and_changes_nothing(tmp_path):
    path = tmp_path / "model"
    _ended(path, 1, KeyboardInterrupt())
    before = _tree(tmp_path)
    other = {**REQUEST, "method": "svd-llm", "layers": ["a" * 50], "form": "plain"}
    with pytest.raises(ValueError, match="differs in") as caught:
        _run(path, 2, request=other, resume=True)
    assert str(caught.value) == (
        f"the run that left {tmp_path / '.model.partial'} differs in method (svd, now svd-llm), layers, "
        "form (null, now plain); ask for the same, or start anew with force (--force)"
    )
    assert _tree(tmp_path) == before


def test_a_damaged_journal_is_one_line(tmp_path):
    _ended(tmp_path / "model", 1, KeyboardInterrupt())
    (tmp_path / ".model.partial" / UNFINISHED).write_text('{"request"')
    with pytest.raises(ValueError, match=r"unfinished.json is damaged; start anew with force \(--force\)"):
        _run(tmp_path / "model", 2, resume=True)


def test_facts_are_kept_and_a_journal_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.begin(REQUEST)
    journal.note("ranks", {"a": 3})
    journal.add("first")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            journal.add("second")
    assert [file.name for file in tmp_path.iterdir()] == [UNFINISHED]
    again = Journal(tmp_path, resume=True)
    again.begin(REQUEST)
    assert (again.facts, again.parts) == ({"ranks": {"a": 3}}, ["first"])


def test_another_process_is_kept_out_and_nothing_of_it_is_touched(tmp_path):
    path = tmp_path / "model"
    with resumable_directory(path) as journal:
        journal.begin(REQUEST)
        journal.add(0)
        before = _tree(tmp_path)
        for options in ({"resume": True}, {"force": True}):
            with pytest.raises(FileExistsError, match=r"another process is writing .*\.model\.partial; wait for it"):
                _run(path, 2, **options)
            assert _tree(tmp_path) == before
        (journal.directory / "config.json").write_text("{}")
    assert path.is_dir()


def test_what_a_killed_run_left_before_anything_was_finished_is_no_loss(tmp_path):
    """No handler runs then: what it had begun lies there."""
    partial = tmp_path / ".model.partial"
    (partial / "made").mkdir(parents=True)
    (partial / "half").touch()
    for options in ({}, {"resume": True}):
        assert _run(tmp_path / "model", 1, **options) == []
        assert {file.name for file in (tmp_path / "model").iterdir()} == {"0.txt", "config.json"}
        (tmp_path / "model").rename(partial)
        (partial / "config.json").unlink()
