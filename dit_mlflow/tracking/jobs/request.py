"""The main job: check everything, train if there is no trajectory yet, compute influence, say what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dit_mlflow.errors import InputError, WorkloadError
from dit_mlflow.evaluation import Metrics
from dit_mlflow.evaluation.figures import (
    FIDELITY,
    SMOOTHNESS,
    SPEARMAN,
    SPREAD_RATIO,
    TRUST_SAMPLES,
    TRUST_SPEARMAN,
    WINDOW_END,
    WINDOW_START,
)
from dit_mlflow.explanation import answer_sentences, paragraph, terminal_table, windows_table
from dit_mlflow.explanation.checks import Checks
from dit_mlflow.explanation.tables import OF_WINDOWS
from dit_mlflow.influence import check_kind, parse_windows
from dit_mlflow.influence.rehearsal import rehearse
from dit_mlflow.replay import Trajectory
from dit_mlflow.tracking.jobs.influence import Answer, run_influence
from dit_mlflow.tracking.jobs.train import run_training
from dit_mlflow.tracking.store.artifacts import load_trajectory
from dit_mlflow.tracking.ui.links import where_to_look
from dit_mlflow.workload import Workload, load_recorded, load_workload

DEFAULT_WORKLOAD = "projects/mnist"

DTYPES: dict[str, torch.dtype | None] = {
    "recorded": None,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Request:
    """What a user asks of the main job, as text and numbers from the command line.

    Attributes:
        training_run: a run with a trajectory; empty = train first.
        workload: reference; empty = the training run's own, or :data:`DEFAULT_WORKLOAD`.
        windows: see :func:`dit_mlflow.parse_windows`.
        kind: ``local``, ``final`` or ``cumulative``.
        ground_truth: ``all``, ``none`` or a number of samples.
        trust: random samples left out exactly where the ground truth does not, see :func:`dit_mlflow.evaluation.trust`;
            0 = do without.
        confirm: samples of largest score to leave out exactly in each window; 0 = none.
        dtype: of the sweep, a key of :data:`DTYPES`.
        memory_mb: MiB for the states that the sweep holds, and as much for its adjoints; 0 = the default of
            :func:`dit_mlflow.track`.
        init_seed, order_seed: of training.
        settings: of the workload.
    """

    training_run: str = ""
    workload: str = ""
    windows: str = "5"
    kind: str = "local"
    ground_truth: str = "all"
    trust: int = 24
    confirm: int = 0
    dtype: str = "recorded"
    memory_mb: int = 0
    init_seed: int = 0
    order_seed: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def memory_budget(self) -> int | None:
        """``memory_mb`` in bytes, ``None`` = the default; raises :class:`InputError` if it is negative."""
        if self.memory_mb < 0:
            raise InputError(f"memory_mb={self.memory_mb}; expected MiB, or 0 for the default")
        return self.memory_mb * 2**20 or None


def main_job(request: Request, project_run_id: str | None = None) -> str:
    """Run the main job; returns what the terminal shows at the end.

    All of the request is checked, and two steps are rehearsed, before anything is trained for long or logged.

    Raises:
        DitError: some part of the request cannot be used, or training or replay fail.
    """
    kind = check_kind(request.kind)
    if request.dtype not in DTYPES:
        raise InputError(f"dtype={request.dtype!r}; expected one of {', '.join(DTYPES)}")
    memory_budget = request.memory_budget
    if request.training_run:
        trajectory = load_trajectory(request.training_run)
        workload = recorded_workload(request, trajectory)
        windows = parse_windows(request.windows, trajectory)
        checks = Checks.parse(request.ground_truth, request.trust, request.confirm, workload.num_samples)
        training_run = request.training_run
    else:
        workload = load_workload(request.workload or DEFAULT_WORKLOAD, **request.settings)
        windows = parse_windows(request.windows, workload.plan)
        checks = Checks.parse(request.ground_truth, request.trust, request.confirm, workload.num_samples)
        rehearse(workload, memory_budget)
        training_run = run_training(workload, request.init_seed, request.order_seed)
        trajectory = load_trajectory(training_run)
    answer = run_influence(
        training_run,
        trajectory,
        workload,
        windows,
        kind,
        checks,
        DTYPES[request.dtype],
        memory_budget,
        project_run_id,
    )
    return summary(answer, training_run)


def recorded_workload(request: Request, trajectory: Trajectory) -> Workload:
    """The workload that a trajectory was recorded with, or the one the request names.

    Raises:
        WorkloadError: none is known, or the request contradicts the record.
    """
    for name in ("init_seed", "order_seed"):
        if getattr(request, name):
            raise InputError(
                f"{name}={getattr(request, name)} belongs to training, which training_run={request.training_run} "
                "has behind it; leave one of the two out"
            )
    recorded = trajectory.manifest.workload
    if recorded is None:
        if not request.workload:
            raise WorkloadError(
                f"the trajectory of run {request.training_run} was recorded without a workload; name one that has "
                "its model, data and loss: -P workload=projects/… or package.module:factory"
            )
        return load_workload(request.workload, **request.settings)
    if request.workload not in ("", recorded.reference):
        raise WorkloadError(
            f"run {request.training_run} trained {recorded.reference}, not {request.workload}; leave workload out"
        )
    workload = load_recorded(recorded, trajectory.directory)
    if request.settings:
        asked = load_workload(recorded.reference, **{**recorded.settings, **request.settings}).settings
        changed = [name for name in request.settings if asked[name] != workload.settings[name]]
        if changed:
            name = changed[0]
            raise WorkloadError(
                f"run {request.training_run} was trained with {name}={workload.settings[name]}; {name}={asked[name]} "
                "needs a new training: leave training_run out"
            )
    return workload


def summary(answer: Answer, training_run: str) -> str:
    """A table with a row per window and one for the whole run, and where to look further."""
    agreement = SPEARMAN if SPEARMAN.name in answer.whole.values else TRUST_SPEARMAN
    figures = [figure for figure in OF_WINDOWS if figure is agreement or figure not in FIDELITY]
    headings = {
        "window": "window",
        "start": WINDOW_START.heading,
        "end": WINDOW_END.heading,
        "most_harmful": "most harmful",
        "most_helpful": "most helpful",
        **{figure.name: figure.heading for figure in figures},
    }
    table = windows_table(answer.influence, answer.per_window)
    lines = [
        "",
        f"Influence ({answer.influence.kind}) on {answer.influence.queries[0]}, per window of steps, end excluded",
        "most harmful, most helpful: the training samples whose removal lowers it most, raises it most",
        *(f"{figure.heading}: {figure.sentence}" for figure in figures if figure.name in table),
        "",
        terminal_table(table, headings),
        "",
    ]
    known = [figure for figure in figures if figure.name in answer.whole.values]
    whole = ", ".join(f"{figure.heading} {answer.whole.values[figure.name]:.3f}" for figure in known)
    lines += [f"Whole run: {whole}"] if whole else []
    lines += [*_trusted(answer.whole), "", *(paragraph(text) for text in answer_sentences(answer.findings)), ""]
    lines += [
        f"training run   {training_run}",
        f"influence run  {answer.run.info.run_id}",
        where_to_look(answer.run),
    ]
    return "\n".join(lines)


def _trusted(metrics: Metrics) -> list[str]:
    """How far the scores of the whole run can be trusted, in a sentence."""
    found = metrics.values
    if TRUST_SPEARMAN.low not in found or SMOOTHNESS.name not in found:
        return []
    return [
        f"Trust: over {found[TRUST_SAMPLES.name]:.0f} samples left out exactly, {TRUST_SPEARMAN.heading} "
        f"{found[TRUST_SPEARMAN.name]:.3f} (95 % interval {found[TRUST_SPEARMAN.low]:.3f} to "
        f"{found[TRUST_SPEARMAN.high]:.3f}); effects are estimated at {found[SPREAD_RATIO.name]:.2f} times their true "
        "spread"
    ]
