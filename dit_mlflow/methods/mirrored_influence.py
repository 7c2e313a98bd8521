"""Mirrored influence: what a step on the query does to the training samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dit_mlflow.errors import DitError, UnsupportedError
from dit_mlflow.influence import Query, Window
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.snapshot import Snapshot, snapshot_at, snapshots
from dit_mlflow.methods.tracin import learning_rates
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory import State, StepRecord


@dataclass(frozen=True)
class MirroredInfluence(Method):
    r"""Fall of a sample's loss under training on the query (Ko et al. 2024, arXiv 2402.08922, "Forward-INF").

    .. math:: I_j = l_j(\theta_b) - l_j(\theta'), \qquad \theta' = \theta_b - \eta \nabla q(\theta_b)

    from the model at the window's end, in evaluation mode, with ``steps`` plain gradient steps on the query. The
    hypothesis: if training on the query lowers a sample's loss, the sample's removal raises the query, and by as much.
    Sign: positive = removal raises the query. To first order it is ``eta <grad l_j, grad q>`` (``grad_dot``), but needs
    no gradient of a training sample.

    Attributes:
        steps: on the query; more of them are the paper's short fine-tuning.
        lr: ``eta`` of every parameter; default: the largest that its param group had in the window.
        ascent: step up the query instead (the paper's unlearning), and score the rise of the losses.

    Raises:
        UnsupportedError: the window's learning rates are all 0, or the steps make losses infinite or NaN.

    Cost: ``steps`` passes forward and backward over the query and one forward pass over the training set, for each
    query; one forward pass more for each window. It fails if the steps are so long that the model breaks, or so short
    that the change drowns in rounding; and, like all methods that look at one state, if a sample's effect lies far
    back.
    """

    name = "mirrored_influence"
    per_window = True

    steps: int = 1
    lr: float | None = None
    ascent: bool = False

    def __post_init__(self) -> None:
        allowed = self.steps >= 1 and (self.lr is None or self.lr > 0)
        self._expect("1 step or more, and a positive lr", allowed, "steps", "lr")

    def estimate(self, question: Question) -> Estimate:
        replay = question.trajectory.replay(question.workload)
        scores = np.empty(question.shape)
        for t, snapshot in snapshots(replay, [window.end for window in question.windows]):
            step, before = replay.trajectory.step(t - 1), snapshot.losses()
            for k, window in enumerate(question.windows):
                if window.end == t:
                    rates = self._rates(replay, window)
                    for row, query in enumerate(question.queries):
                        scores[k, row] = self._falls(replay, snapshot, step, query, rates, before)
        return Estimate(scores, details={"steps": self.steps, "max_drift": replay.max_drift})

    def _rates(self, replay: Replay, window: Window) -> dict[str, float]:
        """``eta`` of each parameter."""
        rates = learning_rates(replay, replay.trajectory.step(window.start))
        if self.lr is not None:
            return dict.fromkeys(rates, self.lr)
        for t in range(window.start + 1, window.end):
            later = learning_rates(replay, replay.trajectory.step(t))
            rates = {name: max(rate, later[name]) for name, rate in rates.items()}
        if not any(rates.values()):
            raise UnsupportedError(
                f"the learning rate is 0 in all of steps {window.start} to {window.end}; mirrored_influence takes its "
                "step from it. Give MirroredInfluence(lr=...), or use grad_dot, which needs none"
            )
        return rates

    def _falls(
        self,
        replay: Replay,
        snapshot: Snapshot,
        step: StepRecord,
        query: Query,
        rates: dict[str, float],
        before: np.ndarray,
    ) -> np.ndarray:
        """``l_j(theta) - l_j(theta')``, ``[n]``; the opposite after an ascent."""
        direction = 1 if self.ascent else -1
        moved = snapshot
        try:
            for _ in range(self.steps):
                parameters = {name: value.detach() for name, value in moved.state.parameters.items()}
                for name, gradient in moved.query_gradients([query]).items():
                    parameters[name] = parameters[name] + direction * rates[name] * gradient[0]
                state = State(parameters, snapshot.state.buffers)
                moved = snapshot_at(replay, state, step)
            return direction * (moved.losses() - before)
        except DitError as error:
            if moved is snapshot:
                raise
            raise UnsupportedError(
                f"{self.steps} step(s) on query {query.name!r} with learning rates up to {max(rates.values()):g} lead "
                "to losses that are not finite. Give MirroredInfluence(lr=...) a smaller one"
            ) from error
