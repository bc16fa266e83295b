"""The frame around every command: lazy imports, exit codes, one line for an error, no traceback."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
import warnings

import pytest

import eckart
from eckart.cli._output import print_json
from eckart.cli.main import COMMANDS, main


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``eckart probe`` with a body of the test's choice; gives exit code, output and errors."""

    def call(body, *args: str, before: tuple[str, ...] = ()):
        def command(count: int = 1) -> None:
            """A command for the tests."""
            body(count)

        module = types.ModuleType("probe_commands")
        module.command = command
        monkeypatch.setitem(sys.modules, "probe_commands", module)
        monkeypatch.setitem(COMMANDS, "probe", ("probe_commands:command", "A probe."))
        code = main([*before, "probe", *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


class EckartWarningLike(UserWarning):
    __module__ = "eckart.somewhere"


class EckartErrorLike(RuntimeError):
    __module__ = "eckart.somewhere"


class OutOfMemoryError(RuntimeError):
    __module__ = "torch"


_ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried")
_MEMORY = "out of memory; choose a smaller model, smaller batches, or `eckart compress --stream`"


def _raise(error):
    def body(_):
        raise error

    return body


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists(name):
    module, symbol = COMMANDS[name][0].split(":")
    assert importlib.util.find_spec(module) is not None
    assert callable(getattr(importlib.import_module(module), symbol))


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command_and_the_exit_codes(capsys, flag):
    assert main([flag]) == 0
    out = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"  {name} " in out
        assert text in out
    assert "Exit codes: 0 done" in out


def test_no_arguments_is_help(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("Usage: eckart")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"eckart {eckart.__version__}\n"


def test_a_command_is_imported_only_when_called(run, monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "broken", ("no_such_module:command", "Cannot be imported."))
    assert main(["--help"]) == 0
    assert "Cannot be imported." in capsys.readouterr().out
    assert run(lambda count: print("ran", count), "--count", "3") == (0, "ran 3\n", "")
    assert main(["broken"]) == 1
    assert "No module named 'no_such_module'" in capsys.readouterr().err


def test_help_of_a_command_is_its_own(run):
    code, out, err = run(_raise(AssertionError), "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: eckart probe [OPTIONS]")
    assert "A command for the tests." in out
    assert "--count" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["probee"], "No such command 'probee'. Did you mean 'probe'? (see `eckart --help`)"),
        (["--verbosity"], "No such option: --verbosity"),
        (["probe", "--coun", "1"], "(see `eckart probe --help`)"),
        (["probe", "--count", "many"], "(see `eckart probe --help`)"),
        (["probe", "stray"], "(see `eckart probe --help`)"),
    ],
)
def test_wrong_usage_is_2(run, capsys, args, message):
    assert run(lambda _: None)[0] == 0
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("eckart: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("ratio must be\n  between 0 and 1"), "ratio must be between 0 and 1"),
        (FileNotFoundError(2, "No such file or directory", "model"), "model: No such file or directory"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (FileExistsError("out exists; say --force"), "out exists; say --force"),
        (ImportError("pip install 'eckart[data]'"), "pip install 'eckart[data]'"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), "No module named 'gguf'"),
        (EckartErrorLike("layer 3 has NaN"), "layer 3 has NaN"),
        *((error, _MEMORY) for error in (MemoryError(), OutOfMemoryError("CUDA out of memory. Tried"), _ALLOCATOR)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_request_that_cannot_be_done_is_1_and_one_line(run, error, line):
    assert run(_raise(error)) == (1, "", f"eckart: error: {line}\n")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("rank"), "KeyError: 'rank'"),
        (
            ImportError("cannot import name 'svd'", name="eckart.linalg"),
            "ImportError: cannot import name 'svd'",
        ),
    ],
)
def test_a_bug_is_70_and_says_how_to_see_more(run, error, text):
    line = f"eckart: error: {text}; this is a bug: `eckart --debug ...` shows where\n"
    assert run(_raise(error)) == (70, "", line)


@pytest.mark.parametrize(("error", "code"), [(ValueError("no"), 1), (KeyError("no"), 70)])
def test_debug_shows_the_traceback(run, monkeypatch, error, code):
    for before, value in ((("--debug",), ""), ((), "1")):
        monkeypatch.setenv("ECKART_DEBUG", value)
        result, _, err = run(_raise(error), before=before)
        assert result == code
        assert err.startswith("Traceback (most recent call last)")
        assert err.splitlines()[-1].startswith("eckart: error: ")


def test_interrupt_is_130(run):
    assert run(_raise(KeyboardInterrupt())) == (130, "", "eckart: interrupted\n")


def test_a_chosen_exit_code_is_kept(run):
    assert run(_raise(SystemExit(3)))[0] == 3
    assert run(_raise(SystemExit(None)))[0] == 0
    assert run(_raise(SystemExit("no")))[0] == 1


def test_our_warnings_are_one_line_and_others_untouched(run):
    def body(_):
        warnings.warn(EckartWarningLike("layer a keeps\n plain factors"), stacklevel=1)

    others = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = printer = lambda message, *_: others.append(str(message))
        assert run(body) == (0, "", "eckart: warning: layer a keeps plain factors\n")
        run(lambda _: warnings.warn("of another library", stacklevel=1))
        assert warnings.showwarning is printer
    assert others == ["of another library"]


def test_json_has_no_nan(capsys):
    print_json({"a": float("nan"), "b": [1.5, float("inf")], "c": (1, "é")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": [1, "é"]}


@pytest.mark.parametrize("args", [["--version"], ["methods", "--json"]], ids=" ".join)
def test_a_reader_that_left_is_no_error_message(args):
    """As in ``eckart methods | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        command = [sys.executable, "-m", "eckart.cli.main", *args]
        run = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (1, "")
