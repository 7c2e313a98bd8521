"""Krylov spaces of a symmetric operator, which approximate functions of it applied to a vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import eigh_tridiagonal

Product = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Krylov:
    """``span(v, A v, …, A^{m-1} v)`` in an orthonormal basis, and ``A`` projected onto it.

    Attributes:
        vectors: the basis, ``[m, P]``, beginning with ``v / |v|``.
        diagonal, beside: of the projection, ``[m]`` and ``[m - 1]``; it is tridiagonal.
    """

    vectors: list[np.ndarray]
    diagonal: np.ndarray
    beside: np.ndarray

    @cached_property
    def eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """The projection's eigenvalues ``[m]``, ascending (Ritz values), and eigenvectors ``[m, m]``, by column."""
        if len(self.diagonal) == 1:
            return self.diagonal, np.ones((1, 1))
        return eigh_tridiagonal(self.diagonal, self.beside)

    def first(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """``f(A) v / |v|`` in the basis, ``[m]``."""
        values, vectors = self.eigen
        return vectors @ (function(values) * vectors[0])


def krylov_spaces(product: Product, start: np.ndarray, most: int) -> Iterator[Krylov]:
    """The spaces of 1, 2, … dimensions from ``start`` (not 0), up to ``most`` or to an invariant one.

    Lanczos' iteration. Every vector is orthogonalised against all before it, twice, so that rounding does not repeat
    eigenvalues.

    Cost: a product and ``4 m P`` operations for each dimension; ``m P`` float64 are held.
    """
    vectors = [start / np.linalg.norm(start)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(vectors[-1])
        diagonal.append(float(image @ vectors[-1]))
        yield Krylov(list(vectors), np.array(diagonal), np.array(beside))
        basis = np.stack(vectors)
        for _ in range(2):
            image = image - (basis @ image) @ basis
        length = float(np.linalg.norm(image))
        largest = np.abs(np.concatenate([diagonal, beside])).max()
        if len(vectors) == min(most, len(start)) or not length > 1e-12 * largest:
            return
        beside.append(length)
        vectors.append(image / length)


def krylov_space(product: Product, start: np.ndarray, most: int) -> Krylov:
    """The last of :func:`krylov_spaces`."""
    *_, space = krylov_spaces(product, start, most)
    return space
