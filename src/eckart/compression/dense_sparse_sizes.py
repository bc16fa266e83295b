"""How large a dense and a sparse factor are: what a budget of numbers, positions included, has room for.

Wᵀ (n, m) ≈ D (n, k) S (k, m):   n k + s m numbers, and the positions of s nonzeros in each column of S
"""

from __future__ import annotations

from dataclasses import dataclass

from ..structures.dictionary import index_dtype
from ..structures.semi_structured_dictionary import packed_bytes

__all__ = ["Sizes", "parse_pattern", "sizes_for", "sizes_of_pattern"]


@dataclass(frozen=True)
class Sizes:
    """How large D and S are.

    Attributes:
        atoms: k, columns of D.
        sparsity: s, nonzeros in each column of S.
        block: c, columns of S that share their positions.
        pattern: (N, M) if a column has N nonzeros in each M neighbours; then c is 1.
    """

    atoms: int
    sparsity: int
    block: int
    pattern: tuple[int, int] | None = None

    def numbers(self, m: int, n: int, itemsize: int) -> float:
        """Stored numbers of ``itemsize`` bytes for a weight (m, n), positions by their bytes."""
        if self.pattern is None:
            each = self.sparsity * index_dtype(self.atoms).itemsize
        else:
            each = packed_bytes(self.sparsity, self.pattern[1])
        return n * self.atoms + self.sparsity * m + each * (m // self.block) / itemsize


def sizes_for(
    m: int, n: int, parameters: int, *, overcomplete: float = 2.0, block: int = 4, itemsize: int = 4
) -> Sizes | None:
    """The largest s that a budget allows with k = overcomplete * s, and as many atoms as then still fit.

    Args:
        m: outputs.
        n: inputs.
        parameters: numbers to store at most.
        overcomplete: k / s, at least 1.
        block: c; the largest divisor of m up to it is taken.
        itemsize: bytes of a number, for the positions.

    Returns:
        The sizes, or None if not even one nonzero a column fits.

    Example:
        >>> sizes_for(576, 576, 576 * 576 // 2)
        Sizes(atoms=188, sparsity=94, block=4, pattern=None)
    """
    shared = next(c for c in range(min(block, m), 0, -1) if m % c == 0)
    most = min(m, n)

    def sizes(sparsity: int) -> Sizes:
        return Sizes(min(most, max(sparsity, round(overcomplete * sparsity))), sparsity, shared)

    fitting = [s for s in range(1, most + 1) if sizes(s).numbers(m, n, itemsize) <= parameters]
    if not fitting:
        return None
    chosen = sizes(fitting[-1])
    # More than 256 atoms need wider positions, so the last step is taken with care.
    room = range(most, chosen.atoms, -1)
    larger = (Sizes(atoms, chosen.sparsity, shared) for atoms in room)
    return next((found for found in larger if found.numbers(m, n, itemsize) <= parameters), chosen)


def parse_pattern(text: str) -> tuple[int, int]:
    """N and M of a pattern such as "2:4".

    Raises:
        ValueError: It is none, or M is above 256.

    Example:
        >>> parse_pattern("2:4")
        (2, 4)
    """
    parts = str(text).split(":")
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        kept, group = map(int, parts)
        if 1 <= kept <= group <= 256:
            return kept, group
    raise ValueError(f'pattern must be N:M with 1 <= N <= M <= 256, such as "2:4", not {text!r}')


def sizes_of_pattern(m: int, n: int, parameters: int, pattern: tuple[int, int], *, itemsize: int = 4) -> Sizes | None:
    """The most atoms that a budget allows with N nonzeros in each M neighbours of a column.

    Args:
        m: outputs.
        n: inputs.
        parameters: numbers to store at most.
        pattern: (N, M).
        itemsize: bytes of a number, for the positions.

    Returns:
        The sizes, or None if not even M atoms fit.

    Example:
        >>> sizes_of_pattern(576, 576, 576 * 576 // 2, (2, 4))
        Sizes(atoms=188, sparsity=94, block=1, pattern=(2, 4))
    """
    kept, group = pattern
    every = (Sizes(atoms, atoms // group * kept, 1, pattern) for atoms in range(group, min(m, n) + 1, group))
    fitting = [sizes for sizes in every if sizes.numbers(m, n, itemsize) <= parameters]
    return fitting[-1] if fitting else None
