"""A recorded training trajectory that can be replayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet

import torch

from dit_mlflow.progress import progress_bar
from dit_mlflow.replay.loss_rows import samples_are_coupled
from dit_mlflow.replay.replay import MakeStep, Replay, step_of
from dit_mlflow.trajectory.manifest import Manifest
from dit_mlflow.trajectory.record import Fetch, Record
from dit_mlflow.trajectory.state import State
from dit_mlflow.workload.workload import Workload


@dataclass(frozen=True)
class Verification:
    """What :meth:`Trajectory.verify` found.

    Attributes:
        drift: relative drift of the replay at each checkpoint after the first, by step; 0 = bit for bit.
    """

    drift: dict[int, float]

    @property
    def max_drift(self) -> float:
        """The largest drift of any segment; 0 means that the whole run replays bit for bit."""
        return max(self.drift.values(), default=0.0)


class Trajectory(Record):
    """A training trajectory on disk: the record, and every state by replay. Open one with :meth:`open`.

    Attributes:
        one_at_a_time: workloads whose retrainings were found not to run side by side, so that this is told once.
    """

    def __init__(self, directory: Path, manifest: Manifest, fetch: Fetch | None = None) -> None:
        super().__init__(directory, manifest, fetch)
        self._coupled: WeakKeyDictionary[Workload, dict[int, bool]] = WeakKeyDictionary()
        self.one_at_a_time: WeakSet[Workload] = WeakSet()

    def states(self, workload: Workload, a: int, b: int, dtype: torch.dtype | None = None) -> Iterator[State]:
        """Yield ``s_a, …, s_b`` (both ends included), rebuilt by replay from the checkpoint before ``a``.

        In the recorded dtype the replay compares its state with each checkpoint that it reaches, and continues from the
        checkpoint; in another ``dtype`` it runs from ``s_0`` without re-anchoring.

        Raises:
            InputError: not ``0 <= a <= b <= num_steps``.
            TrajectoryError: the replay's drift exceeds :data:`REPLAY_TOLERANCE`, or the workload is another one.

        Cost: one training step per state, and up to ``2 sqrt(T)`` steps before the first.
        """
        yield from self.replay(workload, dtype).forward(a, b)

    def replay(self, workload: Workload, dtype: torch.dtype | None = None, make_step: MakeStep = step_of) -> Replay:
        """A :class:`Replay`, for callers that walk the trajectory more than once."""
        return Replay(self, workload, dtype, make_step)

    def couples_samples(self, workload: Workload, first: int = 0, last: int | None = None) -> bool:
        """:func:`samples_are_coupled`, computed once per workload and step."""
        if workload.step is not None:
            return False  # How samples enter a step of one's own is its own to say.
        return samples_are_coupled(self, workload, first, last, self._coupled.setdefault(workload, {}))

    def verify(self, workload: Workload) -> Verification:
        """Check the record (:meth:`check_record`), and the replay of every segment against the next checkpoint.

        Then the states are those of the training, up to the drift. Replay cannot check fields that no state depends on:
        logged losses, epoch numbers, settings that the optimizer does not read, ``complete``, versions, thread count,
        the workload's reference, the model's class name. Untrained tensors, which are stored once for several
        checkpoints, are checked only through the other tensors that they lead to.

        Raises:
            TrajectoryError: names the first check that fails.

        Cost: one training, without its evaluation.
        """
        self.check_record()
        return self.check_replay(workload)

    def check_replay(self, workload: Workload) -> Verification:
        """The replay of :meth:`verify` alone; arguments, errors and cost are the same."""
        replay = self.replay(workload)
        with progress_bar(self.num_steps + 1, "replay") as progress:
            for _ in replay.forward(0, self.num_steps):
                progress.update()
        return Verification(dict(replay.drift))
