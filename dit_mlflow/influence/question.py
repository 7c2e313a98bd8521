"""The question that a method answers about a trajectory, checked once, in the same way for every method."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence.kind import Kind, check_kind
from dit_mlflow.influence.query import Query, resolve_queries
from dit_mlflow.influence.result import Influence
from dit_mlflow.influence.window import Window, check_windows
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.not_finite import named
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.manifest import library_versions
from dit_mlflow.workload import Workload

_log = logger_of(__name__)


@dataclass(frozen=True, eq=False)
class Question:
    """Windows, kind and queries for a trajectory and its workload; :meth:`of` checks them, :meth:`answer` answers."""

    trajectory: Trajectory
    workload: Workload
    windows: tuple[Window, ...]
    kind: Kind
    queries: tuple[Query, ...]
    asked_at: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(
        cls,
        trajectory: Trajectory,
        workload: Workload,
        windows: Sequence[Window],
        kind: str,
        queries: Sequence[Query] | None,
    ) -> Question:
        """Check every part.

        Raises:
            InputError: a window, kind or query that cannot be used.
            WorkloadError: rows of the per-sample loss belong to other samples.
        """
        check_windows(windows, trajectory.num_steps)
        asked = cls(trajectory, workload, tuple(windows), check_kind(kind), ())
        asked.couples_samples()
        return replace(asked, queries=tuple(resolve_queries(queries, workload)))

    def couples_samples(self) -> bool:
        """Whether the loss couples samples at steps that the question is about."""
        first = min(window.start for window in self.windows)
        last = max(window.end for window in self.windows)
        return self.trajectory.couples_samples(
            self.workload,
            0 if self.kind == "cumulative" else first,
            self.trajectory.num_steps if self.kind == "final" else last,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the scores: ``(windows, queries, samples)``."""
        return len(self.windows), len(self.queries), self.workload.num_samples

    def answer(
        self,
        scores: np.ndarray,
        method: str,
        dtype: str,
        kind: str | None = None,
        asked: np.ndarray | None = None,
        standard_error: np.ndarray | None = None,
        degrees_of_freedom: np.ndarray | None = None,
        **metadata: Any,
    ) -> Influence:
        """The result, with trajectory digest, library versions, and the seconds since the question was asked.

        An infinite score, and a NaN of a sample in ``asked``, becomes NaN, with a warning, and its sample is listed in
        the metadata as ``not_finite``.

        Args:
            asked: samples that must have scores; ``None`` = NaN means not computed.

        Raises:
            UnsupportedError: no sample in ``asked`` has a finite score for some window and query.
        """
        scores, flagged = self._finite(scores, method, asked)
        return Influence(
            scores=scores,
            windows=self.windows,
            queries=tuple(query.name for query in self.queries),
            samples=np.arange(self.workload.num_samples),
            kind=kind or self.kind,
            method=method,
            standard_error=standard_error,
            degrees_of_freedom=degrees_of_freedom,
            metadata={
                "trajectory_digest": self.trajectory.manifest.digest(),
                "dtype": dtype.removeprefix("torch."),
                "versions": library_versions(),
                "seconds": time.perf_counter() - self.asked_at,
                **({"not_finite": flagged} if flagged else {}),
                **({"coupled": True} if self.couples_samples() else {}),
                **metadata,
            },
        )

    def _finite(self, scores: np.ndarray, method: str, asked: np.ndarray | None) -> tuple[np.ndarray, list[int]]:
        """Scores with NaN in place of those that are not finite, and the samples of these."""
        wrong = np.isinf(scores)
        if asked is not None:
            wrong[:, :, asked] |= np.isnan(scores[:, :, asked])
            for window, query in np.argwhere(wrong[:, :, asked].all(axis=2)):
                raise UnsupportedError(
                    f"{method} gives no finite score for steps {self.windows[window]} and query "
                    f"{self.queries[query].name!r}: whichever sample is left out, training diverges, or the query has "
                    "no finite value"
                )
        flagged: list[int] = np.flatnonzero(wrong.any(axis=(0, 1))).tolist()
        if flagged:
            _log.warning("%s gives scores that are not finite for %s; they are left out (NaN)", method, named(flagged))
        return np.where(wrong, np.nan, scores), flagged
