"""What the options of a method of any family have in common: making one by name, and checking choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from .catalog import Method, get

__all__ = ["Options", "chosen_method", "make"]


class Options:
    """Checks that the options classes of all families need."""

    def check_choices(self, **choices: Any) -> None:
        """Refuse an option that is none of its `Literal`'s values.

        Args:
            choices: Option by name -> its ``Literal``.

        Raises:
            ValueError: Which option, and what it may be.
        """
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                known = ", ".join(map(str, get_args(literal)))
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")


def make(row: Method, options: Mapping[str, Any], label: str | None = None) -> Any:
    """The method of a catalog row, with options.

    Args:
        row: Of a method that is built.
        options: Option by name.
        label: What messages call the method; its name by default.

    Raises:
        ValueError: The method is planned, has no such option (with those it has), or refuses a value.

    Example:
        >>> from eckart import catalog
        >>> make(catalog.get("pissa"), {"solver": "exact"})
        PiSSA(solver='exact')
    """
    kind, label = row.load(), label or row.name
    known = [field.name for field in fields(kind) if field.init]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"{label} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"{label} cannot use {dict(options)}: {error}; see `eckart methods {row.name}`") from error


def chosen_method(method: Any, options: Mapping[str, Any], family: str) -> Any:
    """The method that a verb was given: one with its options, or a name and options.

    Args:
        method: A method as it is, or the name of one in the catalog.
        options: Option by name; none beside a method as it is.
        family: Where the name is looked for.

    Raises:
        UnknownMethodError: With the nearest names.
        ValueError: Options beside a method as it is, or as :func:`make`.

    Example:
        >>> chosen_method("pissa", {"solver": "exact"}, "adapters")
        PiSSA(solver='exact')
    """
    if isinstance(method, str):
        return make(get(method, family=family), options)
    if options:
        raise ValueError(f"give options to {type(method).__name__}(...) itself, or the method by name")
    return method
