"""The interface of all estimators of influence, and what groups of them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence import Influence, Query, Window
from dit_mlflow.influence.question import Question
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining import Effort
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state

Measure = Literal["query", "ranking", "suspicion"]
"""What scores mean, see :class:`Method`."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a method found.

    Attributes:
        scores: ``[windows, queries, samples]``, float64, for the question's windows; NaN = not computed
            (:attr:`Method.skips`).
        dtype: of the computation, ``recorded`` if it is the trajectory's.
        details: JSON values for the result's metadata (damping, number of removals, drift).
        standard_error, degrees_of_freedom: of the scores, as in :class:`dit_mlflow.Influence`.
    """

    scores: np.ndarray
    dtype: str = "recorded"
    details: dict[str, Any] = field(default_factory=dict)
    standard_error: np.ndarray | None = None
    degrees_of_freedom: np.ndarray | None = None


class Method(ABC):
    """An estimator of influence: scores of every training sample, per window and query.

    Subclasses are frozen dataclasses whose fields are the method's settings. All are called the same way::

        influence = TracIn()(trajectory, workload, windows)

    Attributes:
        name: in tables, tags and ``-P methods=``.
        kinds: of window score that it can give; empty if the three kinds mean nothing to it (``kind=none``).
        per_window: whether it has scores for windows; otherwise it answers for ``[0, T)`` alone.
        measures: ``query`` = the change of the query when the sample is removed, in its units; ``ranking`` = the same
            sign and order, in units of its own; ``suspicion`` = low scores are suspicious, whatever the query.
        of_many: whether the scores are made for the removal of many samples at once, not of one.
        retrains: whether it retrains without samples, as the ground truth does.
        follows_a_loss: whether it takes the gradients that training followed for those of a function. They are not
            where something is detached, or a hook or an autograd function changes gradients.
        skips: whether NaN among its scores means that it had no look at a sample or a window. Of others, a score that
            is not finite is told, and listed in the result's metadata as ``not_finite``.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()
    per_window: ClassVar[bool] = False
    measures: ClassVar[Measure] = "ranking"
    of_many: ClassVar[bool] = False
    retrains: ClassVar[bool] = False
    follows_a_loss: ClassVar[bool] = False
    skips: ClassVar[bool] = False

    @property
    def question(self) -> Literal["one", "many", "suspicion"]:
        """What the scores tell: the removal of one sample, of many at once, or suspicion, whatever the query."""
        if self.measures == "suspicion":
            return "suspicion"
        return "many" if self.of_many else "one"

    def _expect(self, expected: str, allowed: bool, *settings: str) -> None:
        """Raise :class:`InputError` with the settings' values unless they are allowed."""
        if not allowed:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)
            raise InputError(f"{self.name} with {given}; expected {expected}")

    def _refuse_what_follows_none(self, question: Question) -> None:
        replay = question.trajectory.replay(question.workload)
        replay.loss_step  # noqa: B018  Refuses a step of the workload's own.
        check = replay.derivative_check(0, question.trajectory.num_steps)
        if check is not None and not check.right_throughout():
            raise UnsupportedError(
                f"{self.name} is made for training that follows the gradient of a loss. This one's backward pass is "
                "not the derivative of its forward pass: something is detached, or a hook or an autograd function "
                "changes gradients. Use dit or leave_one_out, which take what training did"
            )

    def informed_by(self, exact: Influence) -> Method:
        """The same method where leave-one-out is known; most have no use for it."""
        return self

    @abstractmethod
    def estimate(self, question: Question) -> Estimate:
        """Answer a question whose windows are those that :attr:`per_window` allows."""

    def __call__(
        self,
        trajectory: Trajectory,
        workload: Workload,
        windows: Sequence[Window] | None = None,
        kind: str = "local",
        queries: Sequence[Query] | None = None,
    ) -> Influence:
        """Scores for each window and query.

        Args:
            trajectory, workload, queries: as for :func:`dit_mlflow.track`.
            windows: step ranges, ``None`` = all of training.
            kind: of window score; a method without kinds says ``none`` in its result.

        Returns:
            Scores ``[windows, queries, training samples]``; of a method that has none for windows, for the one window
            ``[0, T)``. **Sign**: positive = removal raises the query (helpful, for a loss), negative = harmful;
            for a method that measures suspicion, low = suspicious.

        Raises:
            InputError: a window, kind or query that cannot be used.
            TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.
            UnsupportedError: the method cannot be used on this training.
        """
        whole = Window(0, trajectory.num_steps)
        question = Question.of(trajectory, workload, [whole] if windows is None else windows, kind, queries)
        if self.kinds and kind not in self.kinds:
            raise InputError(f"{self.name} has no scores of kind {kind!r}; it has {', '.join(self.kinds)}")
        if not self.per_window:
            question = Question.of(trajectory, workload, [whole], kind, queries)
        with preserved_random_state():
            if self.follows_a_loss:
                self._refuse_what_follows_none(question)
            found = self.estimate(question)
        return question.answer(
            found.scores,
            self.name,
            found.dtype,
            kind=kind if self.kinds else "none",
            asked=None if self.skips else np.arange(workload.num_samples),
            standard_error=found.standard_error,
            degrees_of_freedom=found.degrees_of_freedom,
            measures=self.measures,
            **found.details,
        )


class WindowMethod(Method):
    """A method that estimates the change of the query for every kind of window score."""

    kinds = ("local", "final", "cumulative")
    per_window = True
    measures: ClassVar[Measure] = "query"


@dataclass(frozen=True, kw_only=True)
class RetrainingMethod(WindowMethod):
    """A method that trains again without samples; ``dtype`` (``None`` = as recorded) and ``effort`` say how."""

    retrains = True

    dtype: torch.dtype | None = None
    effort: Effort = field(default_factory=Effort)
