"""The ``eckart`` command: finds the subcommand, runs it, turns every failure into one line and an exit code.

A subcommand is imported when it runs or when its own help is asked for, so ``eckart --help`` stays fast and
imports no tensor library.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import eckart
from eckart.cli._output import print_error, print_note

# name: (where the function is, what `eckart --help` says of it)
COMMANDS: dict[str, tuple[str, str]] = {
    "methods": ("eckart.cli.methods:command", "List the published methods, or show one of them."),
    "inspect": ("eckart.cli.inspect:command", "Print what each weight's spectrum says about its rank."),
    "report": ("eckart.cli.report:command", "Write what a model's spectra say as one HTML page."),
    "compare": ("eckart.cli.compare:command", "Print how two models of the same weights differ."),
    "analyze": ("eckart.cli.analyze:command", "Look at a model with one of the published analyses."),
    "compress": ("eckart.cli.compress:command", "Make a model's weights smaller under a budget."),
    "adapt": ("eckart.cli.adapt:command", "Fine-tune a model through an adapter and save the adapter."),
    "train": ("eckart.cli.train:command", "Pre-train or fully fine-tune with less optimizer memory."),
    "convert": ("eckart.cli.convert:command", "Turn an adapter into a plain LoRA that other tools load."),
    "eval": ("eckart.cli.eval:command", "Measure perplexity, tokens per second and peak memory."),
    "generate": ("eckart.cli.generate:command", "Generate text with a model, compressed or not."),
    "export": ("eckart.cli.export:command", "Write a compressed model for tools without Eckart."),
}

DONE, FAILED, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 70, 130

_EPILOG = (
    "Exit codes: 0 done; 1 the request cannot be done (one line says why and what to do); 2 wrong usage; "
    "70 a bug in Eckart; 130 interrupted."
)


class _LazyGroup(TyperGroup):
    """A command group whose listing needs no import: the real command is built when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _load(str(name)), rest


def _load(name: str) -> Any:
    module, symbol = COMMANDS[name][0].split(":")
    single = typer.Typer(add_completion=False, **_STYLE)
    single.command(name)(getattr(importlib.import_module(module), symbol))
    return typer.main.get_command(single)


def _listed_only() -> None:
    """Stands for a command that has not been imported; ``_LazyGroup`` replaces it before it could run."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eckart {eckart.__version__}")
        raise typer.Exit


def _root(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="ECKART_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    """Low-rank and spectral methods for large neural networks: inspect, compress, evaluate and export."""
    ctx.obj["debug"] = debug


# Plain help: the framed one costs a third of the time that `eckart --help` may take.
_STYLE: dict[str, Any] = {
    "context_settings": {"help_option_names": ["-h", "--help"]},
    "rich_markup_mode": None,
}


def _build() -> Any:
    app = typer.Typer(cls=_LazyGroup, epilog=_EPILOG, **_STYLE)
    app.callback()(_root)
    for name, (_, help_text) in COMMANDS.items():
        app.command(name, help=help_text)(_listed_only)
    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; ``KeyboardInterrupt`` included, nothing is raised.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        0 done; 1 the request cannot be done; 2 wrong usage; 70 a bug in Eckart; 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    state: dict[str, Any] = {"debug": False}
    with warnings.catch_warnings():
        warnings.showwarning = _warning_printer(warnings.showwarning)
        try:
            code = _build().main(args, prog_name="eckart", standalone_mode=False, obj=state)
            sys.stdout.flush()
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int | None) else FAILED
        except BrokenPipeError:  # the reader left, as in `eckart methods | head`: no one to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = FAILED
        except Exception as error:
            code = _report(error, debug=state["debug"])
    if code == INTERRUPTED:
        sys.stderr.write("eckart: interrupted\n")
    return code if isinstance(code, int) else DONE


def _report(error: Exception, *, debug: bool) -> int:
    if hasattr(error, "format_message"):  # what the parser raises: wrong usage
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "eckart"
        print_error(f"{error.format_message()} (see `{path} --help`)")
        return USAGE
    if debug:
        traceback.print_exception(error)
    if _is_known(error):
        print_error(_describe(error))
        return FAILED
    hint = "" if debug else "; this is a bug: `eckart --debug ...` shows where"
    print_error(f"{type(error).__name__}: {error}{hint}")
    return INTERNAL


def _is_known(error: Exception) -> bool:
    """Whether the message was written for the user: the request failed, and not the code."""
    if isinstance(error, ImportError):  # an optional package may be missing, a module of ours may not
        return not (error.name or "").startswith("eckart")
    if isinstance(error, ValueError | OSError) or _is_out_of_memory(error):
        return True
    return type(error).__module__.startswith("eckart.")


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    if _is_out_of_memory(error):
        return "out of memory; choose a smaller model, smaller batches, or `eckart compress --stream`"
    return str(error) or type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    """Python's own error, or one of torch's, known by name because torch may not be loaded."""
    allocator = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or allocator


def _warning_printer(default: Callable[..., None]) -> Callable[..., None]:
    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("eckart."):
            print_note("warning", str(message))
        else:
            default(message, category, *where, **more)

    return show


if __name__ == "__main__":
    sys.exit(main())
