"""The cleansing task: check a request against its workload, flag samples by influence, train again without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dit_mlflow.errors import InputError, UnsupportedError, WorkloadError
from dit_mlflow.evaluation import mean_scores
from dit_mlflow.evaluation.figures import ACCURACY, LOSS
from dit_mlflow.evaluation.trials import (
    RANDOM,
    Outcome,
    Scores,
    Trial,
    check_classes_stay,
    lowered,
    random_scores,
    trials,
    tried_out,
)
from dit_mlflow.explanation.explainer import explain
from dit_mlflow.explanation.truth import Checks
from dit_mlflow.influence import Influence, Kind, Window
from dit_mlflow.methods.confident_learning import check_folds, out_of_sample
from dit_mlflow.methods.removal import removal_curve
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining.changed_data import relabelled, sample_classes, subset
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state

ACTIONS = ("drop", "relabel", "reweight")

PREDICTION_FOLDS = 5
"""Parts of the training samples; a model that is trained on the other parts predicts each."""


def parse_shares(text: str, num_samples: int) -> dict[float, int]:
    """Parse comma-separated shares of the training samples: share -> number of samples, in ascending order.

    Raises:
        InputError: a share cannot be read, is none or all of the samples, or as many samples as another share.
    """
    expected = "expected shares of the training samples between 0 and 1, such as 0.05,0.1"
    try:
        fractions = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"drop={text!r} cannot be read; {expected}") from None
    if not all(0 < fraction < 1 for fraction in fractions):
        raise InputError(f"drop={text!r}; {expected}")
    counts = {fraction: round(fraction * num_samples) for fraction in fractions}
    for fraction, count in counts.items():
        if not 0 < count < num_samples:
            raise InputError(
                f"drop={fraction:g} of {num_samples} samples is {f'all {count}' if count else 'none'} of them; "
                "expected at least one, and at least one left"
            )
    if len(set(counts.values())) < len(counts):
        raise InputError(f"drop={text!r} asks for the same number of {num_samples} samples twice")
    return counts


@dataclass(frozen=True, eq=False)
class CleansingTask:
    """A cleansing request that has been checked against its workload.

    Attributes:
        workload: before cleaning.
        action: one of :data:`ACTIONS`.
        counts: fraction -> number of samples.
        metric: to choose and judge by.
        classes: of the training samples as labelled, ``[n]``; ``None`` if they have none.
        predicted: the classes ``[n]`` that flagged samples get; ``None`` = samples are dropped, or not yet flagged.
    """

    workload: Workload
    action: str
    counts: dict[float, int]
    metric: str
    classes: np.ndarray | None = None
    predicted: np.ndarray | None = None

    @classmethod
    def of(cls, workload: Workload, shares: str, action: str, metric: str = "") -> CleansingTask:
        """Check a request; raises :class:`DitError` if the workload cannot do it. No ``metric`` = accuracy or loss."""
        counts = parse_shares(shares, workload.num_samples)
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
            if action == "relabel":
                raise UnsupportedError(f"action=relabel needs a classification: {error}") from error
            classes = None
        if action == "relabel" and classes is not None:
            check_folds(classes, PREDICTION_FOLDS)
        most, kinds = max(counts.values()), 1 if classes is None else len(np.unique(classes))
        if action == "drop" and workload.num_samples - most < kinds:
            raise InputError(
                f"dropping {most} of {workload.num_samples} samples leaves fewer than the {kinds} classes; lower drop"
            )
        return cls(workload, action, counts, _metric(metric, workload), classes)

    def flag(
        self,
        trajectory: Trajectory,
        windows: Sequence[Window],
        kind: Kind,
        draws: int,
        memory_budget: int | None = None,
        reached: Callable[[Mapping[float, Influence]], object] = lambda found: None,
    ) -> tuple[CleansingTask, list[Trial]]:
        """Flag the samples of lowest removal influence in each window and at each fraction (the influence when that
        share of the samples goes, of two at the least), of highest loss, and at random; predict new labels.

        Args:
            trajectory, windows, kind, memory_budget: see :func:`dit_mlflow.track`.
            draws: random draws of as many samples, for comparison; 0 = none.
            reached: called with the influence, by fraction, as soon as it is computed.

        Raises:
            DitError: influence cannot be computed, or a class would be left without samples.

        Cost: :func:`dit_mlflow.removal_influence`, a bank for each fraction; to relabel, :data:`PREDICTION_FOLDS` fits
            of the last layer.
        """
        least = 2 / self.workload.num_samples
        shares = [max(fraction, least) for fraction in self.counts]
        curve = removal_curve(trajectory, self.workload, windows, kind, None, shares, memory_budget=memory_budget)
        found = dict(zip(self.counts, curve, strict=True))
        reached(found)
        width = max(2, len(str(len(windows) - 1)))
        names = [f"influence w{index:0{width}d} {window}" for index, window in enumerate(windows)]
        if len(windows) == 1:
            names = ["influence"]
        strategies: dict[str, Scores] = {
            name: {fraction: one.of(index)[None] for fraction, one in found.items()} for index, name in enumerate(names)
        }
        whole = [Window(0, trajectory.num_steps)]
        suspicion = explain(trajectory, self.workload, whole, method="loss", checks=Checks())
        strategies["loss"] = suspicion.influence.of(0)[None]
        if draws:
            strategies[RANDOM] = random_scores(draws, self.workload.num_samples)
        predicted = None
        if self.action == "relabel":
            with preserved_random_state():
                predicted = out_of_sample(trajectory.replay(self.workload), PREDICTION_FOLDS, seed=0)[1].argmax(axis=1)
        tried = trials(strategies, self.counts)
        if self.action == "drop" and self.classes is not None:
            check_classes_stay(tried, self.classes)
        return replace(self, predicted=predicted), lowered(tried) if self.action == "reweight" else tried

    def attempt(
        self, trial: Trial, seeds: Sequence[tuple[int, int]], told: Callable[[], object] = lambda: None
    ) -> Outcome:
        """Train again without the flagged samples, with their new labels, or their weights; see :func:`tried_out`."""
        return tried_out(trial, self._changed, seeds, told)

    def _changed(self, flagged: np.ndarray) -> Workload:
        if self.action == "reweight":
            return self.workload
        if self.predicted is not None:
            return relabelled(self.workload, flagged, self.predicted[flagged])
        return subset(self.workload, np.delete(np.arange(self.workload.num_samples), flagged))


def _metric(asked: str, workload: Workload) -> str:
    """The metric to judge by; default: ``accuracy`` if the workload has it, else ``loss``."""
    with preserved_random_state():
        found = mean_scores(workload, workload.build_model().eval(), workload.validation_set).values
    if not asked:
        return ACCURACY if math.isfinite(found.get(ACCURACY, math.nan)) else LOSS
    if asked not in found:
        raise InputError(f"metric={asked!r}; the workload has {', '.join(found)}")
    if not math.isfinite(found[asked]):
        raise InputError(f"metric={asked!r} is {found[asked]} on the validation split before training")
    return asked
