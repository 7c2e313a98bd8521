"""The main job: check everything, train if there is no trajectory yet, compute influence, say what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dit_mlflow.errors import InputError, WorkloadError
from dit_mlflow.evaluation import Metrics
from dit_mlflow.explanation import answer_sentences, paragraph, terminal_table, windows_table
from dit_mlflow.explanation.checks import Checks
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
    headings = {
        "window": "window",
        "start": "from step",
        "end": "to step",
        "most_harmful": "most harmful",
        "most_helpful": "most helpful",
        "ground_truth/spearman": "Spearman",
        "ground_truth/pearson": "Pearson",
        "trust/spearman": "Spearman",
        "trust/smoothness": "smoothness",
        "detection/recall_at_k": "recall@k",
        "detection/auroc": "AUROC",
    }
    if "ground_truth/spearman" in answer.whole.values:
        del headings["trust/spearman"]
    lines = [
        "",
        f"Influence ({answer.influence.kind}) on {answer.influence.queries[0]}, per window of steps, end excluded",
        *_legend(answer.whole),
        "",
        terminal_table(windows_table(answer.influence, answer.per_window), headings),
        "",
    ]
    whole = {name: answer.whole.values.get(key) for key, name in headings.items()}
    figures = ", ".join(f"{name} {value:.3f}" for name, value in whole.items() if value is not None)
    lines += [f"Whole run: {figures}"] if figures else []
    lines += [*_trusted(answer.whole), "", *(paragraph(text) for text in answer_sentences(answer.findings)), ""]
    lines += [
        f"training run   {training_run}",
        f"influence run  {answer.run.info.run_id}",
        where_to_look(answer.run),
    ]
    return "\n".join(lines)


def _trusted(metrics: Metrics) -> list[str]:
    """How far the scores of the whole run can be trusted, in a sentence."""
    found = {name.removeprefix("trust/"): value for name, value in metrics.values.items()}
    if "spearman_low" not in found or "smoothness" not in found:
        return []
    return [
        f"Trust: over {found['samples']:.0f} samples left out exactly, Spearman {found['spearman']:.3f} "
        f"(95 % interval {found['spearman_low']:.3f} to {found['spearman_high']:.3f}); effects are estimated at "
        f"{found['spread_ratio']:.2f} times their true spread"
    ]


def _legend(metrics: Metrics) -> list[str]:
    lines = ["most harmful, most helpful: the training samples whose removal lowers it most, raises it most"]
    if any(name.startswith(("ground_truth/", "trust/spearman")) for name in metrics.values):
        lines.append("Spearman, Pearson: agreement of the estimate with exact retraining without each sample")
    if "trust/smoothness" in metrics.values:
        lines.append("smoothness: 1 if training is linear in the samples' weights, as the estimate takes it to be")
    if any(name.startswith("detection/") for name in metrics.values):
        lines.append("recall@k, AUROC: how well the lowest scores find the corrupted samples")
    return lines
