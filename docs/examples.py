"""Runs the examples that the site shows: those of the methods' docstrings, and the Python blocks of the guides."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from eckart.catalog import Method

FLAGS = doctest.NORMALIZE_WHITESPACE  # as for pytest, in pyproject.toml


class DocsError(Exception):
    """The site cannot be built: one line that says where and why."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # examples and their errors may have several lines


def shown(method: Method) -> list[doctest.DocTest]:
    """The examples of a method's page.

    They are those of its options class. Where that has none, as the class of an optimizer's options, they are those of
    the public names beside it.

    Raises:
        DocsError: There is none.
    """
    target = method.load()
    module = sys.modules[target.__module__]
    found = {test.name: test for test in doctest.DocTestFinder().find(module) if test.examples}
    own = f"{module.__name__}.{target.__name__}"
    public = (f"{module.__name__}.{name}" for name in getattr(module, "__all__", ()))
    tests = [found[name] for name in ([own] if own in found else public) if name in found]
    if not tests:
        raise DocsError(f"{method.name}: no docstring of {module.__name__} has an example; add one to {own}")
    return tests


def source(test: doctest.DocTest) -> str:
    """An example as it is typed and answered."""
    lines: list[str] = []
    for example in test.examples:
        first, *rest = example.source.splitlines()
        lines += [f">>> {first}", *(f"... {line}".rstrip() for line in rest), *example.want.splitlines()]
    return "\n".join(lines)


def run(tests: Iterable[doctest.DocTest]) -> None:
    """Runs examples.

    Raises:
        DocsError: One raised, or gave something else than it says.
    """
    for test in tests:
        try:
            doctest.DebugRunner(optionflags=FLAGS).run(test)
        except doctest.DocTestFailure as failure:
            where, got, want = failure.example.source.strip(), failure.got.strip(), failure.example.want.strip()
            raise DocsError(f"example of {test.name}: `{where}` gave {got!r}, not {want!r}") from None
        except doctest.UnexpectedException as failure:
            where, error = failure.example.source.strip(), failure.exc_info[1]
            raise DocsError(f"example of {test.name}: `{where}` raised {type(error).__name__}: {error}") from None


def run_guides(root: Path) -> None:
    """Runs the Python blocks of the guides as the tests do, in a process of its own and with a tiny model as `demo`.

    Args:
        root: The project.

    Raises:
        DocsError: A block failed.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    test = "tests/test_documents.py"
    done = subprocess.run([*command, "-k", "python_examples", test], cwd=root, capture_output=True, text=True)
    if done.returncode:
        # pytest's summary names the document in brackets, and lines with E hold the error
        document = next(iter(re.findall(r"^FAILED .*\[(.+?)\]", done.stdout, re.MULTILINE)), "")
        errors = re.findall(r"^E\s+(\S.*)", done.stdout, re.MULTILINE)
        said = errors[-1:] or (done.stderr + done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise DocsError(
            f"Python block of {document or 'the guides'}: {said[0]} (see `pytest {test} -k python_examples`)"
        )
