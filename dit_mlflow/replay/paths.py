"""Which way each step of a training takes through its loss, as far as autograd's graph shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from torch import Tensor

from dit_mlflow.trajectory.step_record import StepRecord

COUNTED, COMBINED = 8, 16
"""Numbers of different ways up to which operations are counted, and other combinations of their kinds are new ways.

From then on, only kinds of operations that were met at no step make a new way: a network that draws its layers goes
another way at every step.
"""


class Paths:
    """Notes the operations of each step's loss, and tells the steps whose operations were met at no step before.

    A loss may do something else at some steps: at each fourth, on an epoch's last and smaller batch, after a warm-up.

    Cost: a third of a microsecond for each operation of a noted loss.
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[frozenset[type], Hashable]] = {}
        self._known: set[Hashable] = set()
        self._kinds: frozenset[type] = frozenset()
        self._looked_at = 0

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
        if {kinds, counted} <= self._known:
            return False
        if kinds <= self._kinds and self._looked_at >= (COUNTED if kinds in self._known else COMBINED):
            return False
        self._known |= {kinds, counted}
        self._kinds |= kinds
        self._looked_at += 1
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
