"""Logs an explanation as an influence run with a nested child run for each window."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlflow
import pandas as pd
from matplotlib.figure import Figure
from mlflow import ActiveRun, MlflowClient
from mlflow.entities import Run

from dit_mlflow.evaluation import Metrics
from dit_mlflow.evaluation.figures import (
    BESIDE,
    BY_WINDOW,
    PEAK_MEMORY,
    TRAINING_SECONDS,
    WINDOW_END,
    WINDOW_START,
    by_default,
)
from dit_mlflow.explanation import (
    Explanation,
    influence_note,
    top_samples_table,
    whole_run_table,
    window_correlations_table,
    window_note,
    windows_table,
)
from dit_mlflow.explanation.explanation import Part
from dit_mlflow.influence import Influence, Window
from dit_mlflow.page import explanation_page
from dit_mlflow.plots import (
    plot_against_truth,
    plot_heat_map,
    plot_patterns,
    plot_recall_curves,
    plot_top_samples,
    plot_window_correlations,
    plot_window_samples,
)
from dit_mlflow.progress import phase, progress_over
from dit_mlflow.tracking.store.artifacts import active_run_id, log_influence
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
from dit_mlflow.tracking.store.run_log import drawing, log_metrics, log_params, log_plot, log_series, peak_memory_mb
from dit_mlflow.tracking.ui.links import run_link
from dit_mlflow.tracking.ui.next_steps import next_steps, rest_of_scores
from dit_mlflow.tracking.ui.notes import influence_links, set_note

MANY_WINDOWS = 1000
"""Windows that the names of runs leave room for, where it is not known how many there will be."""

FOLDERS: dict[Part, str] = {
    "influence": INFLUENCE,
    "whole_run": WHOLE_RUN,
    "truth": GROUND_TRUTH,
    "confirmed": CONFIRMED,
    "named": WHOLE_RUN_EXACT,
}
"""The artifact folder of each part of an explanation."""


def log_part(part: Part, found: Influence) -> None:
    """Log scores on the active run, in their own folder."""
    log_influence(found, folder=FOLDERS[part])


def log_explanation(explanation: Explanation, training_run_id: str, all_figures: bool = False) -> None:
    """Log an explanation on the active run: scores, figures, tables, plots, its page, and a child run per window.

    Args:
        explanation: from :func:`dit_mlflow.explain`.
        training_run_id: the run that recorded the trajectory.
        all_figures: every figure, not only those that docs/figures.md calls default.

    Raises:
        InputError: no run is active.
    """
    active_run_id()
    found = explanation.influence
    mlflow.set_tags({KIND: INFLUENCE, METHOD: found.method, TRAINING_RUN: training_run_id})
    log_params({"method": found.method, "resolved.kind": found.kind, "resolved.windows": len(found.windows)})
    for part, scores in explanation.parts.items():
        log_part(part, scores)
    log_answer(explanation, training_run_id, all_figures)


def log_answer(explanation: Explanation, training_run_id: str, all_figures: bool = False) -> None:
    """Like :func:`log_explanation`, for scores that :func:`log_part` has logged already.

    Nothing is drawn before all that was computed is logged. The run gets the figures of the whole run ``[0, T)`` and
    ``by_window/…`` series, each child those of its window.
    """
    run = mlflow.active_run()
    assert run is not None
    phase("logging")
    training = MlflowClient().get_run(training_run_id)
    _log_figures(explanation, training, all_figures)
    samples = _log_tables(explanation)
    # The UI lists the newest run first, so the last window is logged first.
    positions = progress_over(range(len(explanation.windows))[::-1], "logging windows", "window")
    runs = [_log_window(explanation, k, samples, training_run_id, all_figures=all_figures) for k in positions][::-1]
    phase("drawing")
    _draw(explanation, run.info.run_id, training)
    for index, child in enumerate(progress_over(runs, "drawing windows", "window")):
        _draw_window(explanation, index, child.info.run_id, run)
    # Last, since it links to what there is.
    with drawing("note", run.info.run_id):
        set_note(run.info.run_id, influence_note(explanation, influence_links(run, training_run_id, runs)))


def log_growing(explanation: Explanation, new: range, training_run_id: str) -> None:
    """Log an explanation that will grow by windows on the active run; ``new``: those that it has gained.

    Scores, tables, plots and page are replaced; the new windows get their child runs.
    """
    run = mlflow.active_run()
    assert run is not None
    log_part("influence", explanation.influence)
    samples = _log_tables(explanation)
    _draw(explanation, run.info.run_id, MlflowClient().get_run(training_run_id))
    for index in new:
        child = _log_window(explanation, index, samples, training_run_id, MANY_WINDOWS)
        _draw_window(explanation, index, child.info.run_id, run)


def log_window_series(explanation: Explanation, all_figures: bool = False) -> None:
    """The figures of the windows as series on the active run, step = window index.

    With the windows' ends, over which the saved charts are drawn. Interval bounds and levels of chance are left to the
    windows' own runs: they would clutter the charts.
    """
    log_series(WINDOW_END.by_window, [window.end for window in explanation.windows])
    names = dict.fromkeys(name for metrics in explanation.per_window for name in metrics.values)
    for name in names:
        if not name.endswith(BESIDE) and (all_figures or by_default(BY_WINDOW + name)):
            log_series(BY_WINDOW + name, [metrics.values.get(name) for metrics in explanation.per_window])


def window_run_name(window: Window, index: int, count: int) -> str:
    """``w03 240-320``; the names of ``count`` windows sort in the order of the windows."""
    return f"w{index:0{max(2, len(str(count - 1)))}d} {window}"


def _log_figures(explanation: Explanation, training: Run, all_figures: bool) -> None:
    seconds = training.data.metrics.get(TRAINING_SECONDS.name)
    known = {TRAINING_SECONDS.name: seconds, PEAK_MEMORY.name: peak_memory_mb()}
    costs = Metrics({name: value for name, value in known.items() if value is not None})
    figures = (explanation.whole, explanation.cost.and_(costs), explanation.pattern_figures)
    for found in figures:
        log_metrics(found.shown(all_figures))
    log_window_series(explanation, all_figures)


def _log_tables(explanation: Explanation) -> pd.DataFrame:
    """Returns the table of the top samples of all windows."""
    found, gallery = explanation.influence, explanation.gallery
    truth = explanation.truth.leave_one_out
    exact = explanation.confirmed if truth is None else truth.select(list(found.windows))
    samples = top_samples_table(found, exact, gallery)
    tables = {"windows": windows_table(found, explanation.per_window), "top_samples": samples}
    if explanation.whole_run is not None:
        tables["whole_run"] = whole_run_table(explanation.whole_run, explanation.exact, gallery)
    if len(found.windows) > 1:
        tables["window_correlations"] = window_correlations_table(found)
    if explanation.groups is not None:
        tables["groups"] = explanation.groups
    for name, table in tables.items():
        mlflow.log_table(table, f"{INFLUENCE}/{name}.json")
    return samples


def _draw(explanation: Explanation, run_id: str, training: Run) -> None:
    """Log the plots and the page of the influence run."""
    for name, plot in _plots(explanation).items():
        path = f"{INFLUENCE}/{name}.png"
        with drawing(path, run_id):
            log_plot(plot(), path, run_id)
    path = f"{INFLUENCE}/report.html"
    with drawing(path, run_id):
        page = explanation_page(explanation, next_steps(training, run_id), rest_of_scores(run_id))
        MlflowClient().log_text(run_id, page, path)


def _plots(explanation: Explanation) -> dict[str, Callable[[], Figure]]:
    found, gallery = explanation.influence, explanation.gallery
    truth, classes = explanation.truth.leave_one_out, explanation.patterns
    plots: dict[str, Callable[[], Figure]] = {}
    if classes is not None:
        plots["window_correlations"] = partial(plot_window_correlations, found)
        plots["patterns"] = partial(plot_patterns, found, classes)
    corrupted = sorted(gallery.corrupted)
    if corrupted and explanation.whole_run is not None:
        known = [part for part in (explanation.whole_run, truth) if part is not None]
        curves = {f"{part.method}, whole run": part.of(-1) for part in known}
        plots["recall_curve"] = partial(plot_recall_curves, curves, corrupted)
    plots["influence_over_windows"] = partial(plot_top_samples, explanation.best, gallery, whole=explanation.ranking)
    plots["heat_map"] = partial(plot_heat_map, explanation.best, gallery, whole=explanation.ranking)
    if truth is not None:
        everywhere = range(len(explanation.scores.windows))
        plots["against_leave_one_out"] = partial(plot_against_truth, explanation.scores, truth, everywhere, corrupted)
    return plots


def _log_window(
    explanation: Explanation,
    index: int,
    samples: pd.DataFrame,
    training_run_id: str,
    count: int = 0,
    all_figures: bool = False,
) -> Run:
    """Log a window's run. ``samples``: the top samples of all windows; ``count``: of windows, if more will come."""
    found, window = explanation.influence, explanation.windows[index]
    tags = {KIND: "window", METHOD: found.method, TRAINING_RUN: training_run_id}
    name = window_run_name(window, index, max(count, len(explanation.windows)))
    with mlflow.start_run(run_name=name, nested=True, tags=tags) as run:
        bounds = {"window_index": index, "window_start": window.start, "window_end": window.end}
        log_params({"method": found.method, "kind": found.kind, **bounds})
        log_metrics(explanation.per_window[index].shown(all_figures))
        # Last, since the page that compares runs begins with the metric that was logged first.
        mlflow.log_metrics({WINDOW_START.name: window.start, WINDOW_END.name: window.end})
        mlflow.log_table(samples[samples["window_index"] == index], "top_samples.json")
    return run


def _draw_window(explanation: Explanation, index: int, run_id: str, parent: ActiveRun) -> None:
    """Log the plots and the note of a window's run."""
    found, gallery = explanation.influence, explanation.gallery
    exact = explanation.truth.leave_one_out or explanation.confirmed
    with drawing("top_samples.png", run_id):
        known = None if exact is None else exact.of(explanation.windows[index])
        log_plot(plot_window_samples(found, index, gallery, known), "top_samples.png", run_id)
    if exact is not None and explanation.checked:
        with drawing("against_leave_one_out.png", run_id):
            figure = plot_against_truth(found, exact, [index], sorted(gallery.corrupted))
            log_plot(figure, "against_leave_one_out.png", run_id)
    with drawing("note", run_id):
        link = (parent.info.run_name or "the influence run", run_link(parent))
        set_note(run_id, window_note(explanation, index, link))
