"""The cleansing job: drop, relabel or reweight what influence flags, train again, and test whether that helped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mlflow import MlflowClient

from dit_mlflow.errors import InputError, TrainingError
from dit_mlflow.evaluation.figures import LOSS, PRECISION, TEST, VALIDATION, VALIDATION_LOSS, figure_of
from dit_mlflow.evaluation.trials import Cleansing, Outcome, Trial, untouched
from dit_mlflow.explanation import cleansing_answer, cleansing_table, paragraph, terminal_table
from dit_mlflow.explanation.cleansing import ACTIONS, CleansingTask, parse_shares
from dit_mlflow.influence import Influence, check_kind
from dit_mlflow.progress import phase, progress_bar
from dit_mlflow.recording.loop import check_seeds
from dit_mlflow.told import logger_of
from dit_mlflow.tracking.jobs.cleanse_runs import CleansingRuns
from dit_mlflow.tracking.jobs.request import Request, trained
from dit_mlflow.tracking.jobs.train import run_title, workload_params
from dit_mlflow.tracking.store.artifacts import log_influence
from dit_mlflow.tracking.store.datasets import log_datasets_of
from dit_mlflow.tracking.store.failed_run import error_text
from dit_mlflow.tracking.store.names import INFLUENCE, KIND, METHOD, TRAINING_RUN
from dit_mlflow.tracking.store.run_log import log_params, project_run
from dit_mlflow.tracking.ui.links import where_to_look

CLEANSING = "cleansing"

_log = logger_of(__name__)


@dataclass(frozen=True)
class CleansingRequest(Request):
    """As :class:`Request`, and:

    Attributes:
        windows: each gives scores of its own, a strategy among which the validation split chooses; default: one window,
            all of training.
        kind: default ``final``, the effect on the final model, which is the one to improve.
        drop: shares of the training samples to clean, separated by commas.
        action: ``drop``, ``relabel`` or ``reweight``.
        repeats: trainings per trial, each with its own pair of seeds: the recorded pair and those after it.
        draws: random draws of as many samples, for comparison; 0 = none.
        metric: to choose by (validation) and judge by (test); empty = ``accuracy`` if the workload has it, else
            ``loss``. Lower is better for ``loss``, higher for all others.
    """

    windows: str = "1"
    kind: str = "final"
    drop: str = "0.05,0.1,0.2,0.3"
    action: str = "drop"
    repeats: int = 3
    draws: int = 5
    metric: str = ""

    def check(self) -> None:
        """Raise :class:`InputError` for what is wrong whatever the workload."""
        if self.action not in ACTIONS:
            raise InputError(f"action={self.action!r}; expected one of {', '.join(ACTIONS)}")
        for name, least in (("repeats", 1), ("draws", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}; expected {least} or more")
        _ = self.memory_budget
        _repeated(self.init_seed, self.order_seed, self.repeats)
        parse_shares(self.drop, 2**31)


def cleanse_job(request: CleansingRequest, project_run_id: str | None = None) -> str:
    """Clean the training data by influence, at random and by loss, and train again; returns text for the terminal.

    A parent run holds the answer (its description), ``cleansing.json``, ``cleansing.png``, the influence scores
    (``influence/`` at the smallest fraction, ``influence/drop_0.2/`` and so on at each) and the chosen samples; for its
    child runs see :mod:`dit_mlflow.tracking.jobs.cleanse_runs`. A trial whose training fails is FAILED there, with the
    reason in the tag ``dit.error``, and cannot be chosen.

    Raises:
        DitError: some part of the request cannot be used, or training or replay fail.
    """
    kind = check_kind(request.kind)
    request.check()
    training_run, trajectory, workload, windows, task = trained(
        request, lambda workload: CleansingTask.of(workload, request.drop, request.action, request.metric)
    )
    seeds, known = _seeds(training_run, request.repeats)
    shares = " ".join(f"{100 * fraction:g}" for fraction in task.counts) + " %"
    tags = {KIND: CLEANSING, METHOD: "removal", TRAINING_RUN: training_run}
    with project_run(project_run_id, run_title("cleanse", workload, f"{request.action} {shares}"), tags) as run:
        log_params(
            {
                **workload_params(workload),
                "resolved.kind": kind,
                "resolved.windows": len(windows),
                "resolved.drop": ",".join(f"{fraction:g}" for fraction in task.counts),
                "resolved.action": request.action,
                "resolved.metric": task.metric,
                "resolved.repeats": request.repeats,
                "resolved.draws": request.draws,
                "resolved.training_run": training_run,
            }
        )
        log_datasets_of(training_run, run.info.run_id)
        asked = trajectory, windows, kind, request.draws, request.memory_budget
        phase("influence")
        task, tried = task.flag(*asked, reached=_log_each)
        runs = CleansingRuns(task, training_run, seeds, request.all_figures)
        phase("cleansing")
        outcomes, failures = _outcomes([untouched(workload.num_samples), *tried], runs)
        cleansing = Cleansing(tuple(outcomes), task.metric, request.action, workload.corrupted)
        remarks = [*_against_record(cleansing.before, training_run, known), *failures]
        runs.log_strategies(cleansing)
        runs.log_answer(cleansing, remarks)
    return _summary(
        cleansing, remarks, [f"training run   {training_run}", f"cleansing run  {run.info.run_id}", where_to_look(run)]
    )


def _log_each(found: Mapping[float, Influence]) -> None:
    log_influence(next(iter(found.values())))
    for fraction, influence in found.items():
        log_influence(influence, folder=f"{INFLUENCE}/drop_{fraction:g}")


def _seeds(training_run: str, repeats: int) -> tuple[list[tuple[int, int]], bool]:
    """``(init_seed, order_seed)`` of each repeat, the recorded pair first; and whether a pair is recorded."""
    params = MlflowClient().get_run(training_run).data.params
    found = [params.get(f"resolved.{name}") for name in ("init_seed", "order_seed")]
    init, order = (int(value or 0) for value in found)
    return _repeated(init, order, repeats), None not in found


def _repeated(init: int, order: int, repeats: int) -> list[tuple[int, int]]:
    """The seeds of each repeat; raises :class:`InputError` if they grow too large."""
    check_seeds(init + repeats - 1, order + repeats - 1)
    return [(init + repeat, order + repeat) for repeat in range(repeats)]


def _outcomes(tried: list[Trial], runs: CleansingRuns) -> tuple[list[Outcome], list[str]]:
    """The outcomes of the trials, each in a run of its own, and the reasons of those that failed."""
    outcomes: list[Outcome] = []
    failures: list[str] = []
    total = sum(len(trial.flagged) for trial in tried) * len(runs.seeds)
    with progress_bar(total, "trainings", "training") as progress:
        for trial in tried:
            before = outcomes[0] if outcomes else None
            attempt = partial(runs.task.attempt, trial, runs.seeds, progress.update)
            try:
                outcomes.append(runs.child(trial, before, attempt))
            except Exception as error:
                if before is None:
                    raise
                failures.append(f"{runs.name(trial)} failed: {error_text(error)}")
                _log.warning(failures[-1])
    if len(outcomes) == 1:
        raise TrainingError(f"every trial failed; the first: {failures[0]}")
    return outcomes, failures


def _against_record(before: Outcome, training_run: str, known: bool) -> list[str]:
    """Sentences on how training again on all samples differs from the recorded training, if it does."""
    if not known:
        return [
            "The seeds of the recorded training are not known; all trainings here, with and without cleaning, "
            "start from seeds 0, 1, …"
        ]
    name = VALIDATION_LOSS.name
    recorded = MlflowClient().get_run(training_run).data.metrics.get(name)
    again = float(before.figures[name][0, 0])
    if recorded is None or math.isclose(recorded, again, rel_tol=1e-9):
        return []
    return [
        f"Training again on all samples from the recorded seeds gave {name} {again:.6g}, the recorded training "
        f"{recorded:.6g}: machine, versions or number of threads differ, or the model is not made from the seed"
    ]


def _summary(cleansing: Cleansing, remarks: list[str], where: list[str]) -> str:
    headings = {"strategy": "strategy", "samples": "samples"}
    judged = [figure_of(data + name) for name in dict.fromkeys((cleansing.metric, LOSS)) for data in (VALIDATION, TEST)]
    gain = figure_of(TEST + cleansing.metric).gain
    headings |= {figure.name: figure.heading for figure in (*judged, gain, PRECISION)}
    table = cleansing_table(cleansing)
    legend = f"{gain.heading}: {gain.sentence}; means over seeds"
    if cleansing.corrupted:
        legend += f"; {PRECISION.heading}: {PRECISION.sentence}"
    answer = map(paragraph, cleansing_answer(cleansing).split("\n"))
    lines = ["", *answer, *remarks, "", legend, "", terminal_table(table, headings), "", *where]
    return "\n".join(lines)
