"""Expected influence: the mean of the derivative over random weights of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from scipy import stats

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.kind import Kind, courses, sweeps_along
from dit_mlflow.influence.query import Query
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.result import Influence
from dit_mlflow.influence.sweep import scores_under
from dit_mlflow.influence.window import Window
from dit_mlflow.progress import progress_bar
from dit_mlflow.replay import Trajectory
from dit_mlflow.told import logger_of
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state

_log = logger_of(__name__)

LONGEST = 3.0
"""Length of a draw's derivative, in medians over draws, above which it is left out."""


def expected_influence(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    draws: int = 16,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    power: float = 1.0,
) -> Influence:
    r"""Influence of every training sample when others are removed too: the mean of the derivative over random weights.

    With ``f(w)`` the query after the recorded training under sample weights ``w``, all else as recorded,

    .. math:: s_j = - E_w \Big[ \frac{\partial f}{\partial w_j}(w) \Big], \qquad w_i \sim U(0, 1) \text{ independent},

    estimated by ``draws`` derivatives in antithetic pairs ``w, 1 - w``. Each is exact (:func:`dit_mlflow.track` at
    these weights), their mean is not: it has the error of drawing, except for what of ``f`` is quadratic in ``w``,
    since a linear derivative has its mean at the middle of every pair.

    A sum of scores foretells the removal of **many** samples (about half: there the weights are as far from 1 as from
    0), where the derivative at ``w = 1`` may be an accident of one point of a kinked ``f``. For a few samples,
    ``track`` and :func:`dit_mlflow.leave_one_out` are often nearer.

    Other values of the game "train on a subset": where ``f`` is linear in each single weight, ``-s_j`` is exactly the
    Banzhaf value (Wang and Jia 2023, arXiv 2205.15466), the mean change of the query by ``j`` over random subsets of
    the others, and the coefficient of a linear datamodel (Ilyas et al. 2022, arXiv 2202.00622) fitted to all subsets.
    Elsewhere it differs from both, by how much is not known; both retrain on subsets, which this does not. In-Run Data
    Shapley (Wang et al. 2024, arXiv 2406.11011) adds up the values of single steps, each from the recorded state; here
    a draw's effects go through all later steps.

    Args:
        trajectory, workload, windows, kind, queries, dtype, memory_budget: as for :func:`dit_mlflow.track`, and there:
            where weights hold. All windows have the same draws, each along a training of its own.
        draws: how many, an even number.
        seed: of the weights.
        power: the weights are ``u ** power``, ``u ~ U(0, 1)``, in pairs ``u, 1 - u``: nearer to 1 for fewer removals.
            1/2 is Beta(2, 1), of mean 2/3.

    Returns:
        Scores ``[windows, queries, training samples]`` in units of the query. **Sign**: change of the query caused by
        removing the sample; for a loss, positive = helpful, negative = harmful. ``standard_error``: of the drawing
        alone (removal of a set is still not the sum of its scores), over pairs, from four draws on; with few pairs its
        intervals are wide. A draw whose derivative, as a vector over samples, is longer than three medians or not
        finite is left out with its partner, for that window and query: under Adam, one such draw can outweigh all
        others. ``metadata["draws_left_out"]`` counts them, the most for any window and query.

    Raises:
        InputError: a number of draws, a seed, or what :func:`dit_mlflow.track` refuses.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.
        UnsupportedError: the training cannot be differentiated here, or diverges under most draws.

    Cost: ``draws`` times a replay and a sweep (three to four trainings): for disjoint ``local`` windows over their
    steps, for each ``final`` window from its start to the end of training, for all ``cumulative`` ones once, with
    adjoints for each. One draw after the other. Memory: as ``track``, and ``draws / 2`` times the scores.
    """
    check_draws(draws, seed)
    if not 0 < power < np.inf:
        raise InputError(f"power={power!r}; expected a positive number: weights are u ** power")
    question = Question.of(trajectory, workload, windows, kind, queries)
    uniform = np.random.default_rng(seed).random((draws // 2, workload.num_samples))
    pairs = torch.from_numpy(np.stack([uniform, 1 - uniform], axis=1) ** power)
    scores, errors = np.zeros(question.shape), np.full(question.shape, np.nan)
    counted = np.zeros(question.shape[:2], dtype=np.int64)
    trainings = courses(question.kind, question.windows, trajectory.num_steps)
    num_windows, num_queries, _ = question.shape
    steps = sum(course.stop - course.start for course in trainings)
    with preserved_random_state(), progress_bar(draws * steps * num_queries, "expected influence") as progress:
        engine = Engine(trajectory.replay(workload, dtype), memory_budget, shown=False)
        # Course by course, so that all draws set out from a state that is rebuilt once.
        for course in trainings:
            own = sorted({window for _, window, _ in course.measures})
            for part in engine.parts(num_queries, sweeps_along([course]), num_windows + len(own) * draws // 2):
                asked = question.queries[part]
                means, lengths = [], []
                for pair in pairs:
                    found = np.stack([scores_under(engine, asked, course, num_windows, w)[own] for w in pair])
                    means.append(found.mean(axis=0))
                    lengths.append(np.linalg.norm(found, axis=-1))
                    progress.update(2 * (course.stop - course.start) * len(asked))
                scores[own, part], errors[own, part], counted[own, part] = over_pairs(
                    np.stack(means), np.stack(lengths)
                )
    if not counted.all():
        window = windows[int(np.argwhere(counted == 0)[0, 0])]
        raise UnsupportedError(
            f"window {window}: under random sample weights the derivative is not finite in any pair of draws, as where "
            "training diverges; use track, which needs the recorded training alone, or shorter local windows"
        )
    left_out = draws - 2 * int(counted.min())
    if left_out:
        _log.warning(
            "expected influence: for some window and query, %d of %d draws are left out: their derivatives, or their "
            "partners', are longer than %g medians, or not finite",
            left_out,
            draws,
            LONGEST,
        )
    return question.answer(
        scores,
        "expected",
        str(dtype or "recorded"),
        standard_error=None if np.isnan(errors).all() else errors,
        degrees_of_freedom=counted - 1,
        draws=int(draws),
        seed=int(seed),
        draws_left_out=left_out,
        **engine.details,
    )


def check_draws(draws: Any, seed: Any) -> None:
    """Raise :class:`InputError` unless they are pairs."""
    if not isinstance(draws, Integral) or draws < 2 or draws % 2 or not isinstance(seed, Integral) or seed < 0:
        raise InputError(
            f"draws={draws!r}, seed={seed!r}; expected an even number of draws, 2 or more (they come in pairs w, "
            "1 - w, and a standard error takes two pairs), and a seed of 0 or more"
        )


def over_pairs(means: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over pairs of draws, without those that are too long.

    Args:
        means: of each pair's derivatives, ``[pairs, windows, queries, samples]``.
        lengths: of each draw's derivative, ``[pairs, 2, windows, queries]``.

    Returns:
        Means and their standard errors ``[windows, queries, samples]``, and how many pairs they are of, ``[windows,
        queries]``: NaN for no pair, and the error for one.
    """
    scores, errors = np.full((2, *means.shape[1:]), np.nan)
    counted = np.zeros(means.shape[1:3], dtype=np.int64)
    for window, query in np.ndindex(*counted.shape):
        length = lengths[:, :, window, query]
        finite = np.isfinite(length)
        median = np.median(length[finite]) if finite.any() else 0.0
        # Where most draws have no derivative at all, a length is no reason.
        kept = (finite & ((length <= LONGEST * median) | (median == 0))).all(axis=1)
        own = means[kept, window, query]
        counted[window, query] = len(own)
        if len(own):
            scores[window, query] = own.mean(axis=0)
        if len(own) > 1:
            errors[window, query] = stats.sem(own, axis=0)
    return scores, errors, counted
