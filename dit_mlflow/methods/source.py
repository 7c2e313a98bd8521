"""SOURCE: training unrolled through a few segments, each with constant gradients and Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence.kind import Sweep, courses, sweeps
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.window import Window
from dit_mlflow.methods.hessian import Curvature, by_parameter, flattened
from dit_mlflow.methods.krylov import krylov_spaces
from dit_mlflow.methods.method import Estimate, WindowMethod
from dit_mlflow.methods.snapshot import Snapshot, mean_coefficients, refuse_ascent, snapshots
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory.step_record import StepRecord


@dataclass(frozen=True)
class Source(WindowMethod):
    r"""Approximate unrolled differentiation (Bae et al. 2024, arXiv 2405.12186), with Hessian-vector products.

    Training is cut into segments with constant Hessian ``H``, samples' gradients ``g_j`` and coefficients ``c_j``, in
    which steps become a flow of duration ``tau``, the sum of the learning rates. From ``lambda``, the query's gradient
    where the window's kind measures it, segment by segment backwards (section 3 there):

    .. math:: w = \frac{1 - e^{-\tau H}}{H} \lambda, \quad
              I_j \mathrel{+}= c_j \langle w, g_j \rangle, \quad
              \lambda \mathrel{-}= H w \; (= e^{-\tau H} \lambda).

    ``H`` and ``g_j`` are means over a few states of the segment, in evaluation mode, ``c_j`` the mean coefficient over
    its steps: ``1 / n`` for whole epochs, as in the paper. Functions of ``H`` act through Krylov spaces instead of the
    paper's Kronecker factors, without damping or a model of curvature. A window counts the part of each segment that it
    covers; when a sample was met within a segment makes no difference. Segments of one step, with small rates, are the
    sweep (``dit``). Sign: positive = removal raises the query.

    Attributes:
        segments: of equal numbers of steps; at most one per step.
        states: of each segment to take means over.
        tolerance: relative, of ``w``.
        iterations: dimension of a Krylov space, at most.

    Raises:
        InputError: settings below 1, or a tolerance that is not positive.
        UnsupportedError: the optimizer is not SGD (momentum counts by its terminal velocity, weight decay as
            curvature), gradients were clipped, parameters were frozen for a part of training, or a window's flow cannot
            be computed (too long, or negative curvature makes it overflow).

    Cost: a replay; per segment and query up to ``iterations`` Hessian-vector products over the training set for each of
    its ``states``, usually about 10; per segment three passes. It fails if the gradients change within a segment, or
    learning rates are too large for a flow.
    """

    name = "source"
    follows_a_loss = True

    segments: int = 3
    states: int = 2
    tolerance: float = 1e-4
    iterations: int = 200

    def __post_init__(self) -> None:
        expected = "at least 1 of each, and a positive tolerance"
        allowed = min(self.segments, self.states, self.iterations) >= 1 and self.tolerance > 0
        self._expect(expected, allowed, "segments", "states", "iterations", "tolerance")

    def estimate(self, question: Question) -> Estimate:
        replay = question.trajectory.replay(question.workload)
        _refuse_other_optimizers(replay)
        planned = sweeps(courses(question.kind, question.windows, question.trajectory.num_steps))
        segments = self._segments(question.trajectory.num_steps)
        gradients = _visit(replay, segments, {sweep.start for sweep in planned}, question)
        scores = np.zeros(question.shape)
        for sweep in planned:
            for piece, weight_gradients in self._unroll(replay, segments, sweep, gradients[sweep.start]):
                for share in sweep.shares:
                    if piece.start in Window(share.lo, share.hi):
                        scores[share.window] += share.sign * weight_gradients
        details = {"segments": len(segments), "states": self.states, "max_drift": replay.max_drift}
        return Estimate(scores, details=details)

    def _segments(self, steps: int) -> list[StretchOfTraining]:
        count = min(self.segments, steps)
        bounds = [k * steps // count for k in range(count + 1)]
        return [StretchOfTraining.of(Window(a, b), self.states) for a, b in pairwise(bounds)]

    def _unroll(
        self, replay: Replay, segments: list[StretchOfTraining], sweep: Sweep, adjoint: np.ndarray
    ) -> Iterator[tuple[Window, np.ndarray]]:
        """Parts of segments, last first, and the weight gradients ``[queries, n]`` of all samples there."""
        cuts = {sweep.start, *(step for share in sweep.shares for step in (share.lo, share.hi))}
        for segment in reversed(segments):
            bounds = {segment.steps.start, segment.steps.end, *cuts}
            inside = [t for t in sorted(bounds) if segment.steps.start <= t <= segment.steps.end]
            for a, b in reversed(list(pairwise(inside))):
                if b <= sweep.start and a >= sweep.stop:
                    times = segment.times(replay, Window(a, b))
                    flows = np.stack([self._flow(segment, times, row) for row in adjoint])
                    yield Window(a, b), segment.products(flows)
                    adjoint = adjoint - np.stack([segment.curvature(flow) for flow in flows])

    def _flow(self, segment: StretchOfTraining, times: np.ndarray, adjoint: np.ndarray) -> np.ndarray:
        """``w``, for times ``[P]`` of each parameter: ``T phi(T H T) T lambda`` with ``T = sqrt(times)``, which keeps
        the operator symmetric, and ``phi(x) = (1 - exp(-x)) / x``.
        """
        root = np.sqrt(times)
        start = root * adjoint
        norm = float(np.linalg.norm(start))
        if not norm > 0:
            return np.zeros_like(start)
        settled = 0
        spaces = krylov_spaces(lambda vector: root * segment.curvature(root * vector), start, self.iterations)
        for space in spaces:
            found = space.first(_phi)
            # The last coordinate is the last dimension's contribution; a single one may be small by chance.
            settled = settled + 1 if abs(found[-1]) <= self.tolerance * np.linalg.norm(found) else 0
            if settled == 2:
                break
        else:
            if len(space.vectors) == self.iterations < len(start):
                raise UnsupportedError(_TOO_LONG)
        return norm * root * (found @ np.stack(space.vectors))


_TOO_LONG = (
    "source cannot follow the flow of this training: learning rates times curvature are too large over a segment, or "
    "its negative curvature makes it overflow. Use dit, or more segments or iterations"
)


def _phi(values: np.ndarray) -> np.ndarray:
    """``(1 - exp(-x)) / x``, 1 at 0."""
    small = np.abs(values) < 1e-12
    with np.errstate(over="ignore"):
        found: np.ndarray = np.where(small, 1.0, -np.expm1(-values) / np.where(small, 1.0, values))
    if not np.isfinite(found).all():
        raise UnsupportedError(_TOO_LONG)
    return found


@dataclass(eq=False)
class StretchOfTraining:
    """A segment of training.

    Attributes:
        steps: ``[a, b)``.
        at: steps of the states whose means represent it.
        snapshots: these states, once the replay has visited them.
        coefficients: mean ``c_j`` over its steps, ``[n]``.
        decay: weight decay of each parameter, ``[P]``.
    """

    steps: Window
    at: tuple[int, ...]
    snapshots: list[Snapshot] = field(default_factory=list)
    coefficients: np.ndarray = field(default_factory=lambda: np.zeros(0))
    decay: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, steps: Window, states: int) -> StretchOfTraining:
        """Represented by up to ``states`` states, in the middle of as many equal parts."""
        length = steps.end - steps.start
        return cls(steps, tuple(sorted({steps.start + (2 * k + 1) * length // (2 * states) for k in range(states)})))

    def curvature(self, vector: np.ndarray) -> np.ndarray:
        """``(H + weight decay) v``, ``[P]``."""
        products = [Curvature(snapshot, self.coefficients).product(vector) for snapshot in self.snapshots]
        return np.mean(products, axis=0) + self.decay * vector

    def products(self, rows: np.ndarray) -> np.ndarray:
        """``c_j <v, g_j>`` for each of ``rows`` ``[rows, P]``: ``[rows, n]``."""
        found = [snapshot.products(by_parameter(snapshot, rows)) for snapshot in self.snapshots]
        return self.coefficients * np.mean(found, axis=0)

    def times(self, replay: Replay, part: Window) -> np.ndarray:
        """The duration of each parameter's flow in a part of it, ``[P]``: the sum of its rates."""
        trained = self.snapshots[0].trained
        total = dict.fromkeys(trained, 0.0)
        for t in range(part.start, part.end):
            step = replay.trajectory.step(t)
            for name, settings in _settings(replay, step).items():
                if name in total and name not in step.no_gradient:
                    total[name] += _rate(settings)
        return _repeated(self.snapshots[0], total)


def _visit(
    replay: Replay, segments: list[StretchOfTraining], starts: set[int], question: Question
) -> dict[int, np.ndarray]:
    """Fill the segments in one replay; returns the queries' gradients ``[queries, P]`` at the steps ``starts``."""
    by_step = {t: segment for segment in segments for t in segment.at}
    gradients = {}
    trained: list[str] | None = None
    for t, snapshot in snapshots(replay, [*by_step, *starts]):
        if trained not in (None, list(snapshot.trained)):
            raise UnsupportedError(
                f"source needs the same trained parameters throughout; at step {t} they are others than before (layers "
                "frozen or unfrozen in training). Use dit"
            )
        trained = list(snapshot.trained)
        if t in by_step:
            by_step[t].snapshots.append(snapshot)
        if t in starts:
            gradients[t] = flattened(snapshot.query_gradients(question.queries))
    for segment in segments:
        steps = [replay.trajectory.step(t) for t in range(segment.steps.start, segment.steps.end)]
        segment.coefficients = mean_coefficients(replay, segment.steps)
        settings = [_settings(replay, step) for step in steps]
        decays = {name: np.mean([each[name]["weight_decay"] for each in settings]) for name in trained or ()}
        segment.decay = _repeated(segment.snapshots[0], decays)
    return gradients


def _settings(replay: Replay, step: StepRecord) -> dict[str, Mapping[str, float]]:
    """Hyperparameters of each parameter that the optimizer holds."""
    groups = zip(replay.trajectory.manifest.optimizer.groups, step.hyperparameters, strict=True)
    return {name: settings for names, settings in groups for name in names}


def _rate(settings: Mapping[str, float]) -> float:
    """Learning rate times the terminal velocity that momentum gives a constant gradient."""
    momentum = settings["momentum"]
    return settings["lr"] * (1 - settings["dampening"]) / (1 - momentum) if momentum else settings["lr"]


def _repeated(snapshot: Snapshot, values: Mapping[str, float | np.floating]) -> np.ndarray:
    """Each parameter's value, repeated for its elements, ``[P]``."""
    return np.concatenate([np.full(value.numel(), values[name]) for name, value in snapshot.trained.items()])


def _refuse_other_optimizers(replay: Replay) -> None:
    layout = replay.trajectory.manifest.optimizer
    clips = replay.loss_step.gradient.clips
    if layout.name != "SGD" or clips:
        what = " and ".join([layout.name, *["clipped gradients"] * clips])
        raise UnsupportedError(
            f"source is derived for SGD, with or without momentum; the training used {what}. Use dit"
        )
    refuse_ascent(replay.trajectory.step(0))
