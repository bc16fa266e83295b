"""How sizes split: the shapes of Kronecker factors, and the sites of a matrix product operator. Integers only."""

from __future__ import annotations

import math

__all__ = ["balanced_factors", "kronecker_shape", "kronecker_shapes"]


def kronecker_shapes(m: int, n: int) -> list[tuple[int, int]]:
    """All shapes (m_1, n_1) of a first factor, those with the fewest parameters in a term first.

    Among equal parameters m_1 n_1 + m_2 n_2 the shape nearest to (sqrt(m), sqrt(n)) comes first. Left out are (1, 1)
    and (m, n), where one factor is a number and the other the matrix itself. (m, 1) and (1, n) are ordinary low rank;
    for two prime sizes they are all there is, for a prime and a 1 there is nothing.

    Example:
        >>> kronecker_shapes(4, 6)[:3], kronecker_shapes(5, 7), kronecker_shapes(5, 1)
        ([(2, 2), (2, 3), (4, 1)], [(5, 1), (1, 7)], [])
    """
    shapes = [(m1, n1) for m1 in _divisors(m) for n1 in _divisors(n) if 1 < m1 * n1 < m * n]

    def order(shape: tuple[int, int]) -> tuple[float, ...]:
        m1, n1 = shape
        m2, n2 = m // m1, n // n1
        return m1 * n1 + m2 * n2, max(m1, m2) / min(m1, m2) * max(n1, n2) / min(n1, n2), -m1

    return sorted(shapes, key=order)


def kronecker_shape(m: int, n: int) -> tuple[int, int]:
    """The shape (m_1, n_1) with the fewest parameters in a term, whatever the matrix: the squarest rearrangement.

    The first of `kronecker_shapes`. `choose_kronecker_shape` looks at the matrix.

    Raises:
        ValueError: There is none: one size is 1 and the other 1 or prime.

    Example:
        >>> kronecker_shape(4096, 4096), kronecker_shape(576, 1536), kronecker_shape(5, 7)
        ((64, 64), (32, 32), (5, 1))
    """
    shapes = kronecker_shapes(m, n)
    if not shapes:
        raise ValueError(f"a {m} x {n} matrix is a Kronecker product only with a number; keep it as it is, or pad it")
    return shapes[0]


def balanced_factors(size: int, sites: int) -> tuple[int, ...]:
    """Splits a size into so many factors of similar magnitude, descending; 1 where it has too few prime factors.

    The prime factors, largest first, each go to the factor that is smallest so far.

    Example:
        >>> balanced_factors(4096, 3), balanced_factors(11008, 2), balanced_factors(7, 2)
        ((16, 16, 16), (128, 86), (7, 1))
    """
    if size < 1 or sites < 1:
        raise ValueError(f"size and sites must be at least 1, not {size} and {sites}")
    primes, rest = [], size
    for divisor in range(2, math.isqrt(size) + 1):
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
    if rest > 1:
        primes.append(rest)
    factors = [1] * sites
    for prime in reversed(primes):
        factors[factors.index(min(factors))] *= prime
    return tuple(sorted(factors, reverse=True))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
