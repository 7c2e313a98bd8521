"""Eight processes that record, track and log at once: ``eight_processes.py URI ...``.

Prints a line of JSON for each URI: the seconds taken and the ids of each process's training run and influence run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot  # noqa: F401  (before the fork, as the next, which are imported late otherwise)
import mlflow
import scipy.stats  # noqa: F401
import torch
import torch._dynamo
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import Window, Workload
from dit_mlflow.tracking import load_trajectory, record_trajectory, run_influence
from dit_mlflow.tracking.influence import Checks

PROCESSES = 8
EXPERIMENT = "eight"
WINDOWS = [Window(0, 2), Window(2, 5), Window(5, 9)]
TOGETHER_SECONDS = 60.0


def workload() -> Workload:
    return digits_workload()


def begin(barrier: Barrier) -> None:
    """In each process, first of all."""
    global together
    together = barrier
    torch.set_num_threads(1)


def work(seed: int, uri: str) -> tuple[str, str]:
    """The ids of a training run and an influence run on the tracking server ``uri``."""
    # Nobody passes until all have come: the eight pieces of work are in eight processes, and at once.
    together.wait(TOGETHER_SECONDS)
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(EXPERIMENT)
    torch.manual_seed(seed)
    model = digits_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with mlflow.start_run(run_name=f"train {seed}") as run, record_trajectory(model, optimizer, workload()) as recorder:
        for epoch in range(3):
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8, shuffle=True)):
                optimizer.zero_grad()
                loss = sample_losses(model, batch).mean()
                loss.backward()
                optimizer.step()
            mlflow.log_metric("loss", loss.item(), step=epoch)
            mlflow.log_metric("process", os.getpid())
    trajectory = load_trajectory(run.info.run_id)
    answer = run_influence(run.info.run_id, trajectory, workload(), WINDOWS, "local", Checks())
    return run.info.run_id, answer.run.info.run_id


def main(uris: list[str]) -> None:
    # Forked, so that torch and MLflow, 5 s of work on a small machine, are imported once and not eight times.
    context = multiprocessing.get_context("fork")
    with context.Pool(PROCESSES, begin, [context.Barrier(PROCESSES)]) as pool:
        for uri in uris:
            started = time.monotonic()
            found = pool.starmap(work, [(seed, uri) for seed in range(PROCESSES)], chunksize=1)
            print(json.dumps({"uri": uri, "seconds": time.monotonic() - started, "runs": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
