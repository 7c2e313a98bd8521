"""Which way each step of a training takes through its loss, as far as autograd's graph shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from torch import Tensor

from dit_mlflow.trajectory.step_record import StepRecord

COUNTED = 8
"""Number of different ways up to which operations are counted; from then on, only new kinds of them make a new way."""


class Paths:
    """Notes the operations of each step's loss, and tells the steps whose operations were met at no step before.

    A loss may do something else at some steps: at each fourth, on an epoch's last and smaller batch, after a warm-up.

    Cost: a third of a microsecond for each operation of a noted loss.
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[Hashable, Hashable]] = {}
        self._known: set[Hashable] = set()
        self._counted = 0

    def note(self, record: StepRecord, operations: Counter[type]) -> None:
        """The operations of all terms of a step's loss."""
        sizes = tuple(map(len, record.indices))
        counted = frozenset(operations.items()), sizes, record.evaluation_mode
        self._of[record.index] = frozenset(operations), counted

    def is_new(self, record: StepRecord) -> bool:
        """Whether a noted step goes another way than all that were asked about before. It is forgotten."""
        if record.index not in self._of:
            return False
        kinds, counted = self._of.pop(record.index)
        if {kinds, counted} <= self._known or (kinds in self._known and self._counted >= COUNTED):
            return False
        self._known |= {kinds, counted}
        self._counted += 1
        return True


def operations_of(value: Tensor) -> Counter[type]:
    """How many nodes of each kind autograd's graph of ``value`` has."""
    seen, left = set(), [value.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return Counter(map(type, seen))
