"""The registration job: store influence with its model, and say where."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import mlflow
from mlflow.entities import Run

from dit_mlflow.errors import InputError
from dit_mlflow.told import told
from dit_mlflow.tracking.jobs.influence_model import check_influence_model, log_influence_model
from dit_mlflow.tracking.jobs.register_influence import Registration, asked_and_trained, check_name, register_influence
from dit_mlflow.tracking.store.artifacts import load_trajectory
from dit_mlflow.tracking.store.names import INFLUENCE_RUN, KIND, TRAINING_RUN
from dit_mlflow.tracking.store.run_log import project_run
from dit_mlflow.tracking.ui.links import version_link, where_is
from dit_mlflow.workload import WorkloadReference, load_recorded


@dataclass(frozen=True)
class RegistrationRequest:
    """What a user asks of the registration job, as text from the command line.

    Attributes:
        influence_run, model_name, model: see :func:`dit_mlflow.tracking.register_influence`.
        influence_model: name of a registered model that answers influence queries for new rows; empty = make none.
        workload: reference, for the influence model; empty = the training's or the influence run's own.
        trust_workload: the user consents to run the workload that those name, whatever that is.
    """

    influence_run: str = ""
    model_name: str = ""
    model: str = ""
    influence_model: str = ""
    workload: str = ""
    trust_workload: bool = False


def register_job(request: RegistrationRequest, project_run_id: str | None = None) -> str:
    """Register; returns text for the terminal.

    The run that ``mlflow run`` made for this job gets tags of what was registered; without it, no run is made.

    Raises:
        DitError: before anything is changed: some part of the request cannot be used.
    """
    for name in ("influence_run", "model_name"):
        if not getattr(request, name):
            raise InputError(f"{name} is missing; expected -P {name}=…")
    if request.influence_model:
        check_name(request.influence_model)
        if request.influence_model == request.model_name:
            raise InputError(f"model_name and influence_model are both {request.model_name!r}; they are two models")
    job = project_run(project_run_id, f"register {request.model_name}", {KIND: "registration"})
    with job if project_run_id is not None else nullcontext():
        reference = ""
        settings: dict[str, str] = {}
        if request.influence_model:
            influence, training = asked_and_trained(request.influence_run)
            reference, settings = _workload_of(request, influence, training.info.run_id)
            check_influence_model(training.info.run_id, reference, settings, request.trust_workload)
        done = register_influence(request.influence_run, request.model_name, request.model)
        if project_run_id is not None:
            mlflow.set_tags({INFLUENCE_RUN: done.influence_run, TRAINING_RUN: done.training_run})
        lines = _summary(done)
        if request.influence_model:
            windows = ",".join(f"{window.start}:{window.end}" for window in done.influence.windows)
            asked = done.training_run, windows, _kind(done.influence.kind), request.influence_model
            answering = log_influence_model(
                *asked, workload=reference, settings=settings, trust_workload=request.trust_workload
            )
            lines.append(f"answers rows   models:/{request.influence_model}/{answering.version}")
    return "\n".join(["", *lines, where_is(version_link(done.version))])


def _workload_of(request: RegistrationRequest, influence: Run, training_run: str) -> tuple[str, dict[str, str]]:
    """Reference and settings of the workload, where the training did not record one; empty if none is known.

    Raises:
        UntrustedError: the influence run names it, and the user neither names it nor trusts the run.
        WorkloadError: it cannot be used.
    """
    trajectory = load_trajectory(training_run)
    params = influence.data.params
    reference = params.get("resolved.workload", "None")
    if trajectory.manifest.workload is not None or reference == "None":
        return request.workload, {}
    settings = {name.removeprefix("workload."): value for name, value in params.items() if name.startswith("workload.")}
    if not request.workload:  # A run's parameters are trusted no more than a trajectory is.
        recorded = WorkloadReference(reference=reference, settings=settings)
        load_recorded(recorded, trajectory.directory, request.trust_workload)
    return request.workload or reference, settings


def _summary(done: Registration) -> list[str]:
    version = f"models:/{done.version.name}/{done.version.version}"
    there = "new" if done.created else "was there, now up to date"
    found = done.influence
    lines = [
        f"registered     {version} ({there}), from {done.model_id}",
        f"influence      {found.kind} by {told(found.method, 100)}, {len(found.windows)} windows, "
        f"{len(found.samples)} samples, of run {done.influence_run}",
    ]
    if done.replaced is not None:
        lines.append(f"in place of    the influence of run {done.replaced}")
    return lines


def _kind(kind: str) -> str:
    """Methods without a kind score the whole training, for which all kinds are the same."""
    return "local" if kind == "none" else kind
