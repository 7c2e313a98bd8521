"""From a recorded training to the whole answer, without MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np

from dit_mlflow.evaluation import (
    Metrics,
    attainable,
    correlations,
    correlations_with_intervals,
    datamodeling_score,
    detection,
    trust,
)
from dit_mlflow.explanation.explanation import Explanation, Part
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.ranking import extreme_samples
from dit_mlflow.explanation.truth import NAMED, Checks, Truth, find_truth, joined
from dit_mlflow.influence import Influence, Kind, Query, Window, check_kind, parse_windows
from dit_mlflow.methods import Method
from dit_mlflow.methods import method as method_of
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining import Effort, confirm, leave_one_out
from dit_mlflow.workload import Workload

DEFAULT_CHECKS = Checks(trust=24)


def explain(
    trajectory: Trajectory,
    workload: Workload,
    windows: str | Sequence[Window] = "epochs",
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    method: str | Method = "dit",
    checks: Checks = DEFAULT_CHECKS,
    truth: Truth | None = None,
    effort: Effort | None = None,
    whole_run: bool = True,
    reached: Callable[[Part, Influence], object] = lambda part, found: None,
) -> Explanation:
    """Which training samples mattered, in which windows, and how far that can be trusted.

    Args:
        trajectory, workload, kind, queries: as for :func:`dit_mlflow.track`.
        windows: themselves, or as for :func:`dit_mlflow.parse_windows`.
        method: that estimates; its name, or itself with settings of its own.
        checks: exact retrainings to hold the estimate against.
        truth: exact retrainings that are known already, of ``windows`` and the whole run, from :func:`find_truth`:
            the estimate is held against them and nothing is retrained.
        effort: of the retrainings, see :func:`dit_mlflow.leave_one_out`.
        whole_run: estimate the whole run ``[0, T)`` too, whose scores rank the samples; the checks need it.
        reached: called with each part as soon as it is known, estimates first, since retrainings take longest: what
            it keeps is not lost if the rest is broken off.

    Returns:
        Scores, what is exact, figures, and the answer in words. Figures, samples and words are of the first query.

    Raises:
        DitError: see :func:`dit_mlflow.track` and :func:`dit_mlflow.leave_one_out`.

    Cost: the method's, and a training for each sample or subset that ``checks`` has retrained.
    """
    estimator = method_of(method) if isinstance(method, str) else method
    kind = check_kind(kind)
    asked = parse_windows(windows, trajectory) if isinstance(windows, str) else list(windows)
    whole = Window(0, trajectory.num_steps)
    begun, cpu = time.perf_counter(), time.process_time()
    every = list(dict.fromkeys([*asked, whole])) if whole_run else asked
    found = estimator(trajectory, workload, every, kind, queries)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
    # A method without window scores answers for the whole run alone.
    asked = [window for window in asked if window in found.windows] or [whole]
    over_all = found.select([whole]) if whole in found.windows else None
    explanation = Explanation(found.select(asked), Metrics(), (), Gallery(workload), over_all, title=workload.title)
    for part, scores in explanation.parts.items():
        reached(part, scores)
    known = truth
    if known is None:
        known = find_truth(trajectory, workload, asked, kind, checks, queries, effort)
        if known.leave_one_out is not None:
            reached("truth", known.leave_one_out.select(asked))
    exact = known.leave_one_out
    measured = {window: _figures(found, known, window, workload) for window in found.windows}
    # Of one query, which is the one that is spoken of.
    first = _first_query(found)
    retraining: _Retraining = {"queries": None if queries is None else list(queries)[:1], "effort": effort}
    if truth is None and exact is not None:
        floor = attainable(_first_query(exact).select(list(found.windows)), trajectory, workload, **retraining)
        measured = _joined(measured, floor, "ground_truth/")
    if checks.trust:
        judged = None if exact is None else _first_query(exact)
        measured = _joined(measured, trust(first, trajectory, workload, checks.trust, judged, **retraining), "trust/")
    confirmed = None
    if checks.confirm and exact is None:
        confirmed = confirm(first.select(asked), trajectory, workload, checks.confirm, **retraining)
        reached("confirmed", confirmed)
    named = None if exact is None else exact.select([whole])
    if checks.trust:
        # A few large estimates are what people look at first, and those that are furthest off.
        samples = [sample for side in extreme_samples(first.select([whole]), NAMED) for sample in side]
        unknown = [sample for sample in samples if named is None or np.isnan(named.of(whole)[sample])]
        if unknown:
            named = joined(named, leave_one_out(trajectory, workload, [whole], kind, samples=unknown, **retraining))
    if named is not None and truth is None:
        reached("named", named)
    cost = {
        "cost/influence_seconds": seconds,
        "cost/cpu_seconds": cpu_seconds,
        "cost/ground_truth_seconds": exact.metadata["seconds"] if exact is not None and truth is None else None,
        "replay/max_drift": found.metadata.get("max_drift"),
    }
    return replace(
        explanation,
        whole=measured.get(whole, Metrics()),
        per_window=tuple(measured[window] for window in asked),
        truth=known,
        confirmed=confirmed,
        named=named,
        cost=Metrics({name: value for name, value in cost.items() if value is not None}),
    )


class _Retraining(TypedDict):
    queries: Sequence[Query] | None
    effort: Effort | None


def _first_query(found: Influence) -> Influence:
    return replace(found, scores=found.scores[:, :1], queries=found.queries[:1])


def _joined(measured: Mapping[Window, Metrics], more: Sequence[Metrics], prefix: str) -> dict[Window, Metrics]:
    return {
        window: figures.and_(further.prefixed(prefix))
        for (window, figures), further in zip(measured.items(), more, strict=True)
    }


def _figures(found: Influence, truth: Truth, window: Window, workload: Workload) -> Metrics:
    """Detection, and agreement with what is exact: of subsets, which are of the whole run, for that alone."""
    scores = found.of(window)
    figures = detection(scores, workload.corrupted).prefixed("detection/")
    if truth.subsets is not None and window in truth.subsets.windows:
        figures = datamodeling_score(scores, truth.subsets, window).prefixed("ground_truth/").and_(figures)
    if truth.leave_one_out is None:
        return figures
    exact = truth.leave_one_out.of(window)
    agreement = correlations(scores, exact).and_(correlations_with_intervals(scores, exact, ("spearman", "pearson")))
    return agreement.prefixed("ground_truth/").and_(figures)
