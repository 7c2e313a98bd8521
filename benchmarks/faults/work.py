"""What the processes do: record a training, run the main job, look at what a store holds."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  (these are imported late otherwise, in each process)
import mlflow
import scipy.stats  # noqa: F401
import torch
import torch._dynamo
from mlflow import MlflowClient
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.faults.processes import Ready, note
from dit_mlflow import DitError, Trajectory, TrajectoryRecorder, Window, Workload, track
from dit_mlflow.cli import run_job
from dit_mlflow.recording import writer
from dit_mlflow.tracking import load_influence, load_trajectory, log_trajectory, record_trajectory
from dit_mlflow.tracking.jobs.influence import main_job
from dit_mlflow.tracking.jobs.request import Request
from dit_mlflow.tracking.recording import upload
from dit_mlflow.tracking.store.names import TRAJECTORY

SMALL = {"model": "logreg", "n_train": "40", "n_validation": "20", "n_test": "20", "epochs": "2", "batch_size": "16"}
"""Settings of the main job's training."""


@cache
def data() -> TensorDataset:
    """64 real digits, 0 to 2."""
    images, labels = load_digits(n_class=3, return_X_y=True)
    return TensorDataset(torch.from_numpy(images[:64] / 16).float(), torch.from_numpy(labels[:64]))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3))


def losses(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


def workload() -> Workload:
    return Workload(model=network, loss=losses, train_set=data(), validation_set=data())


def record(
    ready: Ready,
    experiment: str,
    seed: int,
    steps: int,
    *,
    seconds_per_step: float = 0.0,
    flush_seconds: float = 1.0,
    metric_every: int = 0,
    once_stored: bool = False,
    at: Sequence[tuple[int, Callable[[], None]]] = (),
) -> None:
    """Record a training of 64-6-3 into a new run, and note the run and the state that training ended in.

    Args:
        seconds_per_step: a wait at each step, as of a larger model.
        flush_seconds: between two segments of the record.
        metric_every: log the loss at each of so many steps; 0 = never.
        once_stored: ready when the store holds something, not after the first step.
        at: called before these steps.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    writer.FLUSH_SECONDS = flush_seconds
    if flush_seconds < 0.1:
        writer.FLUSH_BYTES = 10_000
    upload.RETRY_SECONDS = 5.0
    mlflow.set_experiment(experiment)
    torch.manual_seed(seed)
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    due = dict(at)
    waiting = True
    # Opened now: there may be no file handle later.
    with Path("trained.json").open("w") as trained, mlflow.start_run(run_name=f"training {seed}") as run:
        note("run", run.info.run_id)
        with record_trajectory(model, optimizer) as recorder:
            loader = DataLoader(data(), batch_size=8, shuffle=True)
            while recorder.num_steps < steps:
                for batch in recorder.watch(loader):
                    if recorder.num_steps in due:
                        due.pop(recorder.num_steps)()
                    optimizer.zero_grad()
                    loss = losses(model, batch).mean()
                    loss.backward()
                    optimizer.step()
                    time.sleep(seconds_per_step)
                    if waiting and (not once_stored or MlflowClient().list_artifacts(run.info.run_id, TRAJECTORY)):
                        waiting = False
                        ready()
                    if metric_every and recorder.num_steps % metric_every == 0:
                        mlflow.log_metric("loss", loss.item(), step=recorder.num_steps)
                    if recorder.num_steps == steps:
                        break
            state = _digest(dict(model.named_parameters()))
            trained.write(json.dumps({"steps": recorder.num_steps, "state": state}))
            trained.flush()


def record_in_folder(ready: Ready, folder: str, seed: int) -> None:
    """Record the same training into a folder without MLflow, until the process is killed."""
    writer.FLUSH_SECONDS, writer.FLUSH_BYTES = 0.01, 10_000
    torch.manual_seed(seed)
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    with TrajectoryRecorder(model, optimizer, folder) as recorder:
        loader = DataLoader(data(), batch_size=8, shuffle=True)
        while True:
            for batch in recorder.watch(loader):
                optimizer.zero_grad()
                losses(model, batch).mean().backward()
                optimizer.step()
                if recorder.num_steps == 1:
                    ready()


def looked_in(ready: Ready, folders: Sequence[str]) -> list[dict[str, Any]]:
    """:func:`checked` of each folder."""
    found = []
    for folder in folders:
        try:
            found.append(checked(Trajectory.open(folder)))
        except DitError as error:
            found.append(_refused(error))
    return found


def ask(ready: Ready, experiment: str) -> str:
    """The main job, as the command line runs it, on a training of its own that is the same in each process.

    Ready at its first step. Returns the influence run's id.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    mlflow.set_experiment(experiment)
    register_optimizer_step_post_hook(lambda *arguments: ready())
    said: list[str] = []

    def job(project_run_id: str | None) -> str:
        said.append(main_job(Request(settings=SMALL, windows="2", ground_truth="4"), project_run_id))
        return said[0]

    run_job("influence", job)
    return str(re.findall(r"^influence run +(\w+)", said[0], re.MULTILINE)[0])


def looked_at(ready: Ready, run_ids: Sequence[str | None], states: Sequence[str | None]) -> list[dict[str, Any]]:
    """What the store holds of each run; ``states``: the digest of that in which training ended, where it is known."""
    return [_look(run_id, state) for run_id, state in zip(run_ids, states, strict=True)]


def _look(run_id: str | None, state: str | None) -> dict[str, Any]:
    if run_id is None:
        return {"status": None, "steps": 0, "opens": False, "verifies": False, "wrong": False, "metrics": 0}
    client = MlflowClient()
    status = client.get_run(run_id).info.status
    metrics = len(client.get_metric_history(run_id, "loss"))
    try:
        trajectory = load_trajectory(run_id)
    except DitError as error:
        return _refused(error) | {"status": status, "metrics": metrics}
    return checked(trajectory, state) | {"status": status, "metrics": metrics}


def checked(trajectory: Trajectory, state: str | None = None) -> dict[str, Any]:
    """How many steps there are, and whether they replay bit for bit, to the state that training ended in."""
    try:
        drift = trajectory.verify(workload()).max_drift
    except DitError as error:
        return _refused(error) | {"opens": True}
    steps, last = trajectory.num_steps, trajectory.checkpoint_steps[-1]
    ended = _digest(trajectory.checkpoint(last).parameters)
    wrong = drift != 0.0 or (trajectory.complete and state is not None and ended != state)
    found = {"steps": steps, "complete": trajectory.complete, "opens": True, "verifies": drift == 0.0, "wrong": wrong}
    if steps:
        scores = track(trajectory, workload(), [Window(0, min(steps, 20))]).scores
        found["wrong"] = wrong or not bool((abs(scores) > 0).any())
    return found


def _refused(error: DitError) -> dict[str, Any]:
    return {"steps": 0, "opens": False, "verifies": False, "wrong": False, "error": f"{type(error).__name__}: {error}"}


def checked_folder(ready: Ready, folder: str, state: str | None) -> dict[str, Any]:
    """:func:`checked` of a folder that a message named."""
    return checked(Trajectory.open(folder), state)


def uploaded_again(ready: Ready, folder: str, run_id: str, state: str | None) -> dict[str, Any]:
    """What the message says to do when the store is back, and what the store holds then."""
    log_trajectory(folder, run_id=run_id)
    return _look(run_id, state)


def scores_of(ready: Ready, run_ids: Sequence[str | None]) -> list[list[float] | None]:
    """The scores of each influence run; ``None`` where there is no whole result."""
    found: list[list[float] | None] = []
    for run_id in run_ids:
        try:
            found.append(None if run_id is None else load_influence(run_id).scores.ravel().tolist())
        except DitError:
            found.append(None)
    return found


def statuses(ready: Ready, experiment: str) -> dict[str, int]:
    """How many runs of an experiment have each status."""
    found = mlflow.search_runs(experiment_names=[experiment], output_format="list", max_results=10_000)
    return statuses_of(ready, [run.info.run_id for run in found])


def statuses_of(ready: Ready, run_ids: Sequence[str]) -> dict[str, int]:
    """How many of these runs have each status."""
    kinds = [MlflowClient().get_run(run_id).info.status for run_id in run_ids]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def influence_runs(ready: Ready, experiment: str) -> list[str]:
    """Ids of the influence runs of an experiment, whatever became of them."""
    found = mlflow.search_runs(experiment_names=[experiment], output_format="list", max_results=10_000)
    return [run.info.run_id for run in found if run.data.tags.get("dit.kind") == "influence"]


def kept_folder(said: str) -> str | None:
    """The folder that a message names for ``log_trajectory``."""
    found = re.findall(r"log_trajectory\('(.+?)'", said)
    return found[-1] if found and Path(found[-1]).is_dir() else None


def _digest(parameters: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(parameters):
        found.update(name.encode() + parameters[name].detach().numpy().tobytes())
    return found.hexdigest()
