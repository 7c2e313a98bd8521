"""What a workload shows and tells of its training samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np

from dit_mlflow.explanation.markdown import one_line
from dit_mlflow.told import encodable, logger_of
from dit_mlflow.workload.appearance import LONGEST_ROW, Appearance, as_drawn, shrunk

_log = logger_of(__name__)

Found = TypeVar("Found")

TOLD_CHARACTERS = 1000
"""Most characters of a label or a description; most places show fewer."""

NAME_CHARACTERS = 60
"""Characters of a description in a sentence."""


LONGEST_TEXT = 100_000
"""Most characters of a text that are looked at."""


def _bounded(shown: Appearance | None) -> Appearance | None:
    """As much of a sample as anything shows of it, before anything copies it."""
    shown = as_drawn(shown)
    if isinstance(shown, np.ndarray):
        return shrunk(shown)
    if isinstance(shown, str):
        return shown[:LONGEST_TEXT]
    if isinstance(shown, Mapping):
        return {name: shown[name] for name in islice(shown, LONGEST_ROW)}
    return shown


class SampleSource(Protocol):
    """The part of a workload that a gallery needs: how training samples look and what is known of them."""

    @property
    def corrupted(self) -> Sequence[int]: ...

    @property
    def describe(self) -> Callable[[int], str] | None: ...

    def appearance(self, index: int) -> Appearance | None: ...

    def label_of(self, index: int) -> str | None: ...


class Gallery:
    """What a workload shows and tells of its samples.

    If one of the workload's functions fails, its text or picture is left out, with one warning: an error in the user's
    code must not cost a computed report.
    """

    def __init__(self, source: SampleSource | None = None) -> None:
        self._source = source
        self._failed: set[str] = set()
        self.corrupted = frozenset(() if source is None else source.corrupted)
        self.line = lru_cache(maxsize=None)(self._line)

    def appearance(self, index: int) -> Appearance | None:
        """An image, a text or a table row."""
        source = self._source
        if source is None:
            return None
        return self._of("appearance", lambda index: _bounded(source.appearance(index)), index)

    def label_of(self, index: int) -> str | None:
        """The label, as people read it."""
        return None if self._source is None else self._told("label", self._source.label_of, index)

    @property
    def describe(self) -> Callable[[int], str | None] | None:
        """The workload's function that describes a sample, if it has one."""
        given = None if self._source is None else self._source.describe
        return None if given is None else lambda index: self._told("describe", given, index)

    def name(self, index: int) -> str:
        """``sample 69 (digit 7, labelled 1)``, or less, where less is known; at most :data:`NAME_CHARACTERS` inside."""
        line = one_line(self.line(index), NAME_CHARACTERS)
        return f"sample {index} ({line})" if line else f"sample {index}"

    def _line(self, index: int) -> str:
        """The workload's own description, else the label; empty if neither is known."""
        if self.describe is not None and (described := self.describe(index)):
            return one_line(described)
        label = self.label_of(index)
        return "" if label is None else f"label {one_line(label)}"

    def _told(self, what: str, function: Callable[[int], object], index: int) -> str | None:
        def told(index: int) -> str | None:
            found = function(index)
            return None if found is None else encodable(str(found), TOLD_CHARACTERS)

        return self._of(what, told, index)

    def _of(self, what: str, function: Callable[[int], Found], index: int) -> Found | None:
        try:
            return function(index)
        except Exception as error:  # Any kind: it is the user's code.
            if what not in self._failed:
                self._failed.add(what)
                _log.warning("what the workload tells of samples (%s) is left out of the report: %r", what, error)
            return None
