"""The cleansing job: drop or relabel what influence flags, train again, and see whether that helped."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlflow
import numpy as np
from mlflow import MlflowClient

from dit_mlflow.errors import InputError, TrainingError, UnsupportedError, WorkloadError
from dit_mlflow.evaluation import mean_scores
from dit_mlflow.evaluation.changed_data import relabelled, sample_classes, subset
from dit_mlflow.evaluation.figures import ACCURACY, LOSS, PRECISION, TEST, VALIDATION, VALIDATION_LOSS, figure_of
from dit_mlflow.evaluation.trials import (
    RANDOM,
    Cleansing,
    Outcome,
    Trial,
    check_classes_stay,
    random_scores,
    trials,
    tried_out,
    untouched,
)
from dit_mlflow.explanation import cleansing_answer, cleansing_table, terminal_table
from dit_mlflow.influence import Kind, Window, check_kind, parse_windows, track
from dit_mlflow.influence.rehearsal import rehearse
from dit_mlflow.methods import method
from dit_mlflow.methods.confident_learning import check_folds, out_of_sample
from dit_mlflow.progress import progress_bar
from dit_mlflow.recording.loop import check_seeds
from dit_mlflow.replay import Trajectory
from dit_mlflow.tracking.jobs.cleanse_runs import CleansingRuns
from dit_mlflow.tracking.jobs.request import DEFAULT_WORKLOAD, Request, recorded_workload
from dit_mlflow.tracking.jobs.train import run_training, workload_params, workload_title
from dit_mlflow.tracking.store.artifacts import load_trajectory, log_influence
from dit_mlflow.tracking.store.datasets import log_datasets_of
from dit_mlflow.tracking.store.error_text import error_text
from dit_mlflow.tracking.store.names import KIND, METHOD, TRAINING_RUN
from dit_mlflow.tracking.store.run_log import project_run
from dit_mlflow.tracking.ui.links import where_to_look
from dit_mlflow.workload import Workload, load_workload
from dit_mlflow.workload.random_state import preserved_random_state

ACTIONS = ("drop", "relabel")

CLEANSING = "cleansing"

FOLDS = 5
"""Parts of the training samples, each predicted by a model that is trained on the others."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CleansingRequest(Request):
    """As :class:`Request`, and:

    Attributes:
        windows: each is a source of scores of its own, among which the validation split chooses; default: one, all of
            training.
        kind: default ``final``, the effect on the model at the end of training, since that is the one to be better.
        drop: shares of the training samples to clean, with commas between.
        action: ``drop`` or ``relabel``.
        repeats: trainings for each trial, of one pair of seeds each: the recorded one, and those after it.
        draws: random draws of as many samples, for comparison; 0 = none.
        metric: that validation chooses by and test judges; empty = ``accuracy`` if the workload has it, else ``loss``.
            Less is better of ``loss``, more of all others.
    """

    windows: str = "1"
    kind: str = "final"
    drop: str = "0.05,0.1,0.2,0.3"
    action: str = "drop"
    repeats: int = 3
    draws: int = 5
    metric: str = ""

    def check(self) -> None:
        """Raise :class:`InputError` for what can be told without a workload."""
        if self.action not in ACTIONS:
            raise InputError(f"action={self.action!r}; expected one of {', '.join(ACTIONS)}")
        for name, least in (("repeats", 1), ("draws", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}; expected {least} or more")
        _ = self.memory_budget
        self.counts(2**31)

    def counts(self, num_samples: int) -> dict[float, int]:
        """The fractions that were asked for, ascending, and how many samples each is; raises :class:`InputError`."""
        expected = "expected shares of the training samples between 0 and 1, such as 0.05,0.1"
        try:
            fractions = sorted({float(part) for part in self.drop.split(",")})
        except ValueError:
            raise InputError(f"drop={self.drop!r} cannot be read; {expected}") from None
        if not all(0 < fraction < 1 for fraction in fractions):
            raise InputError(f"drop={self.drop!r}; {expected}")
        counts = {fraction: round(fraction * num_samples) for fraction in fractions}
        for fraction, count in counts.items():
            if not 0 < count < num_samples:
                raise InputError(
                    f"drop={fraction:g} of {num_samples} samples is {f'all {count}' if count else 'none'} of them; "
                    "expected at least one, and at least one left"
                )
        if len(set(counts.values())) < len(counts):
            raise InputError(f"drop={self.drop!r} asks for the same number of {num_samples} samples twice")
        return counts


@dataclass(frozen=True, eq=False)
class CheckedCleansing:
    """A request that was held against its workload.

    Attributes:
        classes: of the training samples as labelled, ``[n]``; ``None`` if they have none.
        counts: fraction -> number of samples.
        metric: to choose and judge by.
    """

    classes: np.ndarray | None
    counts: dict[float, int]
    metric: str

    @classmethod
    def of(cls, request: CleansingRequest, workload: Workload) -> CheckedCleansing:
        """Raises :class:`DitError` for what cannot be done on this workload."""
        counts = request.counts(workload.num_samples)
        try:
            _ = workload.plan
        except WorkloadError as error:
            raise WorkloadError(
                f"cleanse trains again, so the workload must also say how the loop does that: {error} (and scheduler, "
                "if the loop has one)"
            ) from error
        if workload.test_set is None:
            raise WorkloadError(
                "Workload.test_set must be given to cleanse: the validation split chooses what to clean, so that only "
                "another one can tell whether it helped"
            )
        try:
            classes = sample_classes(workload)
        except UnsupportedError as error:
            if request.action == "relabel":
                raise UnsupportedError(f"action=relabel needs a classification: {error}") from error
            classes = None
        if request.action == "relabel" and classes is not None:
            check_folds(classes, FOLDS)
        most, kinds = max(counts.values()), 1 if classes is None else len(np.unique(classes))
        if request.action == "drop" and workload.num_samples - most < kinds:
            raise InputError(
                f"dropping {most} of {workload.num_samples} samples leaves fewer than the {kinds} classes; lower drop"
            )
        return cls(classes, counts, _metric(request, workload))


def cleanse_job(request: CleansingRequest, project_run_id: str | None = None) -> str:
    """Clean the training data by influence, at random and by loss, and train again; returns the terminal's last words.

    A parent run holds the answer (its description), ``cleansing.json``, ``cleansing.png``, the influence scores and the
    chosen samples; see :mod:`dit_mlflow.tracking.jobs.cleanse_runs` for the runs below it. A trial whose training fails
    is FAILED there, with the reason in the tag ``dit.error``, and takes no part in the choice.

    Raises:
        DitError: some part of the request cannot be used, or training or replay fail.
    """
    kind = check_kind(request.kind)
    request.check()
    if request.training_run:
        trajectory = load_trajectory(request.training_run)
        workload = recorded_workload(request, trajectory)
        windows = parse_windows(request.windows, trajectory)
        plan = CheckedCleansing.of(request, workload)
        training_run = request.training_run
    else:
        workload = load_workload(request.workload or DEFAULT_WORKLOAD, **request.settings)
        windows = parse_windows(request.windows, workload.plan)
        plan = CheckedCleansing.of(request, workload)
        _repeated(request.init_seed, request.order_seed, request.repeats)
        rehearse(workload, request.memory_budget)
        training_run = run_training(workload, request.init_seed, request.order_seed)
        trajectory = load_trajectory(training_run)
    seeds, known = _seeds(training_run, request.repeats)
    tags = {KIND: CLEANSING, METHOD: "dit", TRAINING_RUN: training_run}
    with project_run(project_run_id, f"cleanse {workload_title(workload)} {request.action}", tags) as run:
        mlflow.log_params(
            {
                **workload_params(workload),
                "resolved.kind": kind,
                "resolved.windows": len(windows),
                "resolved.drop": ",".join(f"{fraction:g}" for fraction in plan.counts),
                "resolved.action": request.action,
                "resolved.metric": plan.metric,
                "resolved.repeats": request.repeats,
                "resolved.draws": request.draws,
                "resolved.training_run": training_run,
            }
        )
        log_datasets_of(training_run, run.info.run_id)
        strategies = _strategies(request, trajectory, workload, windows, kind)
        predicted = None
        if request.action == "relabel":
            with preserved_random_state():
                predicted = out_of_sample(trajectory.replay(workload), FOLDS, seed=0)[1].argmax(axis=1)
        tried = trials(strategies, plan.counts)
        if request.action == "drop" and plan.classes is not None:
            check_classes_stay(tried, plan.classes)
        runs = CleansingRuns(workload, request.action, training_run, seeds, plan.classes, predicted)
        outcomes, failures = _outcomes([untouched(workload.num_samples), *tried], workload, predicted, runs)
        cleansing = Cleansing(tuple(outcomes), plan.metric, request.action, workload.corrupted)
        remarks = [*_against_record(cleansing.before, training_run, known), *failures]
        runs.log_strategies(cleansing)
        runs.log_answer(cleansing, remarks)
    return _summary(
        cleansing, remarks, [f"training run   {training_run}", f"cleansing run  {run.info.run_id}", where_to_look(run)]
    )


def _metric(request: CleansingRequest, workload: Workload) -> str:
    with preserved_random_state():
        found = mean_scores(workload, workload.build_model().eval(), workload.validation_set).values
    if not request.metric:
        return ACCURACY if math.isfinite(found.get(ACCURACY, math.nan)) else LOSS
    if request.metric not in found:
        raise InputError(f"metric={request.metric!r}; the workload has {', '.join(found)}")
    if not math.isfinite(found[request.metric]):
        raise InputError(
            f"metric={request.metric!r} is {found[request.metric]} on the validation split before training"
        )
    return request.metric


def _seeds(training_run: str, repeats: int) -> tuple[list[tuple[int, int]], bool]:
    """``(init_seed, order_seed)`` of each repeat, the recorded pair first; and whether it is recorded at all."""
    params = MlflowClient().get_run(training_run).data.params
    found = [params.get(f"resolved.{name}") for name in ("init_seed", "order_seed")]
    init, order = (int(value or 0) for value in found)
    return _repeated(init, order, repeats), None not in found


def _repeated(init: int, order: int, repeats: int) -> list[tuple[int, int]]:
    """The seeds of each repeat; raises :class:`InputError` if they grow too large."""
    check_seeds(init + repeats - 1, order + repeats - 1)
    return [(init + repeat, order + repeat) for repeat in range(repeats)]


def _strategies(
    request: CleansingRequest, trajectory: Trajectory, workload: Workload, windows: list[Window], kind: Kind
) -> dict[str, np.ndarray]:
    """Scores ``[draws, n]`` by the name of the strategy, low = to be cleaned."""
    influence = track(trajectory, workload, windows, kind, memory_budget=request.memory_budget)
    log_influence(influence)
    width = max(2, len(str(len(windows) - 1)))
    names = [f"influence w{index:0{width}d} {window}" for index, window in enumerate(windows)]
    found = {name: influence.of(index)[None] for index, name in enumerate(names if len(windows) > 1 else ["influence"])}
    found["loss"] = method("loss")(trajectory, workload).of(0)[None]
    if request.draws:
        found[RANDOM] = random_scores(request.draws, workload.num_samples)
    return found


def _outcomes(
    tried: list[Trial], workload: Workload, predicted: np.ndarray | None, runs: CleansingRuns
) -> tuple[list[Outcome], list[str]]:
    """What came of the trials, each in a run of its own, and why others failed."""
    outcomes: list[Outcome] = []
    failures: list[str] = []
    total = sum(len(trial.flagged) for trial in tried) * len(runs.seeds)
    with progress_bar(total, "trainings", "training") as progress:
        for trial in tried:
            before = outcomes[0] if outcomes else None
            attempt = partial(tried_out, trial, _change(workload, predicted), runs.seeds, progress.update)
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


def _change(workload: Workload, predicted: np.ndarray | None) -> Callable[[np.ndarray], Workload]:
    """What is done about flagged samples: dropped, or given the predicted classes ``[n]``."""
    if predicted is not None:
        return lambda flagged: relabelled(workload, flagged, predicted[flagged])
    return lambda flagged: subset(workload, np.delete(np.arange(workload.num_samples), flagged))


def _against_record(before: Outcome, training_run: str, known: bool) -> list[str]:
    """Sentences on how training again on all samples differs from the recorded training, if it does."""
    if not known:
        return [
            "The recorded training does not tell its seeds; all trainings here, without cleaning too, begin anew from "
            "seeds 0, 1, …"
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
    lines = ["", cleansing_answer(cleansing), *remarks, "", legend, "", terminal_table(table, headings), "", *where]
    return "\n".join(lines)
