"""The comparison job: several methods, and seeds, on the same trajectories, against the same ground truth."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation import (
    Metrics,
    Subsets,
    attainable,
    correlations,
    correlations_with_intervals,
    datamodeling_score,
    detection,
    train_on_subsets,
)
from dit_mlflow.influence import Influence, Window, check_kind, parse_windows
from dit_mlflow.influence.rehearsal import rehearse
from dit_mlflow.methods import NAMES, Effort, leave_one_out, method
from dit_mlflow.progress import progress_over
from dit_mlflow.report import (
    compare_line,
    comparison_note,
    comparison_sentences,
    paragraph,
    plot_fidelity_against_cost,
    plot_recall_curves,
    terminal_table,
)
from dit_mlflow.tracking.artifacts import load_influence, load_trajectory, log_influence
from dit_mlflow.tracking.checks import parse_ground_truth
from dit_mlflow.tracking.datasets import log_datasets_of
from dit_mlflow.tracking.figures import log_plot
from dit_mlflow.tracking.links import save_comparisons, where_to_look
from dit_mlflow.tracking.main_job import DEFAULT_WORKLOAD, Request, recorded_workload
from dit_mlflow.tracking.names import ERROR, GROUND_TRUTH, KIND, METHOD, TRAINING_RUN
from dit_mlflow.tracking.notes import set_note
from dit_mlflow.tracking.over_seeds import stability_table, summarised
from dit_mlflow.tracking.reason import reason_of, storable
from dit_mlflow.tracking.runs import log_metrics, log_series, project_run
from dit_mlflow.tracking.training import run_training, workload_params, workload_title
from dit_mlflow.trajectory import Trajectory, Workload, load_workload
from dit_mlflow.trajectory.loop import check_seeds

COMPARISON = "comparison"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparisonRequest(Request):
    """As :class:`Request`, and:

    Attributes:
        methods: names with commas between, or ``all``.
        seeds: trainings; their weights and batch orders are drawn with separate seeds, on a grid.
        subsets: trainings on random halves of the data, for the linear datamodeling score; 0 = none.
        jobs: worker processes of the ground truth.
        backend: of joblib, see :class:`dit_mlflow.Effort`; empty = its choice.
    """

    methods: str = "all"
    seeds: int = 1
    subsets: int = 32
    jobs: int = 1
    backend: str = ""

    @property
    def names(self) -> list[str]:
        """The methods asked for; raises :class:`InputError` for one that is not there."""
        if self.methods.strip() == "all":
            return list(NAMES)
        names = list(dict.fromkeys(name.strip() for name in self.methods.split(",") if name.strip()))
        if not names:
            raise InputError(f"methods={self.methods!r}; expected 'all' or some of {', '.join(NAMES)}")
        for name in names:
            method(name)
        return names

    @property
    def grid(self) -> list[tuple[int, int]]:
        """``(init_seed, order_seed)`` of each training: the squarest grid of that many."""
        rows = max(d for d in range(1, math.isqrt(self.seeds) + 1) if self.seeds % d == 0)
        columns = self.seeds // rows
        return [(self.init_seed + a, self.order_seed + b) for a in range(rows) for b in range(columns)]


@dataclass(frozen=True, eq=False)
class Subject:
    """One training, what is asked of it, and the truth."""

    run_id: str
    label: str
    trajectory: Trajectory
    workload: Workload
    windows: list[Window]
    truth: Influence | None
    subsets: Subsets | None

    @property
    def whole(self) -> Window:
        return Window(0, self.trajectory.num_steps)


def compare_job(request: ComparisonRequest, project_run_id: str | None = None) -> str:
    """Compare methods; returns what the terminal shows at the end.

    A parent run holds the table ``comparison.json`` and the figure ``fidelity_against_cost.png``; with several seeds
    also ``stability.json``, with damaged samples ``recall_curve.png`` of the first training. Below it stands a run for
    each method and training, with the same metrics each. A method that fails is FAILED there, with the reason in the
    tag ``dit.error`` and in the table, and stops nothing else.

    Raises:
        InputError: some part of the request cannot be used, or every method failed.
    """
    kind, names = check_kind(request.kind), request.names
    if request.subsets < 0 or request.subsets in (1, 2):
        raise InputError(f"subsets={request.subsets}; expected 0, or 3 or more")
    if request.seeds < 1:
        raise InputError(f"seeds={request.seeds}; expected 1 or more")
    effort = Effort(request.jobs, request.backend or None)
    subjects = [_with_truth(request, subject, effort) for subject in _trained(request)]
    workload = subjects[0].workload
    tags = {KIND: COMPARISON, TRAINING_RUN: ",".join(subject.run_id for subject in subjects)}
    with project_run(project_run_id, f"compare {workload_title(workload)} {kind}", tags) as run:
        mlflow.log_params(
            {
                **workload_params(workload),
                "resolved.kind": kind,
                "resolved.windows": len(subjects[0].windows),
                "resolved.methods": ",".join(names),
                "resolved.seeds": request.seeds,
            }
        )
        log_datasets_of(subjects[0].run_id, run.info.run_id)
        asked = [(subject, name) for subject in subjects for name in names]
        rows = [_child(request, name, subject) for subject, name in progress_over(asked, "comparing", "method")]
        ceiling = _attainable(rows, subjects[0])
        table = summarised(pd.DataFrame(rows))
        training = _training_seconds(subjects)
        mlflow.log_table(table, "comparison.json")
        mlflow.log_table(pd.DataFrame(rows), "by_seed.json")
        if "spearman" in table and table["spearman"].notna().any():
            log_plot(plot_fidelity_against_cost(table, ceiling, training), "fidelity_against_cost.png")
        if request.seeds > 1:
            done = [str(row["run_id"]) for row in rows if not row["failed"]]
            whole = {run_id: load_influence(run_id).of(subjects[0].whole) for run_id in done}
            mlflow.log_table(stability_table(pd.DataFrame(rows), whole, request.grid), "stability.json")
        if workload.corrupted:
            first = [row for row in rows if row["training_run"] == subjects[0].run_id and not row["failed"]]
            scores = {str(row["method"]): load_influence(str(row["run_id"])).of(subjects[0].whole) for row in first}
            log_plot(plot_recall_curves(scores, workload.corrupted), "recall_curve.png")
        if ceiling is not None:
            mlflow.log_metric("ground_truth/attainable_spearman", ceiling)
        retraining = [name for name in names if method(name).retrains]
        note = comparison_note(table, retraining, len(subjects), kind, attainable=ceiling)
        views = save_comparisons(run.info.run_id)
        set_note(run.info.run_id, f"{note}\n\n{compare_line(views)}" if views else note)
        if table["failed"].all():
            raise InputError(f"every method failed; the first: {rows[0]['error']}")
    headings = {
        "method": "method",
        "spearman": "Spearman",
        "spearman_low": "low",
        "spearman_high": "high",
        "pearson": "Pearson",
        "lds": "LDS",
        "recall_at_k": "recall@k",
        "auroc": "AUROC",
        "seconds": "seconds",
        "error": "failed",
    }
    shown = table.drop(columns=[] if table["error"].any() else ["error"])
    lines = [
        "",
        f"{len(names)} method{'s' * (len(names) > 1)}, {len(subjects)} training{'s' * (len(subjects) > 1)}, whole run; "
        "low, high: 95 % interval "
        f"{'over samples' if len(subjects) == 1 else 'of the mean over trainings'}",
        *([f"attainable: leave-one-out in the recorded precision reaches {ceiling:.3f}"] if ceiling else []),
        "",
        terminal_table(shown, headings),
        "",
        *(paragraph(text) for text in comparison_sentences(table, retraining, ceiling)),
        "",
        f"training run   {', '.join(subject.run_id for subject in subjects)}",
        f"comparison run {run.info.run_id}",
        where_to_look(run),
    ]
    return "\n".join(lines)


def _trained(request: ComparisonRequest) -> list[Subject]:
    """The trajectories to compare on: the one that is there, or one for each pair of seeds."""
    if request.training_run:
        if request.seeds > 1:
            raise InputError(
                f"seeds={request.seeds} are trainings, and training_run={request.training_run} is one; leave one out"
            )
        trajectory = load_trajectory(request.training_run)
        workload = recorded_workload(request, trajectory)
        return [_subject(request, request.training_run, "", trajectory, workload)]
    workload = load_workload(request.workload or DEFAULT_WORKLOAD, **request.settings)
    parse_windows(request.windows, workload.plan)
    parse_ground_truth(request.ground_truth, workload.num_samples)
    for init, order in request.grid:
        check_seeds(init, order)
    rehearse(workload)
    found = []
    for init, order in request.grid:
        run_id = run_training(workload, init, order)
        label = f" init {init} order {order}" if request.seeds > 1 else ""
        found.append(_subject(request, run_id, label, load_trajectory(run_id), workload))
    return found


def _subject(request: Request, run_id: str, label: str, trajectory: Trajectory, workload: Workload) -> Subject:
    return Subject(run_id, label, trajectory, workload, parse_windows(request.windows, trajectory), None, None)


def _with_truth(request: ComparisonRequest, subject: Subject, effort: Effort) -> Subject:
    removed = parse_ground_truth(request.ground_truth, subject.workload.num_samples)
    if request.subsets:
        subsets = train_on_subsets(
            subject.trajectory, subject.workload, [subject.whole], subsets=request.subsets, effort=effort
        )
        subject = replace(subject, subsets=subsets)
    if removed == 0:
        return subject
    windows = list(dict.fromkeys([*subject.windows, subject.whole]))
    kind = check_kind(request.kind)
    truth = leave_one_out(subject.trajectory, subject.workload, windows, kind, samples=removed, effort=effort)
    return replace(subject, truth=truth)


def _child(request: Request, name: str, subject: Subject) -> dict[str, object]:
    """Run one method on one training, in a run of its own; its row of the table."""
    row: dict[str, object] = {"method": name, "training_run": subject.run_id, "measures": method(name).measures}
    tags = {KIND: "method", METHOD: name, TRAINING_RUN: subject.run_id}
    try:
        with mlflow.start_run(run_name=name + subject.label, nested=True, tags=tags) as run:
            try:
                return {**row, "run_id": run.info.run_id, **_measured(request, name, subject), "failed": False}
            except Exception as error:
                mlflow.set_tag(ERROR, reason_of(error))
                raise
    except Exception as error:
        _log.warning("%s failed: %s", name, storable(str(error)))
        return {**row, "failed": True, "error": reason_of(error)}


def _measured(request: Request, name: str, subject: Subject) -> dict[str, float]:
    windows = list(dict.fromkeys([*subject.windows, subject.whole]))
    begun, cpu = time.perf_counter(), time.process_time()
    found = method(name)(subject.trajectory, subject.workload, windows, request.kind)
    costs = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
    mlflow.log_params({"method": name, "kind": found.kind})
    mlflow.log_metrics({"cost/influence_seconds": costs["seconds"], "cost/cpu_seconds": costs["cpu_seconds"]})
    log_influence(found)
    agreement, detected = _scored(found, subject, subject.whole)
    foretold = Metrics()
    if subject.subsets is not None:
        foretold = datamodeling_score(found.of(subject.whole), subject.subsets)
    log_metrics(foretold.prefixed(f"{GROUND_TRUTH}/"))
    log_metrics(agreement.prefixed(f"{GROUND_TRUTH}/"))
    log_metrics(detected.prefixed("detection/"))
    if len(found.windows) > 1:
        scored = [_scored(found, subject, window) for window in subject.windows]
        for prefix, part in ((f"{GROUND_TRUTH}/", 0), ("detection/", 1)):
            for figure in dict.fromkeys(figure for parts in scored for figure in parts[part].values):
                series = [parts[part].values.get(figure) for parts in scored]
                log_series(f"by_window/{prefix}{figure}", series)
    return {**agreement.values, **foretold.values, **detected.values, **costs}


def _scored(found: Influence, subject: Subject, window: Window) -> tuple[Metrics, Metrics]:
    """Agreement with the truth, with intervals for the whole run, and detection."""
    detected = detection(found.of(window), subject.workload.corrupted)
    if subject.truth is None:
        return Metrics(), detected
    estimate, truth = found.of(window), subject.truth.of(window)
    scored = correlations_with_intervals if window == subject.whole else correlations
    return scored(estimate, truth), detected


def _attainable(rows: Sequence[dict[str, object]], subject: Subject) -> float | None:
    """Spearman correlation of leave-one-out in the recorded precision with the truth, in float64."""
    if subject.truth is None:
        return None
    known = [row["spearman"] for row in rows if row["method"] == "leave_one_out" and "spearman" in row]
    if known:
        return float(np.mean(known))  # type: ignore[arg-type]
    (floor,) = attainable(subject.truth.select([subject.whole]), subject.trajectory, subject.workload)
    return floor.values.get("attainable_spearman")


def _training_seconds(subjects: Sequence[Subject]) -> float | None:
    runs = [MlflowClient().get_run(subject.run_id) for subject in subjects]
    known = [run.data.metrics["cost/training_seconds"] for run in runs if "cost/training_seconds" in run.data.metrics]
    return float(np.mean(known)) if known else None
