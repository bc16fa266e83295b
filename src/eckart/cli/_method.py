"""A compression method with its options, from the words of a command line."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from eckart.cli._options import parse_setting

if TYPE_CHECKING:
    from eckart.compression.request import AnyMethod


def chosen_method(name: str, settings: list[str]) -> AnyMethod:
    """The method ``name`` with options given as name=value.

    Raises:
        UnknownMethodError: with the nearest names.
        ValueError: it has no such option, or a value of another type was given.
    """
    from eckart.compression.compress import make_method

    options = dict(parse_setting(pair) for pair in settings)
    for field in fields(make_method(name, {})):
        if field.name in options and not fits(options[field.name], field.default):
            wanted = type(field.default).__name__
            raise ValueError(f"--set {field.name}={options[field.name]} is no {wanted}; see `eckart methods {name}`")
    return make_method(name, options)


def fits(value: Any, default: Any) -> bool:
    """Whether ``value`` is of the kind of ``default``; a whole number is a fraction too, but true is no number."""
    if default is None or default is MISSING:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, int | float if isinstance(default, float) else type(default))
