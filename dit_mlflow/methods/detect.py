"""Which labels are wrong: methods, weighted by how well they find labels that were made wrong on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy import stats
from sklearn.linear_model import LogisticRegression

from dit_mlflow.errors import DitError, InputError, TrainingError, UnsupportedError, WorkloadError, first_line
from dit_mlflow.influence.question import Question
from dit_mlflow.methods import method
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.recording import train
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining.changed_data import relabelled, sample_classes
from dit_mlflow.told import logger_of
from dit_mlflow.workload import Workload

_log = logger_of(__name__)

AMONG = ("tracin", "influence_function", "loss", "aum", "confident_learning", "knn_shapley")

SHRINKAGE = 0.1
"""``C`` of the logistic regression."""

RESAMPLED = 200
"""Times that samples are drawn again, for the interval."""


@dataclass(frozen=True, kw_only=True)
class Detect(Method):
    """Wrong labels, by the methods that find planted ones: which method finds most differs from data to data.

    Random samples get another class at random, and training is run again, a few times. A logistic regression of the
    methods' scores (their ranks, as normal quantiles) learns there which samples have a planted label, and judges those
    of the recorded training. Low = the label is likely wrong. On twelve benches its AUROC is on average above the best
    single method of each (``benchmarks/detect.py``, docs/methods.md).

    The result's metadata says how far to trust it: ``planted`` has, for each query, the AUROC with which planted labels
    are ``found`` by what the other plantings taught, its ``interval`` of 95 % over samples, that of each method
    ``alone``, and the ``weights``; ``left_out`` the methods that cannot be used here, and why. Labels that were wrong
    before count as right there, so that the AUROC is too low where many are.

    Attributes:
        methods: to weigh.
        plantings: trainings with planted labels, two or more.
        share: of the samples that get a planted label in each.
        seed: of the plantings; the trainings have the seeds 0, 1, ….

    Raises:
        InputError: a setting that cannot be used.
        WorkloadError: the workload does not say how its loop trains again.
        UnsupportedError: it is no classification, training with planted labels diverges, or none of the methods can be
            used.

    Cost: for each planting a training and all methods, nine trainings with these; and the methods once more.
    """

    name = "detect"
    measures = "suspicion"

    methods: tuple[str, ...] = AMONG
    plantings: int = 2
    share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self._expect("two or more, a share of at most a half, and a seed of 0 or more", self._usable, *_SETTINGS)
        self._expect("one or more, each once, and not detect itself", self._choice_is_usable, "methods")

    @property
    def _usable(self) -> bool:
        given: Any = self
        numbers = isinstance(given.plantings, Integral), isinstance(given.share, Real), isinstance(given.seed, Integral)
        return all(numbers) and self.plantings >= 2 and 0 < self.share <= 0.5 and self.seed >= 0

    @property
    def _choice_is_usable(self) -> bool:
        return 0 < len(self.methods) == len(set(self.methods)) and self.name not in self.methods

    def estimate(self, question: Question) -> Estimate:
        workload, left_out = question.workload, dict[str, str]()
        for name in self.methods:
            method(name)
        try:
            _ = workload.plan
        except WorkloadError as error:
            raise WorkloadError(f"detect trains again, so the workload must also say how: {error}") from error
        planted = list(self._planted(workload))
        own = self._scores(question.trajectory, question, left_out)
        others = []
        with TemporaryDirectory() as folder:
            for turn, (changed, _) in enumerate(planted):
                try:
                    trajectory = train(changed, Path(folder) / str(turn), init_seed=turn, order_seed=turn)
                except TrainingError as error:
                    raise UnsupportedError(
                        f"detect trains with {self.share:.0%} of the labels made wrong, and that diverges: "
                        f"{first_line(error)}; take a smaller share or another seed"
                    ) from error
                asked = Question.of(trajectory, changed, [question.windows[0]], question.kind, question.queries)
                others.append(self._scores(trajectory, asked, left_out))
        names = [name for name in self.methods if name not in left_out]
        if not names:
            raise UnsupportedError(f"detect has no method left: {'; '.join(map(': '.join, left_out.items()))}")
        for name, reason in left_out.items():
            _log.warning("detect: %s is left out: %s", name, reason)
        scores = np.zeros(question.shape)
        told = []
        is_planted = [found for _, found in planted]
        for query in range(len(question.queries)):
            seen = [_standing([of[name][query] for name in names]) for of in (own, *others)]
            model = _fitted(seen[1:], is_planted)
            scores[:, query] = -model.decision_function(seen[0])
            weights = dict(zip(names, (-model.coef_[0]).tolist(), strict=True))
            told.append({**_judged(seen[1:], is_planted, names, self.seed), "weights": weights})
        return Estimate(scores, details={"planted": told, "plantings": len(planted), "left_out": left_out})

    def _planted(self, workload: Workload) -> Iterator[tuple[Workload, np.ndarray]]:
        """The workload with planted labels, and which they are, bool ``[samples]``."""
        classes = sample_classes(workload)
        known, count = np.unique(classes), round(self.share * len(classes))
        if len(known) < 2 or not 1 < count < len(classes) - 1:
            raise InputError(
                f"detect on {len(classes)} samples of {len(known)} classes with share={self.share}; expected two "
                "classes or more, and a share that is two samples or more"
            )
        for turn in range(self.plantings):
            # A stream of its own: the seed alone may be that by which somebody damaged the data.
            generator = np.random.default_rng([self.seed, turn, len(self.name)])
            chosen = np.sort(generator.choice(len(classes), count, replace=False))
            shift = generator.integers(1, len(known), size=count)
            place = np.searchsorted(known, classes[chosen])
            yield (
                relabelled(workload, chosen, known[(place + shift) % len(known)]),
                np.isin(np.arange(len(classes)), chosen),
            )

    def _scores(self, trajectory: Trajectory, question: Question, left_out: dict[str, str]) -> dict[str, np.ndarray]:
        """``[queries, samples]`` by method; what cannot be used is put into ``left_out``."""
        found = {}
        for name in self.methods:
            if name not in left_out:
                try:
                    by = method(name)(trajectory, question.workload, queries=question.queries)
                except DitError as error:
                    left_out[name] = first_line(error)
                else:
                    found[name] = by.scores[0]
        return found


_SETTINGS = ("plantings", "share", "seed")


def _standing(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Normal quantiles of each method's ranks, ``[samples, methods]``; samples without a score stand in the middle."""
    columns = []
    for of in scores:
        known = np.isfinite(of)
        column = np.zeros(len(of))
        column[known] = stats.norm.ppf((stats.rankdata(of[known]) - 0.5) / max(known.sum(), 1))
        columns.append(column)
    return np.stack(columns, axis=1)


def _fitted(seen: Sequence[np.ndarray], planted: Sequence[np.ndarray]) -> LogisticRegression:
    return LogisticRegression(C=SHRINKAGE).fit(np.concatenate(seen), np.concatenate(planted))


def _judged(
    seen: Sequence[np.ndarray], planted: Sequence[np.ndarray], names: Sequence[str], seed: int
) -> dict[str, Any]:
    """AUROC of each planting by what the others taught, on average; and of each method alone."""
    found = []
    for turn, own in enumerate(seen):
        rest = [k for k in range(len(seen)) if k != turn]
        found.append(_fitted([seen[k] for k in rest], [planted[k] for k in rest]).decision_function(own))
    random = np.random.default_rng(seed)
    drawn = [_mean_auroc(found, planted, random) for _ in range(RESAMPLED)]
    alone = {name: _mean_auroc([-own[:, column] for own in seen], planted) for column, name in enumerate(names)}
    return {
        "found": _mean_auroc(found, planted),
        "interval": np.quantile(drawn, [0.025, 0.975]).tolist(),
        "alone": alone,
    }


def _mean_auroc(
    found: Sequence[np.ndarray], planted: Sequence[np.ndarray], random: np.random.Generator | None = None
) -> float:
    """Over the plantings; with samples drawn again, planted and others apart, if ``random`` is given."""
    values = []
    for scores, is_planted in zip(found, planted, strict=True):
        rows = np.arange(len(scores))
        if random is not None:
            rows = np.concatenate([random.choice(part, len(part)) for part in (rows[is_planted], rows[~is_planted])])
        values.append(_auroc(scores[rows], is_planted[rows]))
    return float(np.mean(values))


def _auroc(scores: np.ndarray, is_planted: np.ndarray) -> float:
    """Mann and Whitney's: scikit-learn's takes ten times as long, which resampling multiplies by hundreds."""
    planted, others = is_planted.sum(), (~is_planted).sum()
    return float((stats.rankdata(scores)[is_planted].sum() / planted - (planted + 1) / 2) / others)
