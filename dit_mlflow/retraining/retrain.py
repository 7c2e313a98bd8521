"""Run the retrainings for a question, over processes or machines, and resume them after an interruption."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import cloudpickle
import joblib
import numpy as np
import torch

from dit_mlflow.influence import Query
from dit_mlflow.influence.kind import Course, courses
from dit_mlflow.influence.query import refuse_not_finite
from dit_mlflow.influence.question import Question
from dit_mlflow.progress import progress_bar
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.replay.optimizers import is_others
from dit_mlflow.replay.replay import MakeStep, Replay
from dit_mlflow.retraining.counterfactuals import Baseline, Changes, Counterfactuals, Job, Retraining
from dit_mlflow.retraining.effort import Effort
from dit_mlflow.trajectory.manifest import Manifest
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state

RETRAININGS_PER_PART = 64
"""Largest number of retrainings that an interruption loses, for each worker."""


def retrain(
    question: Question,
    counterfactuals: Counterfactuals,
    dtype: torch.dtype | None = torch.float64,
    effort: Effort | None = None,
) -> tuple[np.ndarray, float]:
    """Exact changes of the queries under each counterfactual.

    Args:
        question: windows, kind and queries.
        counterfactuals: ``R`` sets of weights.
        dtype: of the retraining; ``None`` = as recorded.
        effort: workers, memory, and a folder for finished parts.

    Returns:
        Changes ``[windows, queries, R]`` in the sense of the kind, query under the counterfactual minus query as
        recorded; and the largest drift of the replay.

    Cost: one training from the window's start for each counterfactual (``cumulative``: one for all windows), run side
    by side under ``torch.func.vmap`` where that is faster.
    """
    effort = effort or Effort()
    changes = np.zeros((len(question.windows), len(question.queries), len(counterfactuals)))
    # One pool for all courses: ray would start new processes for each.
    with preserved_random_state(), effort.configured(), joblib.Parallel(n_jobs=effort.jobs) as pool:
        replay = question.trajectory.replay(question.workload, dtype)
        shared = _Shared.of(question, replay, effort.memory_budget)
        one_at_a_time = question.trajectory.one_at_a_time
        known = question.workload in one_at_a_time
        here = Retraining(replay.training_step, question.queries, effort.memory_budget, refused=known)
        for course in courses(question.kind, question.windows, question.trajectory.num_steps):
            steps = [question.trajectory.step(t) for t in range(course.start, course.stop)]
            met = np.unique(np.concatenate([step.samples for step in steps if step.index < course.until]))
            affected = np.flatnonzero(counterfactuals.changed_by(met))
            job = Job(course, steps, baseline(replay, course, here), counterfactuals)
            for rows, found in _run(job, affected, shared, here, effort, pool):
                for step, window, sign in course.measures:
                    changes[window][:, rows] += sign * found[step]
        if here.refused:
            one_at_a_time.add(question.workload)
    return changes, replay.max_drift


@dataclass(frozen=True, eq=False)
class _Shared:
    """What every worker needs."""

    workload: Workload
    manifest: Manifest
    stored: Any
    queries: tuple[Query, ...]
    dtype: torch.dtype | None
    make_step: MakeStep
    memory_budget: int

    @classmethod
    def of(cls, question: Question, replay: Replay, memory_budget: int) -> _Shared:
        # Only training and reports need the rest, which may be hard to pickle.
        unused = dict.fromkeys(("scheduler", "test_set", "metrics", "describe", "show", "label"))
        manifest, stored = question.trajectory.manifest, question.trajectory.batches
        stepped = question.workload.step is not None or is_others(manifest.optimizer.name)
        optimizer = question.workload.optimizer if stepped else None
        lean: Workload = replace(question.workload, optimizer=optimizer, **unused)  # type: ignore[arg-type]
        return cls(lean, manifest, stored, question.queries, replay.dynamics.dtype, replay.make_step, memory_budget)

    def retraining(self) -> Retraining:
        step = self.make_step(Dynamics(self.workload, self.manifest, self.dtype, self.stored))
        return Retraining(step, self.queries, self.memory_budget)


def baseline(replay: Replay, course: Course, here: Retraining) -> Baseline:
    """The recorded run along a course."""
    asked = {step for step, _, _ in course.measures}
    walk = enumerate(replay.forward(course.start, course.stop), start=course.start)
    states = {t: state for t, state in walk if t == course.start or t in asked}
    start = states[course.start] if course.start in asked else states.pop(course.start)
    values = {t: here.ask(state.parameters, state.buffers) for t, state in states.items()}
    for t, state in states.items():
        for query, value in zip(here.queries, values[t], strict=True):
            refuse_not_finite(query, value, state, t, replay.dynamics, replay.trajectory)
    return Baseline(start, states, values)


def _run(
    job: Job, affected: np.ndarray, shared: _Shared, here: Retraining, effort: Effort, pool: joblib.Parallel
) -> Iterator[tuple[np.ndarray, Changes]]:
    """Yield rows of ``affected`` and their changes, part by part."""
    workers = joblib.effective_n_jobs(effort.jobs)
    in_one = workers == 1 and effort.folder is None
    count = min(len(affected), 1 if in_one else max(workers, -(-len(affected) // RETRAININGS_PER_PART)))
    parts = np.array_split(affected, count) if count else []
    kept = _Kept(effort.folder, shared, job)
    left = []
    length = len(job.steps)
    title = f"retraining, steps {job.course.start}-{job.course.stop}"
    with progress_bar(len(affected) * length, title) as progress:
        for rows in parts:
            found = kept.load(rows)
            if found is None:
                left.append(rows)
                continue
            progress.update(len(rows) * length)
            yield rows, found
        if workers == 1:
            for rows in left:
                found = here.run(job.part(rows), progress.update)
                kept.save(rows, found)
                yield rows, found
        elif left:
            sent = _packed(shared)
            tasks = (
                joblib.delayed(_work)(sent, tuple(sys.path), cloudpickle.dumps(job.part(rows)), kept, rows)
                for rows in left
            )
            for rows, found in zip(left, pool(tasks), strict=True):
                progress.update(len(rows) * length)
                yield rows, found


def _packed(shared: _Shared) -> bytes:
    """``shared``, pickled for a process that cannot import the loaded project folders."""
    projects = [module for name, module in sys.modules.items() if name.startswith("dit_mlflow_project_")]
    for module in projects:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(shared))
    finally:
        for module in projects:
            cloudpickle.unregister_pickle_by_value(module)


@lru_cache(maxsize=1)
def _unpacked(shared: bytes, path: tuple[str, ...]) -> Retraining:
    # ray's workers do not have this process's import path.
    sys.path += [folder for folder in path if folder not in sys.path]
    retraining: Retraining = cloudpickle.loads(shared).retraining()
    return retraining


def _work(shared: bytes, path: tuple[str, ...], job: bytes, kept: _Kept, rows: np.ndarray) -> Changes:
    """The task of a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        retraining = _unpacked(shared, path)
        found = retraining.run(cloudpickle.loads(job))
    finally:
        torch.set_num_threads(threads)
    kept.save(rows, found)
    return found


class _Kept:
    """Finished parts of a job, in files whose names are hashes of all that determines them.

    Queries enter the hash by name and recorded values, not by their code.
    """

    def __init__(self, folder: Path | None, shared: _Shared, job: Job) -> None:
        # A worker may stand in another folder, where earlier work was asked for.
        self.folder = None if folder is None else folder.resolve()
        self.key = b""
        if folder is None:
            return
        names = [query.name for query in shared.queries]
        values = {t: value.tolist() for t, value in job.baseline.values.items()}
        parts = (shared.manifest.digest(), str(shared.dtype), names, job.course, values)
        self.key = hashlib.sha256(repr(parts).encode()).digest()
        self.counterfactuals = job.counterfactuals
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, rows: np.ndarray) -> Changes | None:
        path = self._path(rows)
        if path is None or not path.is_file():
            return None
        try:
            # Opened here: of a file that is no whole archive, NumPy would leave it open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return {int(step): stored[step] for step in stored.files}
        except (OSError, EOFError, ValueError, BadZipFile):
            return None

    def save(self, rows: np.ndarray, found: Changes) -> None:
        path = self._path(rows)
        if path is None:
            return
        partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, **{str(step): change for step, change in found.items()})  # type: ignore[arg-type]
        partial.replace(path)

    def _path(self, rows: np.ndarray) -> Path | None:
        if self.folder is None:
            return None
        what = self.counterfactuals.part(rows).identity()
        return self.folder / f"{hashlib.sha256(self.key + what).hexdigest()[:32]}.npz"
