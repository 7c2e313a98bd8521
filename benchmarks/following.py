"""What ``live=True`` costs a training, and how far its answers lag behind: ``python benchmarks/following.py``.

The CNN of projects/mnist (``--model``) is trained by a loop of its own that records into a local store, without
and with ``live=True`` in turns; one thread. Seconds on the clock: what a second process takes from the trainer shows
there, if it does, and not in the trainer's CPU time. Everything from entering the recorder to the last file stored is
counted; the end of the follower is not, since the trainer does not wait for it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import mlflow
import torch
from mlflow.entities import Run
from torch.utils.data import DataLoader

from dit_mlflow import Workload, load_workload
from dit_mlflow.evaluation.figures import FOLLOW_SECONDS, STEPS_BEHIND
from dit_mlflow.tracking import record_trajectory
from dit_mlflow.tracking.store.names import KIND, TRAINING_RUN


def trained(workload: Workload, epochs: int, live: bool) -> tuple[str, float]:
    """The run's id, and the seconds of the recorded loop."""
    torch.manual_seed(0)
    model = workload.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(workload.train_set, batch_size=32, shuffle=True)
    with mlflow.start_run() as run:
        started = time.monotonic()
        with record_trajectory(model, optimizer, workload, live=live) as recorder:
            for _ in range(epochs):
                for batch in recorder.watch(loader):
                    optimizer.zero_grad()
                    workload.loss(model, batch).mean().backward()
                    optimizer.step()
        return run.info.run_id, time.monotonic() - started


def follower_of(training: str, patience: float = 600) -> Run:
    """The influence run of a training that was followed, once it has ended."""
    asked = f"tags.`{KIND}` = 'influence' and tags.`{TRAINING_RUN}` = '{training}'"
    until = time.monotonic() + patience
    while time.monotonic() < until:
        for found in mlflow.search_runs(filter_string=asked, output_format="list"):
            if found.info.status != "RUNNING":
                return found
        time.sleep(0.5)
    raise SystemExit(f"the follower of run {training} did not end within {patience:.0f} s")


def history(run: Run, name: str) -> list[float]:
    return [metric.value for metric in mlflow.MlflowClient().get_metric_history(run.info.run_id, name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    workload = load_workload("projects/mnist", model=asked.model, n_train=asked.samples)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        for _ in range(asked.repetitions):
            for live, spent in seconds.items():
                training, taken = trained(workload, asked.epochs, live)
                spent.append(taken)
                if live:
                    follower = follower_of(training)
                    windows, behind = history(follower, FOLLOW_SECONDS.name), history(follower, STEPS_BEHIND.name)
                    print(
                        f"{len(windows)} windows, {statistics.median(windows):.1f} s each; training was "
                        f"ahead by {statistics.median(behind):.0f} steps (median), {max(behind):.0f} (most)"
                    )
    without, alive = (statistics.median(spent) for spent in seconds.values())
    print(f"loop without {without:.1f} s, with live=True {alive:.1f} s: {alive / without:.2f} times; all: {seconds}")


if __name__ == "__main__":
    main()
