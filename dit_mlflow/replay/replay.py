"""Rebuild every ``s_t``, as recorded or under other weights, forwards and backwards, within bounded memory."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from dit_mlflow.errors import InputError, TrajectoryError, UnsupportedError
from dit_mlflow.replay.derivative_check import DerivativeCheck
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.replay.loss_step import LossStep
from dit_mlflow.replay.not_finite import refuse_diverged
from dit_mlflow.replay.own_step import OwnStep
from dit_mlflow.replay.right_queries import RightQueries
from dit_mlflow.replay.rounding import missed_by_rounding
from dit_mlflow.replay.training_step import TrainingStep, WeightsOf
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.record import Record
from dit_mlflow.trajectory.state import REPLAY_TOLERANCE, State, drifts, other_optimizer_state
from dit_mlflow.workload.dataset_digest import check_dataset
from dit_mlflow.workload.workload import Workload

MakeStep = Callable[[Dynamics], TrainingStep]


def step_of(dynamics: Dynamics) -> TrainingStep:
    """How a workload's training makes a step: by its own, or by a loss, then an optimizer."""
    return LossStep(dynamics) if dynamics.workload.step is None else OwnStep(dynamics)


_log = logger_of(__name__)

STATES_IN_MEMORY = 2**30
"""Default bytes for the states of a backward walk; steps whose states need more are replayed several times."""

MADE_FOR_A_LOSS = (
    "this method needs steps of a loss, then an optimizer; here a step is {}. Use dit, removal or leave_one_out, "
    "which take any step"
)

FEWEST_STATES = 4
"""Smallest number of states that a backward walk needs room for."""


@dataclass(frozen=True)
class _Walk:
    """How a walk makes and holds states.

    Attributes:
        weights: of the samples; ``None`` = as recorded.
        budget: bytes for the states held at one time.
        optimizer_values: whether states between checkpoints keep the values of the optimizer's state.
        recycled: states that are no longer needed, whose memory is used again.
    """

    weights: WeightsOf | None = None
    budget: int = 0
    optimizer_values: bool = True
    recycled: list[State] = field(default_factory=list)


class Replay:
    """Walks a trajectory in the recorded dtype, or in another from ``s_0``.

    Construction replays the steps up to the first checkpoint after ``s_0`` (one step, by default) and compares the
    states, so that a workload which is not the recorded one is refused before any long work. It warns where no such
    checkpoint is stored. In another dtype, states cannot be compared, so construction first replays up to the last
    checkpoint in the recorded dtype, at the cost of one training.

    Args:
        trajectory, workload: what was recorded.
        dtype: of all computation; ``None`` = as recorded.
        make_step: builds the step from model and data; default: the workload's own, or a loss, then an optimizer.

    Attributes:
        training_step: one step as a function.
        dynamics: its model and data.
        drift: checkpoint step -> relative drift found there so far (recorded dtype only).

    Raises:
        InputError: ``dtype`` is not a floating dtype.
        TrajectoryError: the workload is not the recorded one.
    """

    def __init__(
        self,
        trajectory: Record,
        workload: Workload,
        dtype: torch.dtype | None = None,
        make_step: MakeStep = step_of,
    ) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f"dtype is {dtype!r}; expected torch.float64, torch.float32, or None for the recorded one")
        check_dataset(workload.train_set, trajectory.manifest.dataset)
        if workload.step is not None and make_step is not step_of:
            raise UnsupportedError(MADE_FOR_A_LOSS.format("one of the workload's own"))
        self.trajectory = trajectory
        self.drift: dict[int, float] = {}
        self.make_step = make_step
        self.training_step = make_step(Dynamics(workload, trajectory.manifest, stored=trajectory.batches))
        self._anchors = trajectory.checkpoint_steps
        self._outset: tuple[int, State] | None = None
        self._queries: RightQueries | None = None
        if len(self._anchors) > 1:
            self._meet(self._anchors[1])
        elif trajectory.num_steps:
            _log.warning(
                "no state after the first is stored in %s (training was interrupted, with checkpoint_every=0), so "
                "replay cannot check whether the workload is the recorded one",
                trajectory.directory,
            )
        if dtype is not None and dtype != trajectory.manifest.model.dtype:
            self._meet(self._anchors[-1])
            self.training_step = make_step(Dynamics(workload, trajectory.manifest, dtype, trajectory.batches))
            self._anchors = (0,)

    @property
    def dynamics(self) -> Dynamics:
        return self.training_step.dynamics

    @property
    def loss_step(self) -> LossStep:
        """The step, for methods that use its loss or its optimizer.

        Raises:
            UnsupportedError: it is not a :class:`LossStep`.
        """
        if not isinstance(self.training_step, LossStep):
            raise UnsupportedError(MADE_FOR_A_LOSS.format(f"a {type(self.training_step).__name__}"))
        return self.training_step

    def derivative_check(self, first: int, last: int) -> DerivativeCheck | None:
        """The check of the step between two states; ``None`` for kinds of step that are not checked."""
        step = self.training_step
        if isinstance(step, OwnStep) or (isinstance(step, LossStep) and type(step) is LossStep):
            return DerivativeCheck(self.trajectory, step, first, last)
        return None

    def right_queries(self, first: int, last: int) -> RightQueries:
        """Queries of the model; their derivatives are compared at a stored state of ``first … last``. Made once."""
        if self._queries is None:
            step = self.training_step
            compared = isinstance(step, (LossStep, OwnStep))
            check = DerivativeCheck(self.trajectory, step, first, last) if compared else None  # type: ignore[arg-type]
            self._queries = RightQueries(step, check)
        return self._queries

    @property
    def max_drift(self) -> float:
        """Largest drift found so far; 0 = bit for bit."""
        return max(self.drift.values(), default=0.0)

    def forward(self, a: int, b: int, weights: WeightsOf | None = None) -> Iterator[State]:
        """Yield ``s_a … s_b``; with ``weights``, ``s_a`` is the recorded one and later states follow the weights."""
        if not 0 <= a <= b <= self.trajectory.num_steps:
            raise InputError(f"states {a} … {b} were asked; the trajectory has 0 … {self.trajectory.num_steps}")
        self._refuse_diverged(b)
        if weights is not None:
            yield from self._segment(self.recorded(a), a, b, _Walk(weights))
            return
        anchor = max(step for step in self._anchors if step <= a)
        if anchor == b:
            yield self.checkpoint(b)
            return
        end = self._next_anchor(b)
        for lo, hi in pairwise([anchor, *(step for step in self._anchors if anchor < step < end), end]):
            for t, state in enumerate(self._segment(self.checkpoint(lo), lo, hi, _Walk()), start=lo):
                if a <= t <= b and (t < hi or t == end):
                    yield state

    def backward(
        self,
        a: int,
        b: int,
        memory_budget: int | None = None,
        optimizer_values: bool = True,
        weights: WeightsOf | None = None,
        copies: int | None = None,
    ) -> Iterator[tuple[int, State]]:
        """Yield ``(b, s_b), (b - 1, s_{b-1}), …, (a, s_a)``: the states of :meth:`forward`, last first.

        A yielded state is valid until the second next one is asked for; then its memory is used again.

        Args:
            a, b: ``0 <= a <= b <= T``.
            memory_budget: bytes that the states held at one time may take. Default: enough for all states between two
                checkpoints (about ``2 sqrt(T)`` states as recorded by default), and up to :data:`STATES_IN_MEMORY`.
            optimizer_values: ``False`` = between checkpoints, the optimizer's state has its keys only (values
                ``None``), which takes less memory.
            weights: as for :meth:`forward`.
            copies: ``K`` trainings side by side under weights ``[K, sum B]``, in states with a leading dimension.

        Steps between checkpoints whose states do not fit are replayed in pieces, from states placed as in binomial
        checkpointing (Griewank and Walther 2000, doi 10.1145/347837.347846): with room for ``c`` states,
        ``C(c + r, r)`` steps cost at most ``r`` replays. The states are the same bit for bit.

        Raises:
            InputError: the budget does not hold :data:`FEWEST_STATES` states.
        """
        self._refuse_diverged(b)
        walk = _Walk(weights, self._budget(memory_budget), optimizer_values)
        # Checkpoints are of the recorded weights alone.
        anchors = [step for step in self._anchors if step < b] if weights is None else [a]
        hi, first = self._next_anchor(b) if weights is None else b, True
        previous: State | None = None
        for lo in reversed(anchors):
            start = self.checkpoint(lo) if weights is None else self.recorded(lo)
            start = start if copies is None else start.side_by_side(copies)
            for t, state in self._backward_segment(start, lo, hi, walk):
                if t < a:
                    return
                if t <= b and (t < hi or first):
                    yield t, state
                if previous is not None:
                    walk.recycled.append(previous)
                # Recycled checkpoints would pile up, since each is loaded into new memory.
                previous = state if lo < t < hi else None
            if lo <= a:
                return
            hi, first = lo, False
        if b == 0:
            yield 0, self.checkpoint(0)

    def _budget(self, asked: int | None) -> int:
        each = self.checkpoint(0).nbytes
        if asked is None:
            return max(STATES_IN_MEMORY, (2 * math.isqrt(self.trajectory.num_steps) + 2) * each)
        if not asked >= FEWEST_STATES * each:
            raise InputError(
                f"memory_budget={asked} bytes; one state takes {each}, and at least {FEWEST_STATES} must fit "
                f"({FEWEST_STATES * each} bytes)"
            )
        return asked

    def _backward_segment(self, start: State, lo: int, hi: int, walk: _Walk) -> Iterator[tuple[int, State]]:
        """``(hi, s_hi) … (lo, s_lo)``, by replay from ``start = s_lo``."""
        length = hi - lo
        each = start.nbytes if walk.optimizer_values else start.without_optimizer_values().nbytes
        if length * each <= walk.budget or length <= 2:
            states = list(self._segment(start, lo, hi, walk))
            while states:
                yield lo + len(states) - 1, states.pop()
            return
        mid = lo + _first_piece(length, max(1, walk.budget // start.nbytes))
        records = map(self.trajectory.step, range(lo, mid))
        middle = self.training_step.run(start, records, walk.weights, walk.recycled.pop() if walk.recycled else None)
        rest = replace(walk, budget=walk.budget - middle.nbytes)
        yield from self._backward_segment(middle, mid, hi, rest)
        yield from self._backward_segment(start, lo, mid - 1, walk)

    def _segment(self, start: State, lo: int, hi: int, walk: _Walk) -> Iterator[State]:
        """Replay ``s_lo … s_hi`` from ``start``; a checkpoint at ``hi`` is compared, and yielded instead."""
        state, thin = start, start
        for t in range(lo, hi):
            yield thin
            over = walk.recycled.pop() if walk.recycled else State({})
            if not walk.optimizer_values and state is not start:
                # The optimizer's values were not yielded, so their memory is free.
                over = State(over.parameters, over.buffers, state.optimizer)
            record = self.trajectory.step(t)
            state = self.training_step(state, record, None if walk.weights is None else walk.weights(record), over)
            thin = state if walk.optimizer_values else state.without_optimizer_values()
        if walk.weights is None and _holds(self._anchors, hi):
            recorded = self.checkpoint(hi)
            if hi > lo:
                self._compare(lo, hi, thin, recorded, start)
            thin = recorded
        yield thin

    def recorded(self, a: int) -> State:
        """``s_a`` as recorded; the last one is kept, since many walks under weights start at the same state."""
        if self._outset is None or self._outset[0] != a:
            self._outset = a, next(self.forward(a, a))
        return self._outset[1]

    def _refuse_diverged(self, b: int) -> None:
        """Raise if training diverged before ``s_b``: in another dtype, the replayed states may stay finite."""
        if self.dynamics.dtype is not None:
            last = max(step for step in self.trajectory.checkpoint_steps if step <= b)
            refuse_diverged(self.trajectory.checkpoint(last), last, self.trajectory)

    def _meet(self, checkpoint: int) -> None:
        """Replay up to a checkpoint, in order to compare."""
        for _ in self.forward(0, checkpoint):
            pass

    def _next_anchor(self, t: int) -> int:
        """The first anchor at ``t`` or later, where a replay can be compared, or ``t`` if there is none."""
        return min((step for step in self._anchors if step >= t), default=t)

    def _compare(self, lo: int, hi: int, replayed: State, recorded: State, origin: State) -> None:
        found = drifts(replayed, recorded, origin)
        if max(found.values()) > REPLAY_TOLERANCE:
            refuse_what_diverged(lo, hi, replayed, recorded)
            steps = [self.trajectory.step(t) for t in range(lo, hi)]
            excused = missed_by_rounding(self.training_step, steps, origin, replayed, recorded)
            if noise := [name for name in excused if found[name] > REPLAY_TOLERANCE]:
                _log.info("steps %d to %d: rounding alone moves %s as far as the replay misses", lo, hi, sorted(noise))
            found = {name: drift for name, drift in found.items() if name not in noise}
        worst = max(found, key=lambda name: found[name], default="")
        drift = self.drift[hi] = found.get(worst, 0.0)
        if drift > REPLAY_TOLERANCE:
            raise TrajectoryError(
                f"replaying up to step {hi} misses the checkpoint there by {drift:.2g} of the distance that "
                f"training moved {worst!r} (allowed {REPLAY_TOLERANCE:g}): the workload does not do what the recorded "
                "loop did. Compare its loss (one value per sample), coefficients, accumulate, clipping, "
                "regularizer and data with the loop's. Where the loop draws a batch but does not use it (continue, "
                "break, a step that a GradScaler skips), call recorder.discard(); for a loss scaled by hand, give "
                "coefficients"
            )
        # Where rounding is the same, the optimizer's state must be too; elsewhere the next checkpoint shows it.
        if drift == 0.0 and (wrong := other_optimizer_state(replayed, recorded)):
            raise TrajectoryError(
                f"replaying up to step {hi} gives the parameters of the checkpoint bit for bit, but not its "
                f"optimizer's state: {wrong}. The checkpoint has been changed, or the workload does not do what the "
                "recorded loop did, which a learning rate of 0 keeps from the parameters"
            )

    def checkpoint(self, t: int) -> State:
        """The stored ``s_t``, on the model's device and in the dtype of the replay."""
        return self.trajectory.checkpoint(t).to(self.dynamics.device, self.dynamics.dtype)


def _holds(ordered: Sequence[int], step: int) -> bool:
    place = bisect_left(ordered, step)
    return place < len(ordered) and ordered[place] == step


def refuse_what_diverged(lo: int, hi: int, replayed: State, recorded: State) -> None:
    """Raise if a parameter is finite neither in the replay nor in the record, so that they cannot be compared."""
    for name, value in recorded.parameters.items():
        if not (value.isfinite().all() or replayed.parameters[name].isfinite().all()):
            raise TrajectoryError(
                f"training diverged between step {lo} and step {hi}: {name!r} is no longer finite there, and from then "
                f"on no state can be rebuilt. Ask for windows up to step {lo}"
            )


def _first_piece(length: int, room: int) -> int:
    """After how many of ``length`` steps to hold a state, if ``room`` states fit: ``1 <= piece < length``."""
    repeats = 1
    while math.comb(room + repeats, repeats) < length:
        repeats += 1
    # Below length: as many steps as one repeat less walks.
    return math.comb(room + repeats - 1, room)
