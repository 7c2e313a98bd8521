"""Training samples as people see them, as far as the workload knows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from dit_mlflow.report.markdown import one_line
from dit_mlflow.trajectory import Workload
from dit_mlflow.trajectory.appearance import Appearance

_log = logging.getLogger(__name__)

Found = TypeVar("Found")

NAMED = 60
"""Characters of a description inside of a sentence."""


class Gallery:
    """What a workload tells of its samples.

    The workload's functions are a user's: one that fails leaves a gap and a warning, since a report must not lose what
    was computed for it.
    """

    def __init__(self, workload: Workload | None = None) -> None:
        self._workload = workload
        self._failed: set[str] = set()
        self.corrupted = frozenset(() if workload is None else workload.corrupted)
        self.line = lru_cache(maxsize=None)(self._line)

    def appearance(self, index: int) -> Appearance | None:
        """An image, a text or a table row."""
        return None if self._workload is None else self._of("appearance", self._workload.appearance, index)

    def name(self, index: int) -> str:
        """``sample 69 (digit 7, labelled 1)``, or as much of it as is known, :data:`NAMED` characters at most."""
        line = one_line(self.line(index), NAMED)
        return f"sample {index} ({line})" if line else f"sample {index}"

    def _line(self, index: int) -> str:
        """The workload's own description, else the label; empty if neither is known."""
        if self._workload is None:
            return ""
        described = None
        if self._workload.describe is not None:
            described = self._of("describe", self._workload.describe, index)
        if described:
            return one_line(str(described))
        label = self._of("label", self._workload.label_of, index)
        return "" if label is None else f"label {one_line(str(label))}"

    def _of(self, what: str, function: Callable[[int], Found], index: int) -> Found | None:
        try:
            return function(index)
        except Exception as error:  # Of whatever kind: it is the user's code.
            if what not in self._failed:
                self._failed.add(what)
                _log.warning("what the workload tells of samples (%s) is left out of the report: %r", what, error)
            return None
