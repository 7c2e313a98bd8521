"""Shapley values of the training samples, by truncated Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dit_mlflow.errors import InputError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, RetrainingMethod
from dit_mlflow.retraining.subsets import met, outcomes

ROUNDS = 16
"""Parts in which orders are followed; an order truncated in one part needs no training in the next."""


@dataclass(frozen=True)
class DataShapley(RetrainingMethod):
    """Truncated Monte Carlo Data Shapley (Ghorbani and Zou 2019, arXiv 1904.02868, algorithm 1).

    ::

        score_j = mean over random orders of  q(samples before j) - q(samples before j, and j)

    so that the scores sum to the change of the query when all samples are removed. ``q`` takes the place of the paper's
    performance, with the opposite sign: positive = removal raises the query. Removal is weight 0 in the recorded run.
    An order is truncated once the query has stayed within ``tolerance`` of the recorded one for ``patience`` samples in
    a row; the samples left score 0.

    Cost: up to ``retrainings`` (for each set of windows that ``leave_one_out`` needs a training for). Few orders make
    noise: ``standard_errors`` in the metadata is the root mean square over samples for each window and query. The
    question is not that of leave-one-out: half of a sample's value is what it adds to less than half of the data. On
    ``projects/mnist`` (256 samples, 10 orders) it finds nearly all damaged samples, and its Spearman correlation with
    leave-one-out is 0.3.

    Attributes:
        retrainings: the budget; there are ``retrainings // n`` orders of the ``n`` samples.
        tolerance: as a share of the change that removing all samples makes; 0: no truncation.
        patience: samples in a row within the tolerance. With 1, as in the paper, a query that only passes the recorded
            value ends the order.
        seed: of the orders.
        dtype, effort: of the retraining.

    Raises:
        InputError: a setting that cannot be used, or a budget for fewer than two orders.
        UnsupportedError: training on some subsets diverges.
    """

    name = "data_shapley"
    of_many = True

    retrainings: int = 2560
    tolerance: float = 0.01
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = self.tolerance >= 0 and self.patience >= 1 and self.seed >= 0
        self._expect("0 or more, 1 sample or more, and 0 or more", allowed, "tolerance", "patience", "seed")

    def estimate(self, question: Question) -> Estimate:
        n = question.workload.num_samples
        count = self.retrainings // n
        if count < 2:
            raise InputError(
                f"retrainings={self.retrainings} are {count} order{'s' * (count != 1)} of {n} samples; expected 2 "
                f"orders or more ({2 * n} retrainings), of which the scores are means. For as many samples "
                "downsampling and datamodel need fewer"
            )
        generator = np.random.default_rng(self.seed)
        orders = np.stack([generator.permutation(n) for _ in range(count)])
        drifts = []

        def changes_of(kept: np.ndarray) -> np.ndarray:
            found, drift = outcomes(question, kept, self.dtype, self.effort)
            drifts.append(drift)
            return found

        values = shapley_values(changes_of, orders, self.tolerance, self.patience)
        values.scores[~np.broadcast_to(met(question)[:, None], values.scores.shape)] = 0
        details = {
            "orders": count,
            "truncated": values.truncated.tolist(),
            "standard_errors": np.sqrt((values.errors**2).mean(axis=-1)).tolist(),
            "max_drift": max(drifts),
        }
        return Estimate(values.scores, str(self.dtype or "recorded"), details)


@dataclass(frozen=True, eq=False)
class ShapleyValues:
    """Means over orders ``scores``, their standard errors ``errors`` (both ``[windows, queries, samples]``), and the
    share of positions in the orders that was ``truncated``, ``[windows, queries]``."""

    scores: np.ndarray
    errors: np.ndarray
    truncated: np.ndarray


def shapley_values(
    changes_of: Callable[[np.ndarray], np.ndarray], orders: np.ndarray, tolerance: float, patience: int
) -> ShapleyValues:
    """Marginal changes along orders; each window and query is truncated by itself.

    Args:
        changes_of: subsets as bool ``[R, samples]`` -> changes against all samples, ``[windows, queries, R]``.
        orders: ``[orders, samples]``.
        tolerance, patience: see :class:`DataShapley`.
    """
    count, n = orders.shape
    nothing = changes_of(np.zeros((1, n), dtype=bool))
    near = tolerance * np.abs(nothing)
    before = np.broadcast_to(nothing, (*nothing.shape[:2], count)).copy()
    calm = np.zeros(before.shape, dtype=int)
    total, squares = (np.zeros((*nothing.shape[:2], n)) for _ in range(2))
    followed = np.zeros(nothing.shape[:2])
    # The place of each sample in each order.
    place = np.argsort(orders, axis=1)
    length = -(-n // ROUNDS)
    for first in range(0, n, length):
        going = np.flatnonzero((calm < patience).any(axis=(0, 1)))
        if len(going) == 0:
            break
        last = min(first + length, n)
        kept = np.concatenate([place[going] <= position for position in range(first, last)])
        found = changes_of(kept).reshape(*nothing.shape[:2], last - first, len(going))
        for position in range(first, last):
            after = found[:, :, position - first]
            running = calm[:, :, going] < patience
            marginal = np.where(running, before[:, :, going] - after, 0)
            for column, sample in enumerate(orders[going, position]):
                total[:, :, sample] += marginal[:, :, column]
                squares[:, :, sample] += marginal[:, :, column] ** 2
            followed += running.sum(axis=2)
            before[:, :, going] = after
            within = np.abs(after) < near
            # A truncated one stays truncated.
            calm[:, :, going] = np.where(running, np.where(within, calm[:, :, going] + 1, 0), patience)
    scores = total / count
    variance = np.maximum(squares / count - scores**2, 0) * count / (count - 1)
    return ShapleyValues(scores, np.sqrt(variance / count), 1 - followed / (count * n))
