"""The comparison job: several methods on the same trajectories against the same ground truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient

from dit_mlflow import methods as known
from dit_mlflow.errors import InputError
from dit_mlflow.evaluation.figures import CPU_SECONDS, HIGH, INFLUENCE_SECONDS, LOW, SPEARMAN, TRAINING_SECONDS
from dit_mlflow.explanation import (
    Checks,
    Truth,
    compare_line,
    comparison_note,
    comparison_sentences,
    explain,
    find_truth,
    noise_floor,
    paragraph,
    terminal_table,
)
from dit_mlflow.explanation.asked_query import parse_query
from dit_mlflow.explanation.over_seeds import COMPARED, SECONDS, stability_table, summarised
from dit_mlflow.influence import Query, Window, check_kind, parse_windows
from dit_mlflow.influence.query import resolve_queries
from dit_mlflow.influence.rehearsal import rehearse
from dit_mlflow.methods import Method, method
from dit_mlflow.methods.given_scores import GivenScores
from dit_mlflow.plots import plot_fidelity_against_cost, plot_recall_curves
from dit_mlflow.progress import phase, progress_over
from dit_mlflow.recording.loop import check_seeds
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining import Effort
from dit_mlflow.told import logger_of
from dit_mlflow.tracking.jobs.request import DEFAULT_WORKLOAD, Request, trained
from dit_mlflow.tracking.jobs.train import run_title, run_training, workload_params
from dit_mlflow.tracking.store.artifacts import load_influence, load_trajectory, log_influence
from dit_mlflow.tracking.store.datasets import log_datasets_of
from dit_mlflow.tracking.store.explanations import log_window_series
from dit_mlflow.tracking.store.failed_run import error_text, storable
from dit_mlflow.tracking.store.names import ERROR, KIND, METHOD, TRAINING_RUN
from dit_mlflow.tracking.store.run_log import drawing, log_metrics, log_params, log_plot, project_run
from dit_mlflow.tracking.ui.links import save_comparisons, where_to_look
from dit_mlflow.tracking.ui.notes import set_note
from dit_mlflow.workload import Workload, load_workload

COMPARISON = "comparison"

COSTS = {SECONDS: INFLUENCE_SECONDS, CPU_SECONDS.leaf: CPU_SECONDS}
"""Columns of the table, with the figure in each."""

_log = logger_of(__name__)


@dataclass(frozen=True)
class ComparisonRequest(Request):
    """As :class:`Request`, and:

    Attributes:
        methods: names separated by commas, or ``all``.
        scores: CSV files of scores computed elsewhere, separated by commas, to compare as well: see
            :class:`dit_mlflow.methods.given_scores.GivenScores`; empty = none.
        seeds: number of trainings, on a grid of seeds for weights and seeds for batch order.
        subsets: trainings on random parts of the data, for the linear datamodeling score; 0 = none.
        removed: the share of the samples that each of them leaves out.
        jobs: worker processes of the ground truth.
        backend: of joblib, see :class:`dit_mlflow.Effort`; empty = its choice.
    """

    methods: str = "all"
    scores: str = ""
    removed: float = 0.5
    seeds: int = 1
    subsets: int = 32
    jobs: int = 1
    backend: str = ""

    def checks(self, workload: Workload) -> Checks:
        """Leave-one-out and subsets; raises :class:`InputError` for values that cannot be used."""
        parse_query(self.query, workload)
        for estimator in self.estimators.values():
            if isinstance(estimator, GivenScores):
                estimator.check(workload.num_samples)
        return Checks.parse(self.ground_truth, workload.num_samples, subsets=self.subsets, removed=self.removed)

    @cached_property
    def estimators(self) -> dict[str, Method]:
        """The methods asked for, by name; raises :class:`InputError` for one that is unknown or cannot be used."""
        asked = known.NAMES if self.methods.strip() == "all" else self.methods.split(",")
        found = {name.strip(): method(name.strip()) for name in asked if name.strip()}
        if not found and not self.scores:
            raise InputError(f"methods={self.methods!r}; expected 'all' or some of {', '.join(known.NAMES)}")
        for given in (GivenScores(Path(path.strip())) for path in self.scores.split(",") if path.strip()):
            if given.name in found or given.name in known.NAMES:
                raise InputError(
                    f"scores={str(given.path)!r} has the name of a method or of other scores; rename the file"
                )
            found[given.name] = given
        return found

    @property
    def grid(self) -> list[tuple[int, int]]:
        """``(init_seed, order_seed)`` of each training, on a grid as near to a square as possible."""
        rows = max(d for d in range(1, math.isqrt(self.seeds) + 1) if self.seeds % d == 0)
        columns = self.seeds // rows
        return [(self.init_seed + a, self.order_seed + b) for a in range(rows) for b in range(columns)]


@dataclass(frozen=True, eq=False)
class ComparedTraining:
    """One training, the windows asked for, and the truth."""

    run_id: str
    label: str
    trajectory: Trajectory
    workload: Workload
    windows: list[Window]
    truth: Truth = field(default_factory=Truth)
    queries: list[Query] | None = None

    @property
    def whole(self) -> Window:
        return Window(0, self.trajectory.num_steps)


def compare_job(request: ComparisonRequest, project_run_id: str | None = None) -> str:
    """Compare methods; returns text for the terminal.

    A parent run holds the table ``comparison.json`` and the figure ``fidelity_against_cost.png``; with several seeds
    also ``stability.json``, with damaged samples ``recall_curve.png`` of the first training. Each method and training
    has a child run, all with the same metrics. A method that fails is FAILED there, with the reason in the tag
    ``dit.error`` and in the table; the others go on.

    Raises:
        InputError: some part of the request cannot be used, or every method failed.
    """
    kind, estimators = check_kind(request.kind), request.estimators
    if request.seeds < 1:
        raise InputError(f"seeds={request.seeds}; expected 1 or more")
    effort = Effort(request.jobs, request.backend or None)
    trainings = []
    for one in _trained(request):
        checks = request.checks(one.workload)
        queries = parse_query(request.query, one.workload)(one.trajectory)
        phase("ground truth")
        truth = find_truth(one.trajectory, one.workload, one.windows, kind, checks, queries, effort)
        trainings.append(replace(one, truth=truth, queries=queries))
    workload = trainings[0].workload
    query = resolve_queries(trainings[0].queries, workload)[0].name
    counted = f"{len(estimators)} methods {kind}" if len(estimators) > 1 else f"{next(iter(estimators))} {kind}"
    tags = {KIND: COMPARISON, TRAINING_RUN: ",".join(training.run_id for training in trainings)}
    with project_run(project_run_id, run_title("compare", workload, counted), tags) as run:
        log_params(
            {
                **workload_params(workload),
                "resolved.kind": kind,
                "resolved.windows": len(trainings[0].windows),
                "resolved.query": query,
                "resolved.methods": ",".join(estimators),
                "resolved.seeds": request.seeds,
            }
        )
        log_datasets_of(trainings[0].run_id, run.info.run_id)
        asked = [(training, name) for training in trainings for name in estimators]
        phase("comparing")
        rows = [_child(request, name, training) for training, name in progress_over(asked, "comparing", "method")]
        ceiling = _attainable(rows, trainings[0])
        table = summarised(pd.DataFrame(rows))
        seconds = _training_seconds(trainings)
        mlflow.log_table(table, "comparison.json")
        mlflow.log_table(pd.DataFrame(rows), "by_seed.json")
        if request.seeds > 1:
            done = [str(row["run_id"]) for row in rows if not row["failed"]]
            whole = {run_id: load_influence(run_id).of(trainings[0].whole) for run_id in done}
            mlflow.log_table(stability_table(pd.DataFrame(rows), whole, request.grid), "stability.json")
        if ceiling is not None:
            mlflow.log_metric(SPEARMAN.attainable, ceiling)
        if SPEARMAN.leaf in table and table[SPEARMAN.leaf].notna().any():
            path = "fidelity_against_cost.png"
            with drawing(path, run.info.run_id):
                log_plot(plot_fidelity_against_cost(table, ceiling, seconds), path, run.info.run_id)
        if workload.corrupted:
            first = [row for row in rows if row["training_run"] == trainings[0].run_id and not row["failed"]]
            scores = {str(row["method"]): load_influence(str(row["run_id"])).of(trainings[0].whole) for row in first}
            with drawing("recall_curve.png", run.info.run_id):
                log_plot(plot_recall_curves(scores, workload.corrupted), "recall_curve.png", run.info.run_id)
        retraining = [name for name, estimator in estimators.items() if estimator.retrains]
        with drawing("note", run.info.run_id):
            note = comparison_note(table, retraining, len(trainings), kind, query.replace("_", " "), ceiling)
            views = save_comparisons(run.info.run_id)
            set_note(run.info.run_id, f"{note}\n\n{compare_line(views)}" if views else note)
        if table["failed"].all():
            raise InputError(f"every method failed; the first: {rows[0]['error']}")
    headings = {
        "method": "method",
        SPEARMAN.leaf: SPEARMAN.heading,
        SPEARMAN.leaf + LOW: "low",
        SPEARMAN.leaf + HIGH: "high",
        **{column: figure.heading for column, figure in COMPARED.items()},
        "error": "failed",
    }
    shown = table.drop(columns=[] if table["error"].any() else ["error"])
    lines = [
        "",
        f"{len(estimators)} method{'s' * (len(estimators) > 1)}, "
        f"{len(trainings)} training{'s' * (len(trainings) > 1)}, whole run; low, high: 95 % interval "
        f"{'over samples' if len(trainings) == 1 else 'of the mean over trainings'}",
        *([f"attainable: leave-one-out in the recorded precision reaches {ceiling:.3f}"] if ceiling else []),
        "",
        terminal_table(shown, headings),
        "",
        *(paragraph(text) for text in comparison_sentences(table, retraining, ceiling)),
        "",
        f"training run   {', '.join(training.run_id for training in trainings)}",
        f"comparison run {run.info.run_id}",
        where_to_look(run),
    ]
    return "\n".join(lines)


def _trained(request: ComparisonRequest) -> list[ComparedTraining]:
    """The trajectories to compare on: the one that the request names, or a new one for each pair of seeds."""
    if request.training_run:
        if request.seeds > 1:
            raise InputError(
                f"seeds={request.seeds} are trainings, and training_run={request.training_run} is one; leave one out"
            )
        run_id, trajectory, workload, windows, _ = trained(request, request.checks)
        return [ComparedTraining(run_id, "", trajectory, workload, windows)]
    workload = load_workload(request.workload or DEFAULT_WORKLOAD, **request.settings)
    windows = parse_windows(request.windows, workload.plan)
    request.checks(workload)
    for init, order in request.grid:
        check_seeds(init, order)
    rehearse(workload)
    found = []
    for init, order in request.grid:
        run_id = run_training(workload, init, order)
        label = f" init {init} order {order}" if request.seeds > 1 else ""
        found.append(ComparedTraining(run_id, label, load_trajectory(run_id), workload, windows))
    return found


def _child(request: ComparisonRequest, name: str, training: ComparedTraining) -> dict[str, object]:
    """Run one method on one training in a run of its own; returns its row of the table."""
    row: dict[str, object] = {
        "method": name,
        "training_run": training.run_id,
        "measures": request.estimators[name].measures,
        "question": request.estimators[name].question,
    }
    tags = {KIND: "method", METHOD: name, TRAINING_RUN: training.run_id}
    try:
        with mlflow.start_run(run_name=name + training.label, nested=True, tags=tags) as run:
            try:
                return {**row, "run_id": run.info.run_id, **_log_explained(request, name, training), "failed": False}
            except Exception as error:
                mlflow.set_tag(ERROR, error_text(error))
                raise
    except Exception as error:
        _log.warning("%s failed: %s", name, storable(str(error)))
        return {**row, "failed": True, "error": error_text(error)}


def _log_explained(request: ComparisonRequest, name: str, training: ComparedTraining) -> dict[str, float]:
    """Explain by one method and log it on the active run; returns figures of the whole run by their short names."""
    asked = training.trajectory, training.workload, training.windows, check_kind(request.kind)
    found = explain(*asked, training.queries, method=request.estimators[name], checks=Checks(), truth=training.truth)
    log_params({"method": name, "kind": found.influence.kind})
    log_influence(found.scores)
    log_metrics(found.whole.and_(found.cost).shown(request.all_figures))
    if len(found.scores.windows) > 1:
        log_window_series(found, request.all_figures)
    short = {name.partition("/")[2]: value for name, value in found.whole.values.items()}
    return {**short, **{column: found.cost.values[figure.name] for column, figure in COSTS.items()}}


def _attainable(rows: Sequence[dict[str, object]], training: ComparedTraining) -> float | None:
    """Spearman correlation of leave-one-out in the recorded precision with the truth, which is in float64."""
    known = [row[SPEARMAN.leaf] for row in rows if row["method"] == "leave_one_out" and SPEARMAN.leaf in row]
    if known:
        return float(np.mean(known))  # type: ignore[arg-type]
    return noise_floor(training.truth, training.trajectory, training.workload, training.queries)


def _training_seconds(trainings: Sequence[ComparedTraining]) -> float | None:
    runs = [MlflowClient().get_run(training.run_id) for training in trainings]
    known = [seconds for run in runs if (seconds := run.data.metrics.get(TRAINING_SECONDS.name)) is not None]
    return float(np.mean(known)) if known else None
