"""What a user asks of a job, as given on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeVar

import pandas as pd
import torch

from dit_mlflow.command import option
from dit_mlflow.errors import InputError, WorkloadError
from dit_mlflow.explanation import Checks
from dit_mlflow.explanation.asked_query import read_groups
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.influence import Window, parse_windows
from dit_mlflow.influence.rehearsal import rehearse
from dit_mlflow.methods.dit import Dit
from dit_mlflow.methods.removal import Removal, check_removal, usual_share
from dit_mlflow.progress import phase
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.compiled_step import check_compile
from dit_mlflow.retraining import Groups
from dit_mlflow.retraining.groups import check_groups
from dit_mlflow.told import text_of
from dit_mlflow.tracking.jobs.train import run_training
from dit_mlflow.tracking.store.artifacts import load_trajectory
from dit_mlflow.workload import Workload, WorkloadReference, load_recorded, load_workload

Checked = TypeVar("Checked")

DEFAULT_WORKLOAD = "projects/mnist"

SWEEP_DTYPES: dict[str, torch.dtype | None] = {
    "recorded": None,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Request:
    """What a user asks of the main job.

    Attributes:
        training_run: a run with a trajectory; empty = train first.
        workload: reference; empty = the training run's own, or :data:`DEFAULT_WORKLOAD`.
        windows: see :func:`dit_mlflow.parse_windows`.
        kind: ``local``, ``final`` or ``cumulative``.
        query: see :func:`dit_mlflow.explanation.asked_query.parse_query`; empty = the mean validation loss.
        ground_truth: ``all``, ``none`` or a number of samples.
        trust: random samples left out exactly where the ground truth does not, see :func:`dit_mlflow.evaluation.trust`;
            0 = none.
        confirm: samples of largest score to leave out exactly in each window; 0 = none.
        dtype: of the sweep, a key of :data:`SWEEP_DTYPES`.
        memory_mb: MiB for the states that the sweep holds, and as much for its adjoints; 0 = the default of
            :func:`dit_mlflow.track`.
        compile: whether the sweep's steps are compiled: ``auto``, ``always``, ``never``; see :func:`dit_mlflow.track`.
        removed: the share of the samples whose removal is asked about (:func:`dit_mlflow.removal_influence`; by
            default, at least two samples); 0 = the derivative in one sample's weight (:func:`dit_mlflow.track`).
        trainings: the budget of the former.
        groups: groups of samples to leave out together: ``label`` (those of each label), or a CSV file with the columns
            ``sample_index`` and ``group``; empty = none.
        init_seed, order_seed: of training.
        settings: of the workload.
        all_figures: log every figure, not only those that docs/figures.md calls default.
        trust_workload: the user consents to run the workload that the training run names, whatever that is.
    """

    training_run: str = ""
    workload: str = ""
    windows: str = "5"
    kind: str = "local"
    query: str = ""
    ground_truth: str = "all"
    trust: int = 24
    confirm: int = 0
    dtype: str = "recorded"
    memory_mb: int = 0
    compile: str = "auto"
    removed: float = Removal.removed
    trainings: int = 16
    groups: str = ""
    init_seed: int = 0
    order_seed: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    all_figures: bool = False
    trust_workload: bool = False

    @property
    def memory_budget(self) -> int | None:
        """``memory_mb`` in bytes, ``None`` = the default; raises :class:`InputError` if it is negative."""
        if self.memory_mb < 0:
            raise InputError(f"memory_mb={self.memory_mb}; expected MiB, or 0 for the default")
        return self.memory_mb * 2**20 or None

    def method(self, workload: Workload) -> Dit | Removal:
        """The estimator asked for; raises :class:`InputError` for values that cannot be used."""
        if self.dtype not in SWEEP_DTYPES:
            raise InputError(f"dtype={self.dtype!r}; expected one of {', '.join(SWEEP_DTYPES)}")
        dtype, compile = SWEEP_DTYPES[self.dtype], check_compile(self.compile)
        if self.removed == 0:
            return Dit(dtype, self.memory_budget, compile)
        # Of few samples, the default share would be less than two.
        small = self.removed == Removal.removed and workload.num_samples > 2
        removed = usual_share(workload.num_samples) if small else self.removed
        check_removal(workload.num_samples, removed, self.trainings, 0)
        return Removal(
            removed=removed, trainings=self.trainings, dtype=dtype, memory_budget=self.memory_budget, compile=compile
        )

    def checks(self, workload: Workload) -> Checks:
        """The exact retrainings asked for; raises :class:`InputError` for values that cannot be used."""
        return Checks.parse(self.ground_truth, workload.num_samples, self.trust, self.confirm)


def parse_groups(text: str, workload: Workload) -> Groups | None:
    """The groups that ``groups=`` names; raises :class:`InputError` for what cannot be used."""
    if not text:
        return None
    if text == "label":
        gallery = Gallery(workload)
        labels = pd.Series([gallery.label_of(index) for index in range(workload.num_samples)])
        if labels.isna().any():
            raise InputError(
                "groups=label, and the workload's samples have no labels; give a CSV file, or Workload.label"
            )
        found = {f"label {label}": part.index.tolist() for label, part in labels.groupby(labels)}
    else:
        found = read_groups(text, "groups", "label, or a CSV file")
    check_groups(found, workload.num_samples)
    return found


def recorded_workload(request: Request, trajectory: Trajectory) -> Workload:
    """The workload that a trajectory was recorded with, or, without one, the workload that the request names.

    Raises:
        UntrustedError: the record names it, and the request neither names it nor trusts the record.
        WorkloadError: none is known, or the request contradicts the record.
    """
    for name in ("init_seed", "order_seed"):
        if getattr(request, name):
            raise InputError(
                f"{name}={getattr(request, name)} belongs to training, and training_run={request.training_run} is "
                "trained already; leave one of the two out"
            )
    recorded = trajectory.manifest.workload
    if recorded is None:
        if not request.workload:
            raise WorkloadError(
                f"the trajectory of run {request.training_run} was recorded without a workload; name one that has "
                f"its model, data and loss: {option('workload', 'projects/…')} or package.module:factory"
            )
        return load_workload(request.workload, **request.settings)
    if request.workload and _own_name(request.workload) != _own_name(recorded.reference):
        raise WorkloadError(
            f"run {request.training_run} trained {recorded.reference}, not {request.workload}; name that one, or leave "
            "workload out"
        )

    def build(settings: Mapping[str, Any]) -> Workload:
        if request.workload:
            return load_workload(request.workload, **settings)
        asked = WorkloadReference(reference=recorded.reference, settings=dict(settings))
        return load_recorded(asked, trajectory.directory, request.trust_workload)

    workload = build(recorded.settings)
    if request.settings:
        asked = build({**recorded.settings, **request.settings}).settings
        changed = [name for name in request.settings if asked[name] != workload.settings[name]]
        if changed:
            name = changed[0]
            raise WorkloadError(
                f"run {request.training_run} was trained with {name}={text_of(workload.settings[name], 200)}; "
                f"{name}={text_of(asked[name], 200)} "
                "needs a new training: leave training_run out"
            )
    return workload


def _own_name(reference: str) -> str:
    """Of the function, or of the folder: a workload may have moved since it was recorded."""
    return PurePath(reference.rpartition(":")[2]).name


def trained(
    request: Request, check: Callable[[Workload], Checked]
) -> tuple[str, Trajectory, Workload, list[Window], Checked]:
    """The training that the request is about, which is made first if it names none, and what ``check`` returns.

    The windows and ``check`` are asked, and two steps are rehearsed, before anything is trained.

    Returns:
        Id of the training run, trajectory, workload, windows, and ``check(workload)``.

    Raises:
        DitError: some part of the request cannot be used, or training fails.
    """
    if request.training_run:
        trajectory = load_trajectory(request.training_run)
        workload = recorded_workload(request, trajectory)
        windows = parse_windows(request.windows, trajectory)
        return request.training_run, trajectory, workload, windows, check(workload)
    workload = load_workload(request.workload or DEFAULT_WORKLOAD, **request.settings)
    windows, checked = parse_windows(request.windows, workload.plan), check(workload)
    rehearse(workload, request.memory_budget)
    phase("training")
    run_id = run_training(workload, request.init_seed, request.order_seed)
    return run_id, load_trajectory(run_id), workload, windows, checked
