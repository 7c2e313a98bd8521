"""Experiments in a store, and rows that count what was tried and what survived."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient

from benchmarks import stores
from benchmarks.faults import work
from benchmarks.faults.processes import Worker, answer
from benchmarks.stores import Store

Row = dict[str, Any]

KINDS: Mapping[str, Callable[[Path], Any]] = {
    "SQLite": stores.sqlite,
    "server": stores.server,
    "PostgreSQL": stores.postgresql,
    "S3": stores.s3,
}


@dataclass
class Place:
    """An experiment of a store, and the folder of the processes that use it."""

    store: Store
    folder: Path
    experiment: str = "reliability"

    def environment(self, **more: str) -> dict[str, str]:
        cache = str(self.folder / "cache")
        return {**self.store.environment, "MLFLOW_TRACKING_URI": self.store.uri, "DIT_MLFLOW_CACHE": cache, **more}

    def worker(self, name: str, function: Callable[..., Any], *arguments: Any, **more: str) -> Worker:
        return Worker(self.folder / name, self.environment(**more), function, *arguments)

    def recorder(self, seed: int, steps: int, environment: Mapping[str, str] | None = None, **options: Any) -> Worker:
        name = f"recorder-{seed}"
        return self.worker(name, Recording(options), self.experiment, seed, steps, **(environment or {}))

    def asking(self, number: int, **environment: str) -> Worker:
        return self.worker(f"job-{number}", work.ask, self.experiment, **environment)

    def answer(self, name: str, function: Callable[..., Any], *arguments: Any, **more: str) -> Any:
        return answer(self.folder / name, self.environment(**more), function, *arguments)

    def looked_at(self, workers: Sequence[Worker]) -> list[dict[str, Any]]:
        """What the store holds of each recorder, by two processes at once."""
        parts = [workers[::2], workers[1::2]]
        lookers = [
            self.worker(f"look-{number}", work.looked_at, [run_of(w) for w in part], [state_of(w) for w in part])
            for number, part in enumerate(parts)
            if part
        ]
        found = []
        for looker in lookers:
            if code := looker.exit_code():
                raise RuntimeError(f"looking ended with {code}:\n{looker.said[-4000:]}")
            found.append(looker.noted())
        return [found[at % 2][at // 2] for at in range(len(workers))]


class Recording:
    """:func:`benchmarks.faults.work.record` with options, to be sent to a process."""

    __name__ = "record"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    def __call__(self, *arguments: Any) -> None:
        work.record(*arguments, **self.options)


@contextmanager
def place(kind: str, folder: Path, artifacts: Path | None = None) -> Iterator[Place]:
    """A fresh store of a kind with an experiment; ``artifacts``: another folder for its files."""
    folder.mkdir(parents=True)
    with KINDS[kind](folder / "store") as store:
        yield made(store, folder, artifacts)


def made(store: Store, folder: Path, artifacts: Path | None = None) -> Place:
    """An experiment in a running store."""
    found = Place(store, folder)
    location = None if store.artifacts is None else f"{store.artifacts}/reliability"
    if artifacts is not None:
        location = artifacts.as_uri()
    found.answer("experiment", make_experiment, found.experiment, location)
    return found


def make_experiment(ready: Callable[[], None], name: str, location: str | None) -> str:
    return MlflowClient().create_experiment(name, artifact_location=location)


def run_of(worker: Worker) -> str | None:
    return worker.noted("run")


def state_of(worker: Worker) -> str | None:
    trained = worker.noted("trained")
    return None if trained is None else trained["state"]


def steps_of(worker: Worker) -> int:
    """Steps that the process trained, if it came to the end."""
    trained = worker.noted("trained")
    return 0 if trained is None else trained["steps"]


def counted(found: Sequence[Mapping[str, Any]]) -> Row:
    """Of the trajectories of some runs: how many are whole, and how many are wrong."""
    return {
        "steps kept": sum(one["steps"] for one in found),
        "open": sum(one["opens"] for one in found),
        "replay bit for bit": sum(one["verifies"] for one in found),
        "wrong": sum(one["wrong"] for one in found),
    }


ROUNDING = 1e-5
"""Of the largest score. Retrainings run one after the other or side by side, whichever a measurement of their time
prefers, and in float32 as recorded: under load, equal jobs differ by rounding."""


def compared(scores: Sequence[list[float] | None], alone: list[float]) -> Row:
    """How many jobs have whole scores, and how many of these are those of the same job ``alone``."""
    known = [np.asarray(one) for one in scores if one is not None]
    expected = np.asarray(alone)
    off = [float(np.abs(one - expected).max()) if one.shape == expected.shape else np.inf for one in known]
    return {
        "jobs with scores": len(known),
        "equal bit for bit": sum(one == 0.0 for one in off),
        "largest difference, of the largest score": f"{max(off, default=0.0) / np.abs(expected).max():.1e}",
        "wrong scores": sum(not one <= ROUNDING * np.abs(expected).max() for one in off),
    }
