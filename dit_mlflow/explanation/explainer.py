"""From a recorded training to the whole answer, without MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation import (
    Metrics,
    attainable,
    correlations,
    correlations_with_intervals,
    datamodeling_score,
    detection,
    trust,
)
from dit_mlflow.evaluation.correlation import FEWEST
from dit_mlflow.evaluation.figures import (
    CPU_SECONDS,
    DETECTION,
    HIGH,
    INFLUENCE_SECONDS,
    LOW,
    MAX_DRIFT,
    PEARSON,
    PLANTED_AUROC,
    REMOVAL_LDS,
    REMOVAL_SLOPE,
    SPEARMAN,
    TRUST,
    TRUTH,
    TRUTH_SECONDS,
)
from dit_mlflow.explanation.explanation import Explanation, Part
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.ranking import extreme_samples
from dit_mlflow.explanation.truth import NAMED, Checks, Truth, find_truth, joined
from dit_mlflow.influence import Influence, Kind, Query, Window, check_kind, parse_windows
from dit_mlflow.methods import Method
from dit_mlflow.methods import method as method_of
from dit_mlflow.methods.removal import usual_method
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining import Effort, Groups, confirm, leave_groups_out, leave_one_out
from dit_mlflow.retraining.groups import check_groups
from dit_mlflow.workload import Workload

DEFAULT_CHECKS = Checks(trust=24)


def explain(
    trajectory: Trajectory,
    workload: Workload,
    windows: str | Sequence[Window] = "epochs",
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    method: str | Method | None = None,
    checks: Checks = DEFAULT_CHECKS,
    truth: Truth | None = None,
    effort: Effort | None = None,
    whole_run: bool = True,
    groups: Groups | None = None,
    reached: Callable[[Part, Influence], object] = lambda part, found: None,
) -> Explanation:
    """Which training samples mattered, in which windows, and how far that can be trusted.

    Args:
        trajectory, workload, kind, queries: as for :func:`dit_mlflow.track`.
        windows: windows, or text for :func:`dit_mlflow.parse_windows`.
        method: the estimator: its name, or an instance with settings; ``None`` = as the main job's,
            :func:`dit_mlflow.removal_influence` of a tenth of the samples (of two at least; of fewer than three samples
            in all, ``dit``).
        checks: exact retrainings to compare the estimate with.
        truth: known exact retrainings of ``windows`` and the whole run, from :func:`find_truth`: the estimate is
            compared with them and nothing is retrained.
        effort: of the retrainings, see :func:`dit_mlflow.leave_one_out`.
        whole_run: also estimate the whole run ``[0, T)``, whose scores rank the samples; the checks need it.
        groups: indices of samples by a name, such as a class or a source: what leaving out each of them together does.
        reached: called with each part as soon as it is computed, estimates first, so that it can be stored before the
            retrainings, which take longest, are done.

    Returns:
        Scores, exact scores, figures, and the answer in words. Figures, samples and words are about the first query.

    Raises:
        DitError: see :func:`dit_mlflow.track` and :func:`dit_mlflow.leave_one_out`.

    Cost: the method's, and a training for each group, and each sample or subset that ``checks`` has retrained.
    """
    if groups is not None:
        check_groups(groups, workload.num_samples)
    estimator = method_of(method) if isinstance(method, str) else method or usual_method(workload.num_samples)
    kind = check_kind(kind)
    asked = parse_windows(windows, trajectory) if isinstance(windows, str) else list(windows)
    known = truth
    if known is None and estimator.retrains and checks.ground_truth is None:
        # It may as well learn from what is retrained anyway.
        known = find_truth(trajectory, workload, asked, kind, checks, queries, effort)
    if known is not None and known.leave_one_out is not None:
        estimator = estimator.informed_by(known.leave_one_out)
    explanation = _estimated(estimator, trajectory, workload, asked, kind, queries, whole_run)
    for part, scores in explanation.parts.items():
        reached(part, scores)
    # Only the first query: the answer is about it alone.
    further = _Retraining(trajectory, workload, kind, None if queries is None else queries[:1], effort)
    checked: tuple[Callable[[Explanation, Checks], Explanation], ...] = ()
    if truth is None:
        known = known or find_truth(trajectory, workload, explanation.windows, kind, checks, queries, effort)
        checked = further.noise_floor, further.trust, further.confirm, further.name
    assert known is not None
    explanation = _held_against(explanation, known)
    if truth is None and "truth" in explanation.parts:
        reached("truth", explanation.parts["truth"])
    for check in checked:
        before = explanation.parts
        explanation = check(explanation, checks)
        for part in explanation.parts.keys() - before.keys():
            reached(part, explanation.parts[part])
    return explanation if groups is None else replace(explanation, groups=further.without(groups, explanation))


def of_scores(found: Influence, workload: Workload) -> Explanation:
    """An explanation of scores that are known, of windows alone and without retraining."""
    bare = Explanation(found, Metrics(), (Metrics(),) * len(found.windows), Gallery(workload), title=workload.title)
    return _held_against(bare, Truth())


def _estimated(
    estimator: Method,
    trajectory: Trajectory,
    workload: Workload,
    asked: Sequence[Window],
    kind: Kind,
    queries: Sequence[Query] | None,
    whole_run: bool,
) -> Explanation:
    whole = Window(0, trajectory.num_steps)
    begun, cpu = time.perf_counter(), time.process_time()
    found = estimator(trajectory, workload, list(dict.fromkeys([*asked, whole])) if whole_run else asked, kind, queries)
    cost = {
        INFLUENCE_SECONDS.name: time.perf_counter() - begun,
        CPU_SECONDS.name: time.process_time() - cpu,
        MAX_DRIFT.name: found.metadata.get("max_drift"),
    }
    # A method without window scores has them for the whole run alone.
    windows = [window for window in asked if window in found.windows] or [whole]
    return Explanation(
        found.select(windows),
        Metrics(),
        (Metrics(),) * len(windows),
        Gallery(workload),
        found.select([whole]) if whole in found.windows else None,
        cost=Metrics({name: value for name, value in cost.items() if value is not None}),
        title=workload.title,
    )


def _held_against(explanation: Explanation, truth: Truth) -> Explanation:
    """Add figures: how well the estimate agrees with ``truth``, and how well it finds damaged samples."""
    exact = truth.leave_one_out
    missing = [] if exact is None else [window for window in explanation.scores.windows if window not in exact.windows]
    if missing:
        raise InputError(
            f"the truth has no scores of window {missing[0]}; expected leave-one-out of every window asked for and of "
            "the whole run, as find_truth makes it"
        )
    explanation = replace(explanation, truth=truth)
    found = [_figures(explanation, window) for window in explanation.scores.windows]
    return _with_figures(explanation, found)


def _figures(explanation: Explanation, window: Window) -> Metrics:
    """Figures of one window; the subsets are of the whole run, and so is the score that they give."""
    scores, truth = explanation.scores.of(window), explanation.truth
    figures = detection(scores, sorted(explanation.gallery.corrupted)).prefixed(DETECTION)
    figures = _of_removals(explanation.scores, window).and_(_of_plantings(explanation.scores)).and_(figures)
    if truth.subsets is not None and window in truth.subsets.windows:
        figures = datamodeling_score(scores, truth.subsets, window, fewest=FEWEST).prefixed(TRUTH).and_(figures)
    if truth.leave_one_out is None:
        return figures
    exact = truth.leave_one_out.of(window)
    agreement = correlations(scores, exact, FEWEST).and_(
        correlations_with_intervals(scores, exact, (SPEARMAN.leaf, PEARSON.leaf))
    )
    return agreement.prefixed(TRUTH).and_(figures)


def _of_removals(found: Influence, window: Window) -> Metrics:
    """How well the scores foretell removals, as the bank that chose them says of those that it left aside."""
    if found.removed is None:
        return Metrics()
    judged = found.metadata["bank"][str(window)][0]
    values: dict[str, float] = {}
    for figure, key in ((REMOVAL_LDS, "order"), (REMOVAL_SLOPE, "size")):
        if judged[key] is not None:
            low, high = judged[f"{key}_interval"]
            values |= {figure.name: judged[key], figure.name + LOW: low, figure.name + HIGH: high}
    if not values:
        return Metrics(undefined={REMOVAL_LDS.name: "the retrainings without a share of the samples all end the same"})
    return Metrics(values)


def _of_plantings(found: Influence) -> Metrics:
    """How well scores of the kind find wrong labels that were planted, where a method tried."""
    if "planted" not in found.metadata:
        return Metrics()
    told = found.metadata["planted"][0]
    low, high = told["interval"]
    return Metrics({PLANTED_AUROC.name: told["found"], PLANTED_AUROC.low: low, PLANTED_AUROC.high: high})


def _with_figures(explanation: Explanation, more: Sequence[Metrics], prefix: str = "") -> Explanation:
    """Add ``more``, figures of the windows of ``explanation.scores``, in that order."""
    found = dict(zip(explanation.scores.windows, more, strict=True))
    per_window = zip(explanation.windows, explanation.per_window, strict=True)
    whole = Metrics() if explanation.whole_run is None else found[explanation.whole_run.windows[0]].prefixed(prefix)
    return replace(
        explanation,
        per_window=tuple(figures.and_(found[window].prefixed(prefix)) for window, figures in per_window),
        whole=explanation.whole.and_(whole),
    )


@dataclass(frozen=True, eq=False)
class _Retraining:
    """Retrains to check an explanation; ``queries``: the first, ``None`` = the default one."""

    trajectory: Trajectory
    workload: Workload
    kind: Kind
    queries: Sequence[Query] | None
    effort: Effort | None

    def noise_floor(self, explanation: Explanation, checks: Checks) -> Explanation:
        """Add how well the truth agrees with itself in the recorded precision, and how long it took."""
        exact = explanation.truth.leave_one_out
        if exact is None:
            return explanation
        seconds = Metrics({TRUTH_SECONDS.name: exact.metadata["seconds"]})
        exact = _first_query(exact).select(list(explanation.scores.windows))
        found = attainable(exact, self.trajectory, self.workload, effort=self.effort, queries=self.queries)
        return _with_figures(replace(explanation, cost=explanation.cost.and_(seconds)), found, TRUTH)

    def trust(self, explanation: Explanation, checks: Checks) -> Explanation:
        """Add how far the estimate can be trusted, from a few random samples."""
        # What removals of many do is not held against that of one.
        if not checks.trust or explanation.influence.removed is not None:
            return explanation
        exact = explanation.truth.leave_one_out
        judged, scores = None if exact is None else _first_query(exact), _first_query(explanation.scores)
        arguments = (scores, self.trajectory, self.workload, checks.trust, judged)
        return _with_figures(
            explanation, trust(*arguments, kind=self.kind, effort=self.effort, queries=self.queries), TRUST
        )

    def confirm(self, explanation: Explanation, checks: Checks) -> Explanation:
        """Add exact scores of the samples that stand out in each window."""
        if not checks.confirm or explanation.truth.leave_one_out is not None:
            return explanation
        arguments = (_first_query(explanation.influence), self.trajectory, self.workload, checks.confirm)
        return replace(
            explanation, confirmed=confirm(*arguments, kind=self.kind, effort=self.effort, queries=self.queries)
        )

    def without(self, groups: Groups, explanation: Explanation) -> pd.DataFrame:
        """What leaving out each group does: the sum of its scores, and exactly."""
        scores = _first_query(explanation.scores)
        windows = list(scores.windows)
        exact = leave_groups_out(
            self.trajectory, self.workload, windows, groups, self.kind, self.queries, effort=self.effort
        )
        sums = {name: scores.of_group(indices)[:, 0] for name, indices in groups.items()}
        amounts = scores.measures == "query"
        return pd.DataFrame(
            {
                "group": exact["group"],
                "samples": exact["samples"],
                "window": exact["window_start"].astype(str) + "-" + exact["window_end"].astype(str),
                "predicted": [
                    sums[name][place] if amounts else np.nan for name in groups for place in range(len(windows))
                ],
                "exact": exact["change"],
            }
        )

    def name(self, explanation: Explanation, checks: Checks) -> Explanation:
        """Add exact whole-run scores of the samples of largest estimate, where the error is largest too."""
        estimate, exact = explanation.whole_run, explanation.truth.leave_one_out
        if estimate is None:
            return explanation
        whole = estimate.windows[0]
        named = None if exact is None else exact.select([whole])
        if checks.trust:
            samples = [sample for side in extreme_samples(estimate, NAMED) for sample in side]
            unknown = [sample for sample in samples if named is None or np.isnan(named.of(whole)[sample])]
            if unknown:
                arguments = (self.trajectory, self.workload, [whole], self.kind, self.queries, unknown)
                named = joined(named, leave_one_out(*arguments, effort=self.effort))
        return replace(explanation, named=named)


def _first_query(found: Influence) -> Influence:
    error, freedom = found.standard_error, found.degrees_of_freedom
    return replace(
        found,
        scores=found.scores[:, :1],
        queries=found.queries[:1],
        standard_error=None if error is None else error[:, :1],
        degrees_of_freedom=None if freedom is None else freedom[:, :1],
    )
