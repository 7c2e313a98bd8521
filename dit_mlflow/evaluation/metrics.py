"""Metrics with reasons: a figure, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Metrics:
    """Named figures, and for each figure that is undefined, the reason.

    Attributes:
        values: metric name -> value.
        undefined: metric name -> why it has no value.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    undefined: Mapping[str, str] = field(default_factory=dict)

    def prefixed(self, prefix: str) -> Metrics:
        """The same with ``prefix`` before every name."""
        return Metrics(
            {prefix + name: value for name, value in self.values.items()},
            {prefix + name: reason for name, reason in self.undefined.items()},
        )

    def and_(self, other: Metrics) -> Metrics:
        """Both together; of a name in both, ``other``'s."""
        return Metrics({**self.values, **other.values}, {**self.undefined, **other.undefined})

    def only(self, *names: str) -> Metrics:
        """Those of ``names`` that are there."""
        return Metrics(
            {name: value for name, value in self.values.items() if name in names},
            {name: reason for name, reason in self.undefined.items() if name in names},
        )
