"""Does training again without the suspicious samples, or with other labels, give a better model?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from scipy import stats

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation.figures import (
    HIGH,
    HIGHEST_DRAW,
    LOSS,
    LOW,
    LOWEST_DRAW,
    PRECISION,
    RECALL,
    TEST,
    VALIDATION,
    figure_of,
)
from dit_mlflow.evaluation.metrics import Metrics, sample_scores
from dit_mlflow.recording.loop import train_unrecorded
from dit_mlflow.workload import Workload

NO_CLEANING = "no cleaning"
RANDOM = "random"
"""Strategies for comparison; neither is a way to find samples."""

Scores = np.ndarray | Mapping[float, np.ndarray]
"""``[draws, n]``, one for all fractions, or one for each."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Samples to drop or relabel, found by one strategy.

    Attributes:
        strategy: how they were found.
        fraction: share of the training samples that was asked for.
        flagged: the samples, lowest score first, ``[draws, k]``; deterministic strategies have one draw.
        scores: of all training samples, low = harmful or suspicious, ``[draws, n]``.
        weights: of their losses in training, in [0, 1], ``[draws, n]``; ``None`` = 1.
    """

    strategy: str
    fraction: float
    flagged: np.ndarray
    scores: np.ndarray
    weights: np.ndarray | None = None

    @property
    def count(self) -> int:
        """How many samples are flagged, ``k``."""
        return self.flagged.shape[1]

    def found(self, corrupted: Sequence[int]) -> Metrics:
        """How many of the flagged samples are truly damaged, mean over draws.

        Returns:
            ``precision``, the share of the flagged that is damaged, and ``recall``, the share of the damaged that is
            flagged; undefined, with the reason, if nothing is flagged or no damage is known.
        """
        if not self.count or not len(corrupted):
            reason = "no sample is flagged" if not self.count else "it is not known which samples are damaged"
            return Metrics(undefined=dict.fromkeys((PRECISION.leaf, RECALL.leaf), reason))
        damaged = float(np.isin(self.flagged, np.asarray(corrupted)).sum(axis=1).mean())
        return Metrics({PRECISION.leaf: damaged / self.count, RECALL.leaf: damaged / len(corrupted)})


def untouched(num_samples: int) -> Trial:
    """The trial that flags nothing."""
    return Trial(NO_CLEANING, 0.0, np.zeros((1, 0), dtype=np.int64), np.zeros((1, num_samples)))


def trials(strategies: Mapping[str, Scores], counts: Mapping[float, int]) -> list[Trial]:
    """For each strategy and fraction, the samples of lowest score; ties go to the lower index, NaN comes last.

    Args:
        strategies: scores ``[draws, n]`` by name, or by name and fraction.
        counts: fraction -> number of samples.
    """

    def trial(name: str, scores: np.ndarray, fraction: float) -> Trial:
        return Trial(name, fraction, np.argsort(scores, axis=1, kind="stable")[:, : counts[fraction]], scores)

    return [
        trial(name, scores if isinstance(scores, np.ndarray) else scores[fraction], fraction)
        for name, scores in strategies.items()
        for fraction in counts
    ]


def lowered(tried: Sequence[Trial]) -> list[Trial]:
    """The trials with weights that are lowered in proportion to harm: of the flagged samples, the worst gets 0.

    ``1 - h / max(h)`` for harm ``h``, the negative part of the score; a flagged sample that does not harm keeps 1.
    Random scores say nothing of harm: their samples get the weights of the first other strategy at that fraction.
    """
    found: list[Trial] = []
    for trial in tried:
        weights = np.ones_like(trial.scores, dtype=np.float64)
        taken = _lowered(trial)
        if trial.strategy == RANDOM:
            of = (other for other in tried if other.strategy != RANDOM and other.fraction == trial.fraction)
            like = next(map(_lowered, of), None)
            taken = taken if like is None else np.broadcast_to(like[0], taken.shape)
        np.put_along_axis(weights, trial.flagged, taken, axis=1)
        found.append(replace(trial, weights=weights))
    return found


def _lowered(trial: Trial) -> np.ndarray:
    """Weights of the flagged samples ``[draws, flagged]``."""
    harm = np.clip(-np.take_along_axis(trial.scores, trial.flagged, axis=1), 0, None)
    found: np.ndarray = 1 - harm / np.maximum(harm.max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return found


def random_scores(draws: int, num_samples: int, seed: int = 0) -> np.ndarray:
    """Scores ``[draws, n]`` in random order; in a draw, the samples of a larger fraction contain those of a smaller."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(num_samples) for _ in range(draws)]).astype(np.float64)


def check_classes_stay(tried: Sequence[Trial], classes: np.ndarray) -> None:
    """Raise :class:`InputError` if dropping the flagged samples of a trial leaves a class without any."""
    for trial in tried:
        for flagged in trial.flagged:
            gone = np.setdiff1d(classes, np.delete(classes, flagged))
            if len(gone):
                raise InputError(
                    f"dropping {trial.count} of {len(classes)} samples ({100 * trial.fraction:g} %) "
                    f"by {trial.strategy} leaves no sample of class {gone[0]}; lower the fraction"
                )


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a trial.

    Attributes:
        trial: the samples.
        figures: ``validation/loss``, ``test/accuracy`` and so on of the retrained models, ``[draws, repeats]``; the
            same repeat means the same pair of seeds in every trial.
        by_sample: the same, mean over draws and repeats, for each sample of the split, ``[samples]``.
    """

    trial: Trial
    figures: Mapping[str, np.ndarray]
    by_sample: Mapping[str, np.ndarray]

    def mean(self, name: str) -> float:
        """Mean of a figure over draws and repeats."""
        return float(self.figures[name].mean())

    def summary(self) -> Metrics:
        """Each figure's mean, and the interval (95 %) of the mean over pairs of seeds as ``…_low``, ``…_high``.

        With several draws also ``…_lowest_draw`` and ``…_highest_draw``, each a mean over the pairs of seeds. The
        intervals account for other seeds, not for another validation or test set.
        """
        found = Metrics()
        for name, values in self.figures.items():
            found = found.and_(_with_interval(name, values.mean(axis=0)))
            if len(values) > 1:
                draws = values.mean(axis=1)
                ends = {name + LOWEST_DRAW: float(draws.min()), name + HIGHEST_DRAW: float(draws.max())}
                found = found.and_(Metrics(ends))
        return found

    def gain(self, other: Outcome) -> Metrics:
        """How much better each figure is than ``other``'s: the mean over seeds, and its interval (95 %).

        The interval accounts for other seeds and for other samples in the split: the two half-widths, each by Student's
        t over paired differences, are added in quadrature, as if independent. **Sign**: positive = better, which of a
        loss means lower.
        """
        found = Metrics()
        for name in self.figures:
            sign = _sign(name)
            over_seeds = sign * (self.figures[name].mean(axis=0) - other.figures[name].mean(axis=0))
            over_samples = sign * (self.by_sample[name] - other.by_sample[name])
            found = found.and_(_with_interval(name, over_seeds, over_samples))
        return found


def _sign(name: str) -> int:
    return 1 if figure_of(name).higher_is_better else -1


def _with_interval(name: str, values: np.ndarray, *further: np.ndarray) -> Metrics:
    """Mean of ``values``; its interval, widened by that of the means of ``further``."""
    ends = (name + LOW, name + HIGH)
    mean = Metrics({name: float(values.mean())})
    if len(values) < 2 or any(len(more) < 2 for more in further):
        reason = f"{len(values)} pairs of seeds; an interval needs 2 or more, and as many samples in the split"
        return mean.and_(Metrics(undefined=dict.fromkeys(ends, reason)))
    half = math.hypot(*(np.ptp(mean_interval(part)) / 2 for part in (values, *further)))
    return mean.and_(Metrics(dict(zip(ends, (mean.values[name] - half, mean.values[name] + half), strict=True))))


def tried_out(
    trial: Trial,
    change: Callable[[np.ndarray], Workload],
    seeds: Sequence[tuple[int, int]],
    trained: Callable[[], object] = lambda: None,
) -> Outcome:
    """Train on the changed data, for each draw and each pair of seeds.

    Args:
        trial: the samples.
        change: makes the workload to be trained from the flagged samples ``[k]``.
        seeds: ``(init_seed, order_seed)`` of each repeat.
        trained: called after each training.

    Raises:
        TrainingError: a loss is not finite.

    Cost: ``draws * repeats`` trainings; nothing of them is stored.
    """
    found: dict[str, list[np.ndarray]] = {}
    for draw, flagged in enumerate(trial.flagged):
        workload, weights = change(flagged), None if trial.weights is None else trial.weights[draw]
        for init_seed, order_seed in seeds:
            model = train_unrecorded(workload, init_seed, order_seed, weights).eval()
            for data, dataset in ((VALIDATION, workload.validation_set), (TEST, workload.test_set)):
                if dataset is not None:
                    for name, values in sample_scores(workload, model, dataset).items():
                        found.setdefault(data + name, []).append(values)
            trained()
    shape = (len(trial.flagged), len(seeds))
    figures = {name: np.array([values.mean() for values in rows]).reshape(shape) for name, rows in found.items()}
    return Outcome(trial, figures, {name: np.mean(rows, axis=0) for name, rows in found.items()})


def rank(outcome: Outcome, metric: str) -> tuple[float, float, int]:
    """Sort key, best on the validation split first; then by validation loss, then fewer flagged samples.

    No figure of the test split enters.
    """
    figures = [-_sign(name) * outcome.mean(name) for name in (VALIDATION + metric, VALIDATION + LOSS)]
    first, second = (value if np.isfinite(value) else np.inf for value in figures)
    return first, second, outcome.trial.count


def choose(outcomes: Sequence[Outcome], metric: str) -> Outcome:
    """The outcome that is best on the validation split, by :func:`rank`.

    Args:
        outcomes: one or more.
        metric: without the split, such as ``accuracy`` or ``loss``.
    """
    return min(outcomes, key=lambda outcome: rank(outcome, metric))


Verdict = Literal["yes", "no", "unclear"]


def verdict(gain: Metrics, name: str) -> Verdict:
    """Whether a gain is above 0, as far as its interval says."""
    if gain.values.get(name + LOW, 0.0) > 0:
        return "yes"
    return "no" if gain.values.get(name + HIGH, 0.0) < 0 else "unclear"


@dataclass(frozen=True, eq=False)
class Cleansing:
    """All that was tried on one training.

    Attributes:
        outcomes: of the trials, one of them without cleaning.
        metric: that decides, without the split, such as ``accuracy`` or ``loss``.
        action: ``drop``, ``relabel`` or ``reweight``.
        corrupted: training samples that are known to be damaged.
    """

    outcomes: tuple[Outcome, ...]
    metric: str
    action: str
    corrupted: Sequence[int] = ()

    @property
    def before(self) -> Outcome:
        """The outcome without cleaning."""
        return self.by(NO_CLEANING)[0]

    @cached_property
    def chosen(self) -> Outcome:
        """The best outcome on the validation split; no cleaning is a candidate, random cleaning is not."""
        return choose([outcome for outcome in self.outcomes if outcome.trial.strategy != RANDOM], self.metric)

    @property
    def strategies(self) -> list[str]:
        """Names of the strategies that flag samples."""
        names = dict.fromkeys(outcome.trial.strategy for outcome in self.outcomes)
        return [name for name in names if name != NO_CLEANING]

    def by(self, strategy: str) -> list[Outcome]:
        """The outcomes of one strategy, fewest samples first."""
        found = [outcome for outcome in self.outcomes if outcome.trial.strategy == strategy]
        return sorted(found, key=lambda outcome: outcome.trial.count)

    @property
    def helped(self) -> Verdict:
        """Whether cleaning helped, judged on the test split.

        By the metric, or, where the interval of its gain has 0 in it, by the loss. ``yes``: the whole interval is above
        0; ``no``: it is below 0, or the metric's mean did not improve, or no cleaning was chosen; ``unclear``: the mean
        improved, by no more than seeds and test samples make it vary.
        """
        if self.chosen is self.before:
            return "no"
        gain = self.chosen.gain(self.before)
        for name in (TEST + self.metric, TEST + LOSS):
            if (found := verdict(gain, name)) != "unclear":
                return found
        return "unclear" if gain.values[TEST + self.metric] > 0 else "no"


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean of independent values ``[2 or more]``, by Student's t."""
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * float(stats.sem(values))
    return float(values.mean()) - half, float(values.mean()) + half
