"""Datamodels: the query as a linear function of the samples kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, RetrainingMethod
from dit_mlflow.retraining.subsets import met, outcomes, random_subsets
from dit_mlflow.told import logger_of

_log = logger_of(__name__)

PENALTY_FOLDS = 4
"""Folds of the cross-validation that chooses the penalty."""


@dataclass(frozen=True)
class Datamodel(RetrainingMethod):
    """Coefficients of a regression of the query on the samples of random subsets (Ilyas et al. 2022, arXiv 2202.00622).

    ::

        q(S) ~ c + sum_{j in S} theta_j        score_j = -theta_j

    fitted by scikit-learn to trainings on ``subsets`` random parts, with an L1 penalty (the paper's) or a squared one,
    which cross-validation chooses. Without a penalty and with all subsets it is the Banzhaf value. Removal is weight 0
    in the recorded run; samples are kept independently of each other (see :func:`random_subsets`).

    Cost: ``subsets`` trainings and a fit, whatever the number of samples. Few subsets make the penalty large, which
    pulls scores to 0: ``explained`` in the metadata is the share of the query's variance over held-out subsets that the
    fit predicts, for each window and query. On ``projects/mnist`` (256 samples) the Spearman correlation of 1024
    subsets with leave-one-out is about 0.7 with a share of 0.9, 0.5 with 0.5.

    Attributes:
        subsets: the budget, in trainings.
        share: of the samples that each keeps; the paper has 0.1 to 0.75. Near 1, it is close to leave-one-out.
        regression: ``lasso`` or ``ridge``.
        penalty: ``alpha`` of scikit-learn's ``Lasso`` or ``Ridge``; ``None`` = by cross-validation.
        seed: of the subsets.
        dtype, effort: of the retraining; the changes are large, the recorded dtype will do.

    Raises:
        InputError: a setting that cannot be used, or a sample that is in all subsets or in none.
        UnsupportedError: training on some subsets diverges.
    """

    name = "datamodel"
    of_many = True

    subsets: int = 1024
    share: float = 0.9
    regression: Literal["lasso", "ridge"] = "lasso"
    penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._expect("lasso or ridge", self.regression in ("lasso", "ridge"), "regression")
        allowed = self.penalty is None or self.penalty > 0
        self._expect("a number above 0, or None to choose it", allowed, "penalty")
        least = 2 * PENALTY_FOLDS
        self._expect(f"{least} or more to fit and check a regression", self.subsets >= least, "subsets")

    def estimate(self, question: Question) -> Estimate:
        kept = random_subsets(question.workload.num_samples, self.subsets, self.share, self.seed)
        changes, drift = outcomes(question, kept, self.dtype, self.effort)
        scores = np.zeros(question.shape)
        explained = np.zeros(question.shape[:2])
        for k, seen in enumerate(met(question)):
            for q, change in enumerate(changes[k]):
                found, explained[k, q] = linear_fit(kept[:, seen], change, self.regression, self.penalty)
                scores[k, q, seen] = -found
                if np.ptp(change) and not found.any():
                    _log.warning(
                        "datamodel: %d subsets are too few to tell any sample from the others for %s in steps %s; take "
                        "more subsets, or regression='ridge'",
                        self.subsets,
                        question.queries[q].name,
                        question.windows[k],
                    )
        details = {"subsets": self.subsets, "share": self.share, "explained": explained.tolist(), "max_drift": drift}
        return Estimate(scores, str(self.dtype or "recorded"), details)


def linear_fit(
    kept: np.ndarray, change: np.ndarray, regression: str = "lasso", penalty: float | None = None
) -> tuple[np.ndarray, float]:
    """Coefficients ``[samples]`` of ``change [subsets]`` on ``kept [subsets, samples]``, with a constant; and the share
    of the variance that fits to the other folds predict.
    """
    from sklearn.linear_model import Lasso, LassoCV, Ridge, RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict

    scale = float(change.std())
    if scale == 0:
        return np.zeros(kept.shape[1]), 0.0
    # In units of its spread, because the solver's tolerance is absolute.
    masks, outcome = kept.astype(np.float64), (change - change.mean()) / scale
    folds = KFold(PENALTY_FOLDS, shuffle=True, random_state=0)
    if penalty is not None:
        # Lasso's penalty is in the units of the outcome, ridge's has none.
        penalty = penalty / scale if regression == "lasso" else penalty
    elif regression == "lasso":
        penalty = float(LassoCV(cv=folds, max_iter=10_000).fit(masks, outcome).alpha_)
    else:
        penalty = float(RidgeCV(np.logspace(-3, 5, 25)).fit(masks, outcome).alpha_)
    model: Any = Lasso(penalty, max_iter=10_000) if regression == "lasso" else Ridge(penalty)
    predicted = cross_val_predict(model, masks, outcome, cv=folds)
    coefficients = np.asarray(model.fit(masks, outcome).coef_) * scale
    return coefficients, 1 - float(((outcome - predicted) ** 2).mean())
