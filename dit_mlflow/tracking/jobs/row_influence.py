"""Which training samples helped or hurt on given rows, for the evaluator and the influence model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_mlflow.errors import DitError, InputError
from dit_mlflow.explanation import Checks, Explanation, explain
from dit_mlflow.influence import Kind, Query, Window, check_kind, parse_windows, row_losses
from dit_mlflow.influence.row_queries import BatchOfRow, Features
from dit_mlflow.replay import Trajectory
from dit_mlflow.tracking.jobs.request import Request, recorded_workload
from dit_mlflow.tracking.store.artifacts import load_trajectory
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state
from dit_mlflow.workload.without_graph import without_graph


@dataclass(frozen=True)
class RowAnswer:
    """Influence of every training sample on every row.

    Attributes:
        explanation: the queries are the rows, ``loss of row 0`` …
        losses: of the rows at the end of training, ``[rows]``.
    """

    explanation: Explanation
    losses: np.ndarray


@dataclass(frozen=True, eq=False)
class RowQuestion:
    """A recorded training that answers questions about rows, any number of times; made by :meth:`of`."""

    training_run: str
    trajectory: Trajectory
    workload: Workload
    windows: tuple[Window, ...]
    kind: Kind

    @classmethod
    def of(
        cls,
        training_run: str,
        windows: str | int = "1",
        kind: str = "local",
        workload: Workload | str = "",
        settings: Mapping[str, Any] | None = None,
        trust_workload: bool = False,
    ) -> RowQuestion:
        """Load the trajectory and its workload.

        Args:
            training_run: a run with a trajectory.
            windows: see :func:`dit_mlflow.parse_windows`; ``"1"`` = the whole training.
            kind: ``local``, ``final`` or ``cumulative``.
            workload: itself, or a reference; empty = the one that the trajectory was recorded with.
            settings: of a workload given by reference.
            trust_workload: run the workload that the trajectory names, whatever that is.

        Raises:
            DitError: one of these cannot be found or used.
        """
        checked = check_kind(kind)
        trajectory = load_trajectory(training_run)
        if not isinstance(workload, Workload):
            request = Request(
                training_run=training_run,
                workload=workload,
                settings=dict(settings or {}),
                trust_workload=trust_workload,
            )
            workload = recorded_workload(request, trajectory)
        elif settings:
            raise InputError("settings belong to a workload given by reference; this one is built already")
        return cls(training_run, trajectory, workload, tuple(parse_windows(str(windows), trajectory)), checked)

    def answer(
        self,
        features: Features,
        targets: Sequence[Any] | np.ndarray,
        batch: BatchOfRow | None = None,
        whole_run: bool = False,
    ) -> RowAnswer:
        """Influence on each row's loss.

        Args:
            features, targets, batch: see :func:`dit_mlflow.influence.row_losses`.
            whole_run: also over all of training.

        Raises:
            DitError: see :func:`dit_mlflow.influence.row_losses` and :func:`dit_mlflow.track`.

        Cost: as :func:`dit_mlflow.track` with one query for each row.
        """
        queries = row_losses(self.workload, features, targets, batch)
        # First, since one step shows whether the model takes these rows.
        losses = self._final_losses(queries)
        if not np.isfinite(losses).all():
            row = int(np.argmin(np.isfinite(losses)))
            raise InputError(
                f"the loss of row {row} is {losses[row]}, for which influence is undefined; look for values far "
                "from those that the model was trained on"
            )
        asked = self.trajectory, self.workload, self.windows, self.kind, queries
        return RowAnswer(explain(*asked, method="dit", checks=Checks(), whole_run=whole_run), losses)

    def _final_losses(self, queries: Sequence[Query]) -> np.ndarray:
        with preserved_random_state():
            last = self.trajectory.num_steps
            (state,) = self.trajectory.states(self.workload, last, last)
            model = state.load_into(self.workload.build_model()).eval()
            try:
                return without_graph(lambda: np.array([query(model).item() for query in queries]))
            except DitError:
                raise
            except Exception as error:  # Any kind: the model and the loss are the user's.
                raise InputError(
                    f"the model of run {self.training_run} or its loss cannot take these rows: {type(error).__name__}: "
                    f"{error}; rows are given as its training samples were"
                ) from error
