"""Recording processes that are killed at any moment."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults import work
from benchmarks.faults.counting import Row, counted, place
from benchmarks.faults.processes import Worker, answer
from benchmarks.stores import Missing


def kills(folder: Path, sizes: dict[str, int]) -> list[Row]:
    """Processes that record, killed 0 to 600 ms after their first step, with MLflow after their first upload."""
    rows = [_without_mlflow(folder / "folder", sizes["kills"])]
    recording = {"flush_seconds": 0.01, "seconds_per_step": 0.001, "once_stored": True}
    for kind in ("SQLite", "PostgreSQL", "server", "S3"):
        row: Row = {"store": kind, "SIGKILLs": sizes["kills elsewhere"]}
        rows.append(row)
        try:
            with place(kind, folder / kind) as here:
                workers = [
                    _killed(here.recorder(seed, 10**9, **recording), seed) for seed in range(sizes["kills elsewhere"])
                ]
                row |= _counted(workers, here.looked_at(workers))
        except Missing as error:
            row["not measured"] = str(error)
    return rows


def _without_mlflow(folder: Path, count: int) -> Row:
    names = [str(folder / f"trajectory-{seed}") for seed in range(count)]
    workers = [
        _killed(Worker(folder / f"recorder-{seed}", {}, work.record_in_folder, name, seed), seed)
        for seed, name in enumerate(names)
    ]
    found = answer(folder / "look", {}, work.looked_in, names)
    return {"store": "a folder, without MLflow", "SIGKILLs": count, **_counted(workers, found)}


def _killed(worker: Worker, seed: int) -> Worker:
    worker.until_ready()
    time.sleep(random.Random(seed).uniform(0.0, 0.6))
    worker.kill()
    return worker


def _counted(workers: Sequence[Worker], found: Sequence[Mapping[str, Any]]) -> Row:
    kept = [one["steps"] for one in found]
    least, middle, most = np.percentile(kept, [0, 50, 100]).astype(int).tolist()
    return {
        "ended by it": [worker.exit_code() for worker in workers].count(-signal.SIGKILL),
        **counted(found),
        "steps of each: least, median, most": f"{least}, {middle}, {most}",
        "of 0 steps": kept.count(0),
    }
