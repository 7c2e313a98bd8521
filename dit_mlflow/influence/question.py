"""What is asked of a trajectory, checked once, the same for every method."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_mlflow.influence.kind import Kind, check_kind
from dit_mlflow.influence.query import Query, resolve_queries
from dit_mlflow.influence.result import Influence
from dit_mlflow.influence.window import Window, check_windows
from dit_mlflow.replay import Trajectory
from dit_mlflow.trajectory.manifest import library_versions
from dit_mlflow.workload import Workload


@dataclass(frozen=True, eq=False)
class Question:
    """Windows, kind and queries for a trajectory and its workload; made by :meth:`of`, answered by :meth:`answer`."""

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
            WorkloadError: rows of the per-sample loss are those of other samples.
        """
        check_windows(windows, trajectory.num_steps)
        trajectory.couples_samples(workload)
        asked = resolve_queries(queries, workload)
        return cls(trajectory, workload, tuple(windows), check_kind(kind), tuple(asked))

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
        standard_error: np.ndarray | None = None,
        degrees_of_freedom: np.ndarray | None = None,
        **metadata: Any,
    ) -> Influence:
        """The result, with trajectory digest, library versions, and the seconds since the question was asked."""
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
                **({"coupled": True} if self.trajectory.couples_samples(self.workload) else {}),
                **metadata,
            },
        )
