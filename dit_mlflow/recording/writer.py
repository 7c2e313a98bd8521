"""Append to a trajectory folder, segment by segment, beside the training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_mlflow.recording.folder import Segment, TrajectoryFolder, Written, claimed
from dit_mlflow.recording.recorded_model import TrainingSet
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.manifest import Manifest, ModelLayout, OptimizerLayout, library_versions
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepFields
from dit_mlflow.workload.projects import WorkloadReference

FLUSH_BYTES = 16 * 2**20
"""Size at which gathered segments are written, so that files are few and large, …"""
FLUSH_SECONDS = 10.0
"""… and time after the last write at which they are anyway, so that a crash loses little."""
UNWRITTEN_BYTES = 256 * 2**20
"""Size that is kept in memory for a failing disk to recover, before recording stops."""

Facts = Mapping[str, Any]
"""The manifest's fields that change as training goes on."""

logger = logger_of(__name__)


class Unwritten(NamedTuple):
    """What could not be written, and why."""

    error: Exception
    segment: Segment


class TrajectoryWriter:
    """Writes one trajectory; not for several processes at once.

    A segment is the steps between two checkpoints. Segments, and the steps of an unfinished one, are gathered into
    checkpoint shards and one ``steps-NNNNN.safetensors``. The manifest is replaced after they are on disk, so that the
    folder holds a complete trajectory at any time. A thread writes, so that training waits only if the disk is slower.

    A failing disk does not stop training: the failure is logged once, the steps that were gathered are written as far
    as there is space, and states, which a replay makes, are tried again with what follows; when that exceeds
    :data:`UNWRITTEN_BYTES`, recording stops.

    Attributes:
        failure: why the last attempt to write failed; ``None`` if it did not.
        stopped: whether recording has stopped for good.
    """

    def __init__(
        self,
        directory: Path,
        model: ModelLayout,
        optimizer: OptimizerLayout,
        workload: WorkloadReference | None,
        training_set: TrainingSet,
        on_written: Callable[[Written], None] | None = None,
    ) -> None:
        self.directory = directory
        self._training_set = training_set
        self.failure: BaseException | None = None
        self.stopped = False
        empty = Manifest(
            complete=False,
            num_steps=0,
            num_samples=None,
            epoch_ends=(),
            model=model,
            optimizer=optimizer,
            steps=(),
            checkpoints=(),
            files={},
            workload=workload,
            dataset=None,
            versions=library_versions(),
            threads=torch.get_num_threads(),
        )
        self._folder = TrajectoryFolder(directory, empty)
        self._epoch: int | None = None
        self._last_state = 0
        self._epoch_ends: list[int] = []
        self._gathered = Segment(0)
        self._on_written = on_written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dit-mlflow-writer")
        self._process = os.getpid()
        self._writing: Future[Unwritten | None] | None = None
        self._last_flush = time.monotonic()

    @property
    def is_copy(self) -> bool:
        """Whether this process was forked from the one that began to write; then it writes nothing."""
        return os.getpid() != self._process

    def begin(self, initial: State) -> None:
        """Write ``s_0``, so that a state that cannot be stored is refused early, and a killed run leaves its start.

        Raises:
            UnsupportedError: a tensor that cannot be stored.
            TrajectoryError: another recorder has begun there.
            OSError: the folder cannot be written.
        """
        self._process = os.getpid()
        with claimed(self.directory):
            self._append(Segment(0, states={0: initial}), self._facts(complete=False))

    def resume(self, begun: Manifest, step: int, epoch: int | None) -> None:
        """Go on with a trajectory from its checkpoint at ``step``, in place of :meth:`begin`.

        Args:
            epoch: that of the step before; ``None`` if there is none.
        """
        self._process = os.getpid()
        self._folder.resume(begun, step)
        self._training_set.digest, self._training_set.num_samples = begun.dataset, begun.num_samples
        self._epoch_ends = list(self._folder.manifest.epoch_ends[:-1])  # The last may go on.
        self._epoch = epoch
        self._gathered = Segment(step)
        self._last_state = step

    @property
    def _num_steps(self) -> int:
        # Counted, since a KeyboardInterrupt may come between any two lines.
        return self._gathered.first_step + len(self._gathered.rows)

    def add_step(self, step: StepFields, batches: Sequence[Sequence[Tensor]] = ()) -> None:
        """Keep the record of the next step, and the tensors of its micro-batches if they are stored.

        One that is kept already is not kept again: a caller who was interrupted may repeat the call.
        """
        if self.stopped or step["index"] < self._num_steps:
            return
        gathered = self._gathered
        if batches:
            gathered.batches[self._num_steps] = batches
            gathered.nbytes += sum(tensor.nbytes for batch in batches for tensor in batch)
        if step["epoch"] != self._epoch:
            self._epoch_ends.append(self._num_steps)
            self._epoch = step["epoch"]
        gathered.rows.append(step)
        gathered.nbytes += _row_bytes(step)
        self._flush_if_due()

    def add_checkpoint(self, step: int, state: State) -> None:
        """Keep ``s_step``, which the caller must not change; it is written when the unwritten data are large or old."""
        if self.stopped or not self._last_state < step <= self._num_steps:
            return
        self._gathered.states[step] = state
        self._last_state = step
        self._gathered.nbytes += state.nbytes
        self._flush_if_due()

    def flush(self, complete: bool = False) -> None:
        """Write the unwritten data, and wait for it. A failure is logged, not raised."""
        self._hand_over(complete)
        self._await()

    def close(self) -> None:
        """End the writing thread."""
        self._await()
        if not self.is_copy:
            self._thread.shutdown()

    def _flush_if_due(self) -> None:
        full = self._gathered.nbytes >= FLUSH_BYTES and self.failure is None
        if full or time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self._hand_over(complete=False)

    def _hand_over(self, complete: bool) -> None:
        """Wait for the last write, then let the thread write the unwritten data."""
        self._await()
        self._last_flush = time.monotonic()
        if self.stopped:
            return
        segment, end = self._gathered, self._num_steps
        segment.batches.pop(end, None)  # Of a step whose record was interrupted.
        facts = self._facts(complete)
        # In this order, an interrupt loses nothing: what is handed over twice is written once.
        self._writing = self._start(segment, facts)
        self._gathered = Segment(end)

    def _start(self, segment: Segment, facts: Facts) -> Future[Unwritten | None]:
        try:
            return self._thread.submit(self._write, segment, facts)
        except RuntimeError:  # The interpreter is shutting down, and starts no work in threads.
            done: Future[Unwritten | None] = Future()
            done.set_result(self._write(segment, facts))
            return done

    def _await(self) -> None:
        if self.is_copy:  # The thread stayed in the other process.
            self.stopped, self._writing = True, None
        if self._writing is None:
            return
        unwritten = self._writing.result()
        self._writing = None
        if unwritten is None:
            if self.failure is not None:
                logger.warning("the trajectory in %s is being written again; no step is missing", self.directory)
            self.failure = None
            return
        error, self._gathered = unwritten.error, unwritten.segment.followed_by(self._gathered)
        may_pass = isinstance(error, OSError)
        if self.failure is None:
            steps = self._folder.manifest.num_steps
            kept = f"what it does is kept in memory for later attempts, up to {UNWRITTEN_BYTES // 2**20} MiB, and then "
            logger.error(
                "the trajectory in %s holds %d step%s and could not be written further: %s: %s. Training goes on; "
                "%srecording stops",
                *(self.directory, steps, "s" * (steps != 1), type(error).__name__, error, kept if may_pass else ""),
            )
        self.failure = error
        if self._gathered.nbytes > UNWRITTEN_BYTES and self._gathered.states:
            # All but the last; a replay makes them.
            states = dict(sorted(self._gathered.states.items())[-1:])
            self._gathered.nbytes += _nbytes(states) - _nbytes(self._gathered.states)
            self._gathered.states = states
        if self._gathered.nbytes > UNWRITTEN_BYTES or not may_pass:
            self.stopped, self._gathered = True, Segment(self._num_steps)

    def _facts(self, complete: bool) -> Facts:
        """The manifest's fields once all that is held back is written."""
        return {
            "complete": complete,
            "num_steps": self._num_steps,
            "num_samples": self._training_set.num_samples,
            "epoch_ends": _ends(self._epoch_ends, self._num_steps),
            "dataset": self._training_set.digest,
        }

    def _write(self, segment: Segment, facts: Facts) -> Unwritten | None:
        """In the thread: all of it, or as much as fits; returns what is not written."""
        written = self._folder.manifest.num_steps - segment.first_step
        if written > 0:
            segment = segment.split(written)[1]
        try:
            self._append(segment, facts)
        except OSError as error:
            rest = self._write_what_fits(segment, facts)
            if rest.rows or rest.states or not facts["complete"]:
                return Unwritten(error, rest)
            return None if self._folder.manifest.complete else self._write_end(rest, facts)
        except Exception as error:  # Any kind: it is told where training is, which goes on.
            return Unwritten(error, segment)
        return None

    def _write_end(self, nothing: Segment, facts: Facts) -> Unwritten | None:
        try:
            self._append(nothing, facts)
        except OSError as error:
            return Unwritten(error, nothing)
        return None

    def _write_what_fits(self, segment: Segment, facts: Facts) -> Segment:
        """Write the steps, as many as the disk takes, and at the end of training states; returns what is not written.

        Steps take little space, and a replay makes the states that they lead to.
        """
        states, size = segment.states, len(segment.rows)
        segment = replace(segment, states={}, nbytes=segment.nbytes - _nbytes(states))
        while size:
            if size <= len(segment.rows):
                first, rest = segment.split(size)
                try:
                    self._append(first, _until(facts, rest.first_step))
                except OSError:
                    pass
                else:
                    segment = rest
            size //= 2
        if facts["complete"] and not segment.rows:
            states = self._write_some(states, facts)
        return replace(segment, states=states, nbytes=segment.nbytes + _nbytes(states))

    def _write_some(self, states: dict[int, State], facts: Facts) -> dict[int, State]:
        """Write the last state, and of the others a half, a quarter, …; returns those to be written still."""
        steps = sorted(states)
        while len(steps) > 1:
            steps = steps[::-2][::-1]
            try:
                self._append(Segment(self._num_steps, states={step: states[step] for step in steps}), facts)
            except OSError:
                continue
            logger.warning(
                "%d of the last %d states of the trajectory in %s are left out, for want of space; a replay makes them",
                *(len(states) - len(steps), len(states), self.directory),
            )
            return {}
        return states

    def _append(self, segment: Segment, facts: Facts) -> None:
        written = self._folder.append(segment, facts)
        if self._on_written is not None:
            self._on_written(written)


def _until(facts: Facts, step: int) -> Facts:
    """The facts when training had come to ``step``."""
    return {**facts, "complete": False, "num_steps": step, "epoch_ends": _ends(facts["epoch_ends"], step)}


def _ends(epoch_ends: Sequence[int], step: int) -> tuple[int, ...]:
    """The ends of epochs when training had come to ``step``."""
    return (*sorted({end for end in epoch_ends if 0 < end < step}), step) if step else ()


def _nbytes(states: Mapping[int, State]) -> int:
    return sum(state.nbytes for state in states.values())


def _row_bytes(step: StepFields) -> int:
    """Approximate size of a step's fields in memory: indices, and the generators' states if they are kept."""
    states = sum(state is not None for state in step["random_states"])
    return 1000 + 40 * sum(map(len, step["indices"])) + 8000 * states
