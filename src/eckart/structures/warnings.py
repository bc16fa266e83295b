"""The warning of the whole library."""

from __future__ import annotations

__all__ = ["EckartWarning"]


class EckartWarning(UserWarning):
    """Something was done differently from what was asked, without harm to the result; the text says what.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", EckartWarning)  # in a script that wants to stop instead
    """
