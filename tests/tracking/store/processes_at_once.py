"""Processes that record, track and log at once: ``processes_at_once.py PROCESSES EXPERIMENT URI ...``.

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

sys.path.insert(0, str(Path(__file__).parents[2]))

import matplotlib.pyplot  # noqa: F401  (before the fork, as the next, which are imported late otherwise)
import mlflow
import scipy.stats  # noqa: F401
import torch
import torch._dynamo
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import Window, Workload
from dit_mlflow.explanation import Checks
from dit_mlflow.tracking import load_trajectory, record_trajectory, run_influence

WINDOWS = [Window(0, 4), Window(4, 9)]
TOGETHER_SECONDS = 120.0


def workload() -> Workload:
    return digits_workload()


def begin(barrier: Barrier) -> None:
    """In each process, first of all."""
    global together
    together = barrier
    torch.set_num_threads(1)


def work(seed: int, experiment: str, uri: str) -> tuple[str, str]:
    """The ids of a training run and an influence run in ``experiment`` of the tracking server ``uri``."""
    # Nobody passes until all have come: each piece of work is in a process of its own, and at once.
    together.wait(TOGETHER_SECONDS)
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment)
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


def main(processes: int, experiment: str, uris: list[str]) -> None:
    # Forked, so that torch and MLflow, 5 s of work on a small machine, are imported once and not in each.
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, begin, [context.Barrier(processes)]) as pool:
        for uri in uris:
            started = time.monotonic()
            found = pool.starmap(work, [(seed, experiment, uri) for seed in range(processes)], chunksize=1)
            print(json.dumps({"uri": uri, "seconds": time.monotonic() - started, "runs": found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
