"""Follows a training while it is recorded: each window's influence is logged as soon as its steps are stored."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Event, Thread

import click
import numpy as np
from mlflow import MlflowClient

from dit_mlflow.errors import InputError, TrajectoryError
from dit_mlflow.evaluation.figures import FOLLOW_SECONDS, STEPS_BEHIND
from dit_mlflow.explanation.explainer import of_scores
from dit_mlflow.influence import Influence, Window, track
from dit_mlflow.replay import Trajectory
from dit_mlflow.tracking.jobs.request import SWEEP_DTYPES, Request, recorded_workload
from dit_mlflow.tracking.jobs.train import workload_params
from dit_mlflow.tracking.store.artifacts import find_run, load_trajectory
from dit_mlflow.tracking.store.datasets import log_datasets_of
from dit_mlflow.tracking.store.explanations import log_growing
from dit_mlflow.tracking.store.names import INFLUENCE, KIND, METHOD, TRAINING_RUN
from dit_mlflow.tracking.store.run_log import log_params, log_series, project_run
from dit_mlflow.tracking.ui.links import run_link, where_is
from dit_mlflow.workload import Workload

AT_ONCE = 8
"""Most windows that are computed before they are logged, where training is ahead."""


@dataclass(frozen=True)
class FollowRequest(Request):
    """As :class:`Request`, and:

    Attributes:
        every: steps of a window; 0 = a window for each epoch.
        poll: seconds between two looks at the record.
        patience: seconds without new steps after which a training counts as dead, though its run is RUNNING.
        until_input_ends: the training has ended when a line comes by standard input, or its end, whatever its run says.
    """

    every: int = 0
    poll: float = 2.0
    patience: float = 600.0
    until_input_ends: bool = False

    def check(self) -> None:
        """Raise :class:`InputError` for values that cannot be used."""
        if not self.training_run:
            raise InputError("follow needs the run of a training, which may be under way: give training_run")
        if self.every < 0 or not self.poll > 0 or not self.patience > 0:
            raise InputError(
                f"every={self.every}, poll={self.poll}, patience={self.patience}; expected steps (0: epochs), and "
                "seconds above 0"
            )


def follow_job(request: FollowRequest, project_run_id: str | None = None) -> str:
    """Log the ``local`` influence of each window of a training that another process records; returns a summary.

    The trainer is not touched: its record is read where it is stored, as far as it has been written, which is every ten
    seconds. Scores, page and a child run for each window are there while training goes on; the job ends with the
    training, whose last steps are a window too. Its run begins with the first window, and logs for each what it cost
    and how far training was ahead by then.

    Raises:
        DitError: the run is none of a training, its workload is not known, or a window cannot be swept.

    Cost: for each window, a replay from the state stored before it, and two to three times its steps for the sweep.
    """
    request.check()
    training = find_run(request.training_run)
    tags = {KIND: INFLUENCE, METHOD: "dit", TRAINING_RUN: request.training_run}
    name = f"follow {training.info.run_name or request.training_run}"
    found: Influence | None = None
    with ExitStack() as stack:
        slowest, most = 0.0, 0
        for trajectory, windows in _growing(request):
            begun = time.perf_counter()
            if found is None:
                workload = recorded_workload(request, trajectory)
                run = stack.enter_context(project_run(project_run_id, name, tags))
                log_params({**workload_params(workload), "method": "dit", "resolved.kind": "local"})
                log_datasets_of(request.training_run, run.info.run_id)
            found = _with(found, trajectory, workload, windows, request)
            count = len(found.windows)
            log_growing(of_scores(found, workload), range(count - len(windows), count), request.training_run)
            seconds = time.perf_counter() - begun
            behind = load_trajectory(request.training_run).num_steps - windows[-1].end
            log_series(FOLLOW_SECONDS.name, [seconds], [count - 1])
            log_series(STEPS_BEHIND.name, [behind], [count - 1])
            slowest, most = max(slowest, seconds), max(most, behind)
            first = found.of(-1)
            click.echo(
                f"steps {windows[0].start}-{windows[-1].end}: sample {int(first.argmin())} harms most, "
                f"{int(first.argmax())} helps most (in {seconds:.1f} s; {behind} steps behind the training)"
            )
    if found is None:
        raise TrajectoryError(f"run {request.training_run} ended, or stood still, before a window was recorded")
    return "\n".join(
        [
            "",
            f"{len(found.windows)} windows, each there {slowest:.1f} s after it was seen at the latest, and at most "
            f"{most} steps behind the training",
            f"training run   {request.training_run}",
            f"influence run  {run.info.run_id}",
            where_is(run_link(run)),
        ]
    )


def _growing(request: FollowRequest) -> Iterator[tuple[Trajectory, list[Window]]]:
    """The trajectory with windows that have become whole, and at the end with the rest."""
    done, steps, moved = 0, 0, time.monotonic()
    told = Event()
    if request.until_input_ends:
        Thread(target=_wait_for_input, args=(told,), daemon=True).start()
    while True:
        # Asked before the record is read, so that the end of the record is not missed.
        ended = told.is_set() if request.until_input_ends else not _is_running(request.training_run)
        try:
            trajectory = load_trajectory(request.training_run)
        except TrajectoryError:
            # Nothing has been stored yet.
            trajectory = None
        now = 0 if trajectory is None else trajectory.num_steps
        if now > steps:
            steps, moved = now, time.monotonic()
        ended = ended or time.monotonic() - moved > request.patience
        if trajectory is not None and (windows := _windows(trajectory, request.every, done, ended)[:AT_ONCE]):
            done = windows[-1].end
            yield trajectory, windows
        elif ended:
            return
        else:
            told.wait(request.poll)


def _wait_for_input(told: Event) -> None:
    # Not by ``sys.stdin``, whose lock a thread would hold when the process ends.
    os.read(0, 1)
    told.set()


def _is_running(run_id: str) -> bool:
    return str(MlflowClient().get_run(run_id).info.status) == "RUNNING"


def _windows(trajectory: Trajectory, every: int, done: int, ended: bool) -> list[Window]:
    """The windows from step ``done`` on that are whole; at the end, the last one may be shorter."""
    last = trajectory.num_steps
    if every:
        ends = list(range(done + every, last + 1, every))
    else:
        # The last epoch ends with the record, until another begins.
        ends = [end for end in trajectory.epoch_ends if done < end < last]
    if ended and last > (ends[-1] if ends else done):
        ends.append(last)
    return [Window(a, b) for a, b in pairwise([done, *ends])]


def _with(
    found: Influence | None, trajectory: Trajectory, workload: Workload, windows: list[Window], request: FollowRequest
) -> Influence:
    """The scores so far and those of more windows."""
    new = track(
        trajectory,
        workload,
        windows,
        "local",
        dtype=SWEEP_DTYPES[request.dtype],
        memory_budget=request.memory_budget,
    )
    if found is None:
        return new
    return replace(found, scores=np.concatenate([found.scores, new.scores]), windows=(*found.windows, *new.windows))
