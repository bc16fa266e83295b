"""What a published method of this room is: options, and tensors in to tensors out.

A method file holds a frozen dataclass derived from `MatrixMethod`. Its fields are the options of the paper; calling
an instance runs the pure function of the same file with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["MatrixMethod"]


@dataclass(frozen=True)
class MatrixMethod(ABC):
    """A published algorithm on matrices, with its options.

    A subclass names its arguments in its own ``__call__``; the options are checked at construction.

    Attributes:
        needs: Calibration statistics it asks for; a matrix method asks for none.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Runs the algorithm on tensors."""
