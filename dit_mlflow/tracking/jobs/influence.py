"""The main job: check everything, train if there is no trajectory yet, explain, log, summarise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlflow import ActiveRun, MlflowClient

from dit_mlflow.command import option
from dit_mlflow.evaluation import Metrics
from dit_mlflow.evaluation.figures import (
    FIDELITY,
    SMOOTHNESS,
    SPREAD_RATIO,
    TRAINING_SECONDS,
    TRUST_SAMPLES,
    TRUST_SPEARMAN,
    WINDOW_END,
    WINDOW_START,
)
from dit_mlflow.explanation import Checks, Explanation, explain, paragraph, terminal_table, windows_table
from dit_mlflow.explanation.asked_query import AskedQuery, parse_query
from dit_mlflow.explanation.tables import OF_WINDOWS
from dit_mlflow.influence import Influence, Kind, Query, Window, check_kind
from dit_mlflow.influence.query import resolve_queries
from dit_mlflow.methods.dit import Dit
from dit_mlflow.methods.removal import Removal
from dit_mlflow.progress import phase, say
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining import Groups
from dit_mlflow.tracking.jobs.request import Request, parse_groups, trained
from dit_mlflow.tracking.jobs.train import run_title, seeds_title, workload_params
from dit_mlflow.tracking.store.datasets import log_datasets_of
from dit_mlflow.tracking.store.explanations import log_answer, log_part
from dit_mlflow.tracking.store.names import KIND, METHOD, TRAINING_RUN
from dit_mlflow.tracking.store.run_log import log_params, project_run
from dit_mlflow.tracking.ui.links import where_to_look
from dit_mlflow.tracking.ui.next_steps import next_steps
from dit_mlflow.workload import Workload

DIT = Dit()
"""One sample at a time, in the recorded dtype."""

MINUTE = 60
"""Seconds from which the cost of leave-one-out is told before it starts."""


@dataclass(frozen=True)
class Answer:
    """An explanation and the run that holds it, the parent of the windows' runs."""

    run: ActiveRun
    explanation: Explanation

    @property
    def influence(self) -> Influence:
        return self.explanation.influence

    @property
    def whole(self) -> Metrics:
        return self.explanation.whole

    @property
    def per_window(self) -> tuple[Metrics, ...]:
        return self.explanation.per_window


def main_job(request: Request, project_run_id: str | None = None) -> str:
    """Run the main job; returns text for the terminal.

    The whole request is checked, and two steps are rehearsed, before anything is trained or logged.

    Raises:
        DitError: some part of the request cannot be used, or training or replay fail.
    """
    kind = check_kind(request.kind)
    asked = trained(request, _checked_by(request))
    training_run, trajectory, workload, windows, (checks, method, groups, query) = asked
    seconds = MlflowClient().get_run(training_run).data.metrics.get(TRAINING_SECONDS.name, 0.0)
    if line := cost_line(seconds, checks, workload.num_samples):
        say(line)
    answer = run_influence(
        *(training_run, trajectory, workload, windows, kind, checks, method, groups, project_run_id),
        all_figures=request.all_figures,
        queries=query(trajectory),
    )
    return summary(answer, training_run)


def cost_line(seconds: float, checks: Checks, num_samples: int) -> str | None:
    """What leave-one-out will take at the most, where a training took ``seconds``; ``None`` = less than a minute."""
    exact = num_samples if checks.ground_truth is None else checks.ground_truth
    if (total := seconds * exact) < MINUTE:
        return None
    return (
        f"leave-one-out of {exact} samples: up to {exact} trainings of {seconds:.3g} s, {total / MINUTE:.0f} minutes, "
        f"less where they run side by side; {option('ground_truth', 'none')} leaves it out"
    )


Checked = tuple[Checks, Dit | Removal, Groups | None, AskedQuery]
"""A request's parts that need the workload."""


def _checked_by(request: Request) -> Callable[[Workload], Checked]:
    def check(workload: Workload) -> Checked:
        parts = request.checks(workload), request.method(workload), parse_groups(request.groups, workload)
        return *parts, parse_query(request.query, workload)

    return check


def run_influence(
    training_run_id: str,
    trajectory: Trajectory,
    workload: Workload,
    windows: list[Window],
    kind: Kind,
    checks: Checks,
    method: Dit | Removal = DIT,
    groups: Groups | None = None,
    project_run_id: str | None = None,
    *,
    all_figures: bool = False,
    queries: Sequence[Query] | None = None,
) -> Answer:
    """:func:`dit_mlflow.explain` in a run of its own, which logs it: a parent run, and a nested child per window.

    Args:
        training_run_id: the run that recorded ``trajectory``.
        trajectory, workload, windows, kind, method, groups: see :func:`dit_mlflow.explain`.
        checks: exact retrainings to compare the scores with.
        project_run_id: the run that ``mlflow run`` made for this job; ``None`` = start one.
        all_figures: log every figure, not only those that docs/figures.md calls default.
        queries: see :func:`dit_mlflow.explain`.
    """
    tags = {KIND: "influence", METHOD: method.name, TRAINING_RUN: training_run_id}
    seeds = MlflowClient().get_run(training_run_id).data.params
    seeded = seeds_title(seeds.get("resolved.init_seed", 0), seeds.get("resolved.order_seed", 0))
    query = resolve_queries(queries, workload)[0].name
    told = "" if queries is None else query.replace("_", " ").removeprefix("mean validation loss of ")
    asked = f"{kind} {len(windows)} window{'s' * (len(windows) > 1)}"
    with project_run(project_run_id, run_title("influence", workload, seeded, told, asked), tags) as run:
        log_params(
            {
                **workload_params(workload),
                "method": method.name,
                "resolved.kind": kind,
                "resolved.windows": len(windows),
                "resolved.query": query,
                "resolved.dtype": str(method.dtype or "recorded").removeprefix("torch."),
                **({"resolved.removed": method.removed} if isinstance(method, Removal) else {}),
                "resolved.training_run": training_run_id,
            }
        )
        log_datasets_of(training_run_id, run.info.run_id)
        phase("influence")
        explanation = explain(
            *(trajectory, workload, windows, kind, queries),
            method=method,
            checks=checks,
            groups=groups,
            reached=log_part,
        )
        log_answer(explanation, training_run_id, all_figures)
    return Answer(run, explanation)


def summary(answer: Answer, training_run: str) -> str:
    """A table with a row per window, figures of the whole run, the answer, and where to look further."""
    agreement = next((figure for figure in FIDELITY if figure.name in answer.whole.values), TRUST_SPEARMAN)
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
    if (groups := answer.explanation.groups) is not None:
        told = "Without a group (change of the query; predicted: the sum of its scores, exact: by retraining)"
        lines += ["", told, "", terminal_table(groups, {str(name): str(name) for name in groups}), ""]
    lines += [*_trusted(answer.whole), "", *map(paragraph, answer.explanation.sentences), ""]
    lines += [f"training run   {training_run}", f"influence run  {answer.run.info.run_id}", where_to_look(answer.run)]
    what, command = next_steps(MlflowClient().get_run(training_run), answer.run.info.run_id)[0]
    lines += ["", f"next, {what[0].lower()}{what[1:]}: {command}"]
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
