"""The influence job: one run for the question, one child run for each window."""

from __future__ import annotations

from dataclasses import dataclass

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow import ActiveRun, MlflowClient
from mlflow.entities import Run

from dit_mlflow.evaluation import (
    Metrics,
    attainable,
    correlations,
    correlations_by_pattern,
    correlations_with_intervals,
    detection,
    pattern_counts,
    patterns,
    trust,
)
from dit_mlflow.evaluation.figures import (
    BESIDE,
    BY_WINDOW,
    DETECTION,
    INFLUENCE_SECONDS,
    MAX_DRIFT,
    PATTERN,
    PEAK_MEMORY,
    PEARSON,
    SPEARMAN,
    TRAINING_SECONDS,
    TRUST,
    TRUTH,
    TRUTH_SECONDS,
    WINDOW_END,
    WINDOW_START,
)
from dit_mlflow.explanation import (
    Findings,
    Gallery,
    answer_sentences,
    influence_note,
    top_samples_table,
    whole_run_table,
    window_correlations_table,
    window_note,
    windows_table,
)
from dit_mlflow.explanation.checks import NAMED, Checks, joined
from dit_mlflow.explanation.ranking import extreme_samples
from dit_mlflow.influence import Influence, Kind, Window, track
from dit_mlflow.page import influence_page
from dit_mlflow.plots import (
    plot_against_truth,
    plot_heat_map,
    plot_patterns,
    plot_recall_curves,
    plot_top_samples,
    plot_window_correlations,
    plot_window_samples,
)
from dit_mlflow.progress import progress_over
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining import confirm, leave_one_out
from dit_mlflow.tracking.jobs.train import seeds_title, workload_params, workload_title
from dit_mlflow.tracking.store.artifacts import log_influence
from dit_mlflow.tracking.store.datasets import log_datasets_of
from dit_mlflow.tracking.store.names import (
    CONFIRMED,
    GROUND_TRUTH,
    INFLUENCE,
    KIND,
    METHOD,
    TRAINING_RUN,
    WHOLE_RUN,
    WHOLE_RUN_EXACT,
)
from dit_mlflow.tracking.store.run_log import log_metrics, log_series, peak_memory_mb, project_run
from dit_mlflow.tracking.ui.links import run_link
from dit_mlflow.tracking.ui.log_plot import log_plot
from dit_mlflow.tracking.ui.notes import influence_links, set_note
from dit_mlflow.workload import Workload


@dataclass(frozen=True)
class Answer:
    """What an influence run found.

    Attributes:
        run: the parent run.
        findings: scores per window, and metrics of the whole run and of each window.
    """

    run: ActiveRun
    findings: Findings

    @property
    def influence(self) -> Influence:
        return self.findings.influence

    @property
    def whole(self) -> Metrics:
        return self.findings.whole

    @property
    def per_window(self) -> tuple[Metrics, ...]:
        return self.findings.per_window


def run_influence(
    training_run_id: str,
    trajectory: Trajectory,
    workload: Workload,
    windows: list[Window],
    kind: Kind,
    checks: Checks,
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
        checks: exact retrainings to hold the scores against.
        project_run_id: the run that ``mlflow run`` made for this job; ``None`` = start one.
    """
    tags = {KIND: "influence", METHOD: "dit", TRAINING_RUN: training_run_id}
    seeds = MlflowClient().get_run(training_run_id).data.params
    seeded = seeds_title(seeds.get("resolved.init_seed", 0), seeds.get("resolved.order_seed", 0))
    title = f"influence {workload_title(workload)}{seeded} {kind}"
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
        log_datasets_of(training_run_id, run.info.run_id)
        whole = Window(0, trajectory.num_steps)
        asked = windows if whole in windows else [*windows, whole]
        estimate = track(trajectory, workload, asked, kind, dtype=dtype, memory_budget=memory_budget)
        # Before the ground truth, which takes longest, so that nothing is lost if it is broken off.
        log_influence(estimate.select(windows))
        if windows != [whole]:
            log_influence(estimate.select([whole]), folder=WHOLE_RUN)
        truth = None
        if checks.ground_truth != 0:
            truth = leave_one_out(trajectory, workload, asked, kind, samples=checks.ground_truth)
        metrics = [_window_metrics(estimate, truth, window, workload) for window in asked]
        if truth is not None:
            floor = attainable(truth, trajectory, workload)
            metrics = [found.and_(more.prefixed(TRUTH)) for found, more in zip(metrics, floor, strict=True)]
        if checks.trust:
            trusted = trust(estimate, trajectory, workload, checks.trust, truth)
            metrics = [found.and_(more.prefixed(TRUST)) for found, more in zip(metrics, trusted, strict=True)]
        checked = int(np.isfinite(truth.of(whole)).sum()) if truth is not None else 0
        confirmed = None
        if truth is None and checks.confirm:
            confirmed = confirm(estimate.select(windows), trajectory, workload, checks.confirm)
            log_influence(confirmed, folder=CONFIRMED)
        exact = truth or confirmed
        named = None if truth is None else truth.select([whole])
        if checks.trust:
            # A few large estimates are what people look at first, and those that are furthest off.
            samples = [sample for side in extreme_samples(estimate.select([whole]), NAMED) for sample in side]
            unknown = [sample for sample in samples if named is None or np.isnan(named.of(whole)[sample])]
            if unknown:
                named = joined(named, leave_one_out(trajectory, workload, [whole], kind, samples=unknown))
        if named is not None:
            log_influence(named, folder=WHOLE_RUN_EXACT)
        findings = Findings(
            estimate.select(windows),
            metrics[asked.index(whole)],
            tuple(metrics[: len(windows)]),
            Gallery(workload),
            checked,
            joined(named, exact),
            estimate.select([whole]),
        )
        answer = Answer(run, findings)
        table = _log_parent(answer, estimate, truth, confirmed, workload, training_run_id)
        # The UI lists the newest first: the last window is logged first, so that they stand in order.
        positions = progress_over(range(len(windows))[::-1], "logging windows", "window")
        runs = [_log_window(answer, k, exact, table, workload, training_run_id) for k in positions][::-1]
        set_note(run.info.run_id, influence_note(findings, influence_links(run, training_run_id, runs)))
    return answer


def _window_metrics(estimate: Influence, truth: Influence | None, window: Window, workload: Workload) -> Metrics:
    found = detection(estimate.of(window), workload.corrupted).prefixed(DETECTION)
    if truth is None:
        return found
    agreement = correlations(estimate.of(window), truth.of(window)).and_(
        correlations_with_intervals(estimate.of(window), truth.of(window), (SPEARMAN.leaf, PEARSON.leaf))
    )
    return agreement.prefixed(TRUTH).and_(found)


def _log_parent(
    answer: Answer,
    estimate: Influence,
    truth: Influence | None,
    confirmed: Influence | None,
    workload: Workload,
    training_run_id: str,
) -> pd.DataFrame:
    """Returns the table of the top samples."""
    log_metrics(answer.whole)
    log_metrics(_costs(estimate, truth, training_run_id))
    # Bounds and levels of chance stand on the window's own run; as charts they would only be in the way.
    figures = (name for metrics in answer.per_window for name in metrics.values)
    for name in dict.fromkeys(name for name in figures if not name.endswith(BESIDE)):
        log_series(BY_WINDOW + name, [metrics.values.get(name) for metrics in answer.per_window])
    influence, gallery = answer.influence, answer.findings.gallery
    windows = list(influence.windows)
    whole = Window(0, max(window.end for window in estimate.windows))
    exact = truth.select(windows) if truth is not None else confirmed
    mlflow.log_table(windows_table(influence, answer.per_window), f"{INFLUENCE}/windows.json")
    samples = top_samples_table(influence, exact, gallery)
    mlflow.log_table(samples, f"{INFLUENCE}/top_samples.json")
    mlflow.log_table(whole_run_table(estimate.select([whole]), answer.findings.exact, gallery), f"{WHOLE_RUN}.json")
    if len(windows) > 1:
        names = patterns(influence)
        log_metrics(pattern_counts(names).prefixed(PATTERN))
        if truth is not None:
            log_metrics(correlations_by_pattern(estimate.of(whole), truth.of(whole), names).prefixed(PATTERN))
        mlflow.log_table(window_correlations_table(influence), f"{INFLUENCE}/window_correlations.json")
        log_plot(plot_window_correlations(influence), f"{INFLUENCE}/window_correlations.png")
        log_plot(plot_patterns(influence, names), f"{INFLUENCE}/patterns.png")
    if workload.corrupted:
        curves = {f"{found.method}, whole run": found.of(whole) for found in (estimate, truth) if found is not None}
        log_plot(plot_recall_curves(curves, workload.corrupted), f"{INFLUENCE}/recall_curve.png")
    ranking = answer.findings.ranking
    log_plot(plot_top_samples(influence, gallery, whole=ranking), f"{INFLUENCE}/influence_over_windows.png")
    log_plot(plot_heat_map(influence, gallery, whole=ranking), f"{INFLUENCE}/heat_map.png")
    measured = dict(zip([*windows, whole], [*answer.per_window, answer.whole], strict=True))
    known = answer.findings.exact
    sentences = answer_sentences(answer.findings)
    report = influence_page(estimate, known, gallery, windows, measured, workload_title(workload), sentences)
    mlflow.log_text(report, f"{INFLUENCE}/report.html")
    if truth is not None:
        log_influence(truth.select(windows), folder=GROUND_TRUTH)
        everywhere = range(len(estimate.windows))
        figure = plot_against_truth(estimate, truth, everywhere, workload.corrupted)
        log_plot(figure, f"{INFLUENCE}/against_leave_one_out.png")
    return samples


def window_run_name(window: Window, index: int, count: int) -> str:
    """``w03 240-320``: names of ``count`` windows sort as the windows do."""
    return f"w{index:0{max(2, len(str(count - 1)))}d} {window}"


def _log_window(
    answer: Answer, index: int, exact: Influence | None, samples: pd.DataFrame, workload: Workload, training_run_id: str
) -> Run:
    """Log a window's run. ``exact``: leave-one-out, for some samples; ``samples``: the top samples of all windows."""
    influence = answer.influence
    window = influence.windows[index]
    tags = {KIND: "window", METHOD: influence.method, TRAINING_RUN: training_run_id}
    name = window_run_name(window, index, len(influence.windows))
    with mlflow.start_run(run_name=name, nested=True, tags=tags) as run:
        bounds = {"window_index": index, "window_start": window.start, "window_end": window.end}
        mlflow.log_params({"method": influence.method, "kind": influence.kind, **bounds})
        log_metrics(answer.per_window[index])
        # After the others: the page that compares runs begins with the metric that was logged first.
        mlflow.log_metrics({WINDOW_START.name: window.start, WINDOW_END.name: window.end})
        known = None if exact is None else exact.of(window)
        log_plot(plot_window_samples(influence, index, answer.findings.gallery, known), "top_samples.png")
        mlflow.log_table(samples[samples["window_index"] == index], "top_samples.json")
        if exact is not None and answer.findings.checked:
            figure = plot_against_truth(influence, exact, [index], workload.corrupted)
            log_plot(figure, "against_leave_one_out.png")
        parent = (answer.run.info.run_name or "the influence run", run_link(answer.run))
        set_note(run.info.run_id, window_note(answer.findings, index, parent))
    return run


def _costs(estimate: Influence, truth: Influence | None, training_run_id: str) -> Metrics:
    costs = {
        INFLUENCE_SECONDS.name: estimate.metadata["seconds"],
        TRUTH_SECONDS.name: truth.metadata["seconds"] if truth is not None else None,
        TRAINING_SECONDS.name: MlflowClient().get_run(training_run_id).data.metrics.get(TRAINING_SECONDS.name),
        PEAK_MEMORY.name: peak_memory_mb(),
        MAX_DRIFT.name: estimate.metadata["max_drift"],
    }
    return Metrics({name: value for name, value in costs.items() if value is not None})
