"""The influence job: one run for the question, one child run for each window."""

from __future__ import annotations

from dataclasses import dataclass

import mlflow
import torch
from mlflow import ActiveRun, MlflowClient

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation import Metrics, correlations, detection, pattern_counts, patterns
from dit_mlflow.influence import Influence, Kind, Window, track
from dit_mlflow.methods import leave_one_out
from dit_mlflow.report import (
    plot_against_truth,
    plot_top_samples,
    plot_window_correlations,
    top_samples_table,
    windows_table,
)
from dit_mlflow.tracking.artifacts import log_influence
from dit_mlflow.tracking.names import GROUND_TRUTH, INFLUENCE, KIND, METHOD, TRAINING_RUN
from dit_mlflow.tracking.runs import log_metrics, log_series, peak_memory_mb, project_run
from dit_mlflow.tracking.training import workload_params, workload_title
from dit_mlflow.trajectory import Trajectory, Workload


@dataclass(frozen=True)
class GroundTruth:
    """How many samples to retrain without: ``None`` = all, 0 = none."""

    samples: int | None

    @classmethod
    def parse(cls, text: str, num_samples: int) -> GroundTruth:
        """Read ``all``, ``none`` or a number; raises :class:`InputError` for anything else."""
        if text in ("all", "none"):
            return cls(None if text == "all" else 0)
        if text.isdecimal() and 0 < int(text) <= num_samples:
            return cls(int(text))
        raise InputError(f"ground_truth={text!r}; expected 'all', 'none' or a number of samples, 1 … {num_samples}")


@dataclass(frozen=True)
class Answer:
    """What an influence run found.

    Attributes:
        run: the parent run.
        influence: scores per window.
        whole: metrics of the whole run ``[0, T)``.
        per_window: metrics of each window.
    """

    run: ActiveRun
    influence: Influence
    whole: Metrics
    per_window: tuple[Metrics, ...]


def run_influence(
    training_run_id: str,
    trajectory: Trajectory,
    workload: Workload,
    windows: list[Window],
    kind: Kind,
    ground_truth: GroundTruth,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    project_run_id: str | None = None,
) -> Answer:
    """Compute influence per window and log it: a parent run, and a nested child per window.

    The parent holds scores, tables, plots, ``by_window/…`` series, and the metrics of the whole run ``[0, T)``; each
    child the metrics of its window.

    Args:
        training_run_id: the run that recorded ``trajectory``.
        trajectory, workload, windows, kind, dtype, memory_budget: see :func:`dit_mlflow.track`.
        ground_truth: samples to check against exact leave-one-out.
        project_run_id: the run that ``mlflow run`` made for this job; ``None`` = start one.
    """
    tags = {KIND: "influence", METHOD: "dit", TRAINING_RUN: training_run_id}
    title = f"influence {workload_title(workload)} {kind}"
    with project_run(project_run_id, title, tags) as run:
        mlflow.log_params(
            {
                **workload_params(workload),
                "method": "dit",
                "resolved.kind": kind,
                "resolved.windows": len(windows),
                "resolved.dtype": str(dtype or "recorded").removeprefix("torch."),
                "resolved.training_run": training_run_id,
            }
        )
        whole = Window(0, trajectory.num_steps)
        asked = windows if whole in windows else [*windows, whole]
        estimate = track(trajectory, workload, asked, kind, dtype=dtype, memory_budget=memory_budget)
        # Before the ground truth, which takes longest, so that nothing is lost if it is broken off.
        log_influence(estimate.select(windows))
        truth = None
        if ground_truth.samples != 0:
            truth = leave_one_out(trajectory, workload, asked, kind, samples=ground_truth.samples)
        metrics = [_window_metrics(estimate, truth, window, workload) for window in asked]
        answer = Answer(run, estimate.select(windows), metrics[asked.index(whole)], tuple(metrics[: len(windows)]))
        _log_parent(answer, estimate, truth, workload, training_run_id)
        for index in range(len(windows)):
            _log_window(answer, index, truth, workload, training_run_id)
    return answer


def _window_metrics(estimate: Influence, truth: Influence | None, window: Window, workload: Workload) -> Metrics:
    found = detection(estimate.of(window), workload.corrupted).prefixed("detection/")
    if truth is None:
        return found
    agreement = correlations(estimate.of(window), truth.of(window)).prefixed("ground_truth/")
    return Metrics({**agreement.values, **found.values}, {**agreement.undefined, **found.undefined})


def _log_parent(
    answer: Answer, estimate: Influence, truth: Influence | None, workload: Workload, training_run_id: str
) -> None:
    log_metrics(answer.whole)
    log_metrics(_costs(estimate, truth, training_run_id))
    for name in dict.fromkeys(name for metrics in answer.per_window for name in metrics.values):
        log_series(f"by_window/{name}", [metrics.values.get(name) for metrics in answer.per_window])
    influence = answer.influence
    windows = list(influence.windows)
    exact = truth.select(windows) if truth is not None else None
    mlflow.log_table(windows_table(influence, answer.per_window), f"{INFLUENCE}/windows.json")
    samples = top_samples_table(influence, exact, workload.corrupted, workload.describe)
    mlflow.log_table(samples, f"{INFLUENCE}/top_samples.json")
    if len(windows) > 1:
        log_metrics(pattern_counts(patterns(influence)).prefixed("patterns/"))
        mlflow.log_figure(plot_window_correlations(influence), f"{INFLUENCE}/window_correlations.png")
    figure = plot_top_samples(influence, describe=workload.describe)
    mlflow.log_figure(figure, f"{INFLUENCE}/influence_over_windows.png")
    if truth is not None and exact is not None:
        log_influence(exact, folder=GROUND_TRUTH)
        everywhere = range(len(estimate.windows))
        figure = plot_against_truth(estimate, truth, everywhere, workload.corrupted)
        mlflow.log_figure(figure, f"{INFLUENCE}/against_leave_one_out.png")


def _log_window(answer: Answer, index: int, truth: Influence | None, workload: Workload, training_run_id: str) -> None:
    influence = answer.influence
    window = influence.windows[index]
    width = len(str(len(influence.windows) - 1))
    tags = {KIND: "window", METHOD: influence.method, TRAINING_RUN: training_run_id}
    name = f"w{index:0{max(2, width)}d} {window}"
    with mlflow.start_run(run_name=name, nested=True, tags=tags):
        bounds = {"window_index": index, "window_start": window.start, "window_end": window.end}
        mlflow.log_params({"method": influence.method, "kind": influence.kind, **bounds})
        mlflow.log_metrics({"window_start": window.start, "window_end": window.end})
        log_metrics(answer.per_window[index])
        if truth is not None:
            figure = plot_against_truth(influence, truth, [index], workload.corrupted)
            mlflow.log_figure(figure, "against_leave_one_out.png")


def _costs(estimate: Influence, truth: Influence | None, training_run_id: str) -> Metrics:
    costs = {
        "cost/influence_seconds": estimate.metadata["seconds"],
        "cost/ground_truth_seconds": truth.metadata["seconds"] if truth is not None else None,
        "cost/training_seconds": MlflowClient().get_run(training_run_id).data.metrics.get("cost/training_seconds"),
        "cost/peak_memory_mb": peak_memory_mb(),
        "replay/max_drift": estimate.metadata["max_drift"],
    }
    return Metrics({name: value for name, value in costs.items() if value is not None})
