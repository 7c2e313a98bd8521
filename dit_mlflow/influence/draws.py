"""Expected influence: the mean of the derivative over random weights of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.kind import Kind, courses, sweeps
from dit_mlflow.influence.query import Query, refuse_not_finite
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.result import Influence
from dit_mlflow.influence.weighted_sweeps import WeightedSweeps
from dit_mlflow.influence.window import Window
from dit_mlflow.progress import progress_bar
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.compiled_step import Compile, check_compile
from dit_mlflow.told import logger_of
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state

_log = logger_of(__name__)

DRAWS_AGREE = "draws_agree"
"""The key of :func:`agreement` in a result's metadata."""

KINKED = 0.5
"""Cosine of partners' derivatives, median over pairs, below which scores foretell little: see docs/fidelity.md."""

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
    compile: Compile = "auto",
) -> Influence:
    r"""Influence of every training sample when others are removed too: the mean of the derivative over random weights.

    With ``f(w)`` the query after the recorded training under sample weights ``w``, all else as recorded,

    .. math:: s_j = - E_w \Big[ \frac{\partial f}{\partial w_j}(w) \Big], \qquad w_i \sim U(0, 1) \text{ independent},

    estimated by ``draws`` derivatives in antithetic pairs ``w, 1 - w``. Each derivative is exact
    (:func:`dit_mlflow.track` at these weights); their mean has the error of drawing, except from the part of ``f`` that
    is quadratic in ``w``: its derivative is linear, so that every pair has the exact mean.

    A sum of scores predicts the removal of **many** samples (about half, where weights are as far from 1 as from 0).
    The derivative at ``w = 1`` depends on one point of ``f``, which may have kinks. For the removal of a few samples,
    ``track`` and :func:`dit_mlflow.leave_one_out` are often closer.

    Related values of the game "train on a subset": where ``f`` is linear in each single weight, ``-s_j`` is exactly the
    Banzhaf value (Wang and Jia 2023, arXiv 2205.15466), the mean change of the query by ``j`` over random subsets of
    the others, and the coefficient of a linear datamodel (Ilyas et al. 2022, arXiv 2202.00622) fitted to all subsets.
    Elsewhere it differs from both by an unknown amount; both retrain on subsets, which this does not. In-Run Data
    Shapley (Wang et al. 2024, arXiv 2406.11011) adds up the values of single steps, each from the recorded state; here
    a draw's effects go through all later steps.

    Args:
        trajectory, workload, windows, kind, queries, dtype, memory_budget, compile: as for
            :func:`dit_mlflow.track`, whose ``weights`` say in which steps the drawn weights hold. All windows share the
            draws; each window's draws have trainings of their own.
        draws: their number, even.
        seed: of the weights.
        power: the weights are ``u ** power``, ``u ~ U(0, 1)``, in pairs ``u, 1 - u``: nearer to 1 for fewer removals.
            1/2 is Beta(2, 1), of mean 2/3.

    Returns:
        Scores ``[windows, queries, training samples]`` in units of the query. **Sign**: change of the query caused by
        removing the sample; for a loss, positive = helpful, negative = harmful. ``standard_error``, from four draws on:
        the error of drawing alone, over pairs (the removal of a set is still not the sum of its scores); with few pairs
        its intervals are wide. Under Adam, one draw can outweigh all others; so a draw whose derivative, as a vector
        over samples, is not finite or longer than three medians is left out with its partner, for that window and
        query. ``metadata["draws_left_out"]`` is the largest number of them for any window and query.
        ``metadata["draws_agree"]`` is the cosine of the derivatives of partners (median over pairs; ``None`` = one of
        them is 0), by window and query: 1 where the derivative does not depend on the weights. Below :data:`KINKED`, a
        warning says so.

    Raises:
        InputError: ``draws``, ``seed`` or ``power`` cannot be used, or as :func:`dit_mlflow.track`.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.
        UnsupportedError: a step or a query cannot be differentiated, or training diverges in every pair of draws.

    Cost: ``draws`` times a replay and a sweep (three to four trainings): over the steps of disjoint ``local`` windows;
    from each ``final`` window's start to the end of training; once for all ``cumulative`` windows, with adjoints for
    each. Where a timed step says that it is faster (small networks), draws run side by side under ``torch.func.vmap``,
    as many as ``memory_budget`` holds; all 8 then cost about as much as two or three. Memory: as ``track``, and
    ``draws / 2`` times the scores.
    """
    check_draws(draws, seed)
    check_compile(compile)
    if not 0 < power < np.inf:
        raise InputError(f"power={power!r}; expected a positive number: weights are u ** power")
    question = Question.of(trajectory, workload, windows, kind, queries)
    with preserved_random_state():
        engine = Engine(trajectory.replay(workload, dtype), memory_budget, shown=False, compile=compile)
        (found,) = expected_over(question, engine, [Draws(draws, seed, power)], str(dtype or "recorded"))
    warn_of_kinks(found)
    return found


@dataclass(frozen=True)
class Draws:
    """``count`` vectors of weights ``u ** power``, ``u ~ U(0, 1)``, in pairs ``u, 1 - u``."""

    count: int
    seed: int
    power: float = 1.0

    def weights(self, samples: int) -> Tensor:
        """``[count, samples]``, partner after partner."""
        uniform = np.random.default_rng(self.seed).random((self.count // 2, samples))
        pairs = np.stack([uniform, 1 - uniform], axis=1) ** self.power
        return torch.from_numpy(pairs.reshape(self.count, samples))


def expected_over(question: Question, engine: Engine, of: Sequence[Draws], dtype: str) -> list[Influence]:
    """:func:`expected_influence` for each set of draws; all draws may run side by side."""
    samples, steps = question.workload.num_samples, question.trajectory.num_steps
    weights = torch.cat([draws.weights(samples) for draws in of])
    firsts = np.cumsum([0, *(draws.count // 2 for draws in of)])
    of_pairs = [slice(a, b) for a, b in pairwise(firsts.tolist())]
    scores, errors = np.zeros((len(of), *question.shape)), np.full((len(of), *question.shape), np.nan)
    counted = np.zeros((len(of), *question.shape[:2]), dtype=np.int64)
    cosines = np.zeros((len(of), *question.shape[:2]))
    trainings = courses(question.kind, question.windows, steps)
    num_windows, num_queries, _ = question.shape
    swept = WeightedSweeps(engine)
    total = sum(course.stop - course.start for course in trainings) * num_queries * len(weights)
    with progress_bar(total, "expected influence") as progress:
        # Course by course, so that the state from which all draws start is rebuilt once.
        for course in trainings:
            own = sorted({window for _, window, _ in course.measures})
            for part in engine.parts(num_queries, sweeps([course]), num_windows + len(own) * len(weights) // 2):
                asked = question.queries[part]
                means, lengths = [], []
                found: list[np.ndarray] = []
                for one in swept(asked, course, num_windows, weights):
                    found.append(one[own])
                    progress.update((course.stop - course.start) * len(asked))
                    if len(found) == 2:
                        pair = np.stack(found)
                        means.append(pair.mean(axis=0))
                        lengths.append(np.linalg.norm(pair, axis=-1))
                        found = []
                for number, pairs in enumerate(of_pairs):
                    mean, length = np.stack(means[pairs]), np.stack(lengths[pairs])
                    scores[number, own, part], errors[number, own, part], counted[number, own, part] = over_pairs(
                        mean, length
                    )
                    cosines[number, own, part] = agreement(mean, length)
    if not counted.all():
        _refuse_not_finite(question, engine)
    return [
        _answer(
            question,
            draws,
            scores[number],
            errors[number],
            counted[number],
            dtype,
            {**engine.details, DRAWS_AGREE: _by_window(question, cosines[number])},
        )
        for number, draws in enumerate(of)
    ]


def _refuse_not_finite(question: Question, engine: Engine) -> None:
    """Raise if it is the recorded training, or a query there, that is not finite at some window's end."""
    dynamics, trajectory = engine.replay.dynamics, question.trajectory
    for t in sorted({window.end for window in question.windows}):
        state = engine.replay.recorded(t)
        for query in question.queries:
            with torch.no_grad():
                value = dynamics.evaluate(state.parameters, state.buffers, query)
            refuse_not_finite(query, value, state, t, dynamics, trajectory)


def _answer(
    question: Question,
    draws: Draws,
    scores: np.ndarray,
    errors: np.ndarray,
    counted: np.ndarray,
    dtype: str,
    details: dict[str, Any],
) -> Influence:
    """The result, unless no pair counts for some window and query; a warning where some pairs do not."""
    if not counted.all():
        window = question.windows[int(np.argwhere(counted == 0)[0, 0])]
        raise UnsupportedError(
            f"window {window}: under random sample weights the derivative is not finite in any pair of draws (training "
            "may diverge); use track, which needs the recorded training alone, or shorter local windows"
        )
    left_out = draws.count - 2 * int(counted.min())
    if left_out:
        _log.warning(
            "expected influence: for some window and query, %d of %d draws are left out, because their derivatives or "
            "their partners' are longer than %g medians, or not finite",
            left_out,
            draws.count,
            LONGEST,
        )
    return question.answer(
        scores,
        "expected",
        dtype,
        standard_error=None if np.isnan(errors).all() else errors,
        degrees_of_freedom=counted - 1,
        draws=int(draws.count),
        seed=int(draws.seed),
        draws_left_out=left_out,
        **details,
    )


def _by_window(question: Question, cosines: np.ndarray) -> dict[str, list[float | None]]:
    found = zip(question.windows, cosines.tolist(), strict=True)
    return {str(window): [None if np.isnan(cosine) else cosine for cosine in row] for window, row in found}


def agreement(means: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The cosine of partners' derivatives, median over finite pairs, ``[windows, queries]``; NaN = one is 0.

    Arguments as for :func:`over_pairs`: ``|a + b|^2 = |a|^2 + |b|^2 + 2 a b``.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        inner = 2 * np.square(means).sum(axis=-1) - np.square(lengths).sum(axis=1) / 2
        cosine = inner / lengths.prod(axis=1)
    return np.array(
        [
            [np.median(own[np.isfinite(own)]) if np.isfinite(own).any() else np.nan for own in of_queries]
            for of_queries in np.moveaxis(cosine, 0, -1)
        ]
    )


def kinked(found: Influence) -> list[Window]:
    """The windows in which, for the first query, opposite draws of weights disagree: see :data:`KINKED`."""
    agree = found.metadata.get(DRAWS_AGREE, {})
    cosines = ((window, agree.get(str(window), [None])[0]) for window in found.windows)
    return [window for window, cosine in cosines if cosine is not None and cosine < KINKED]


def warn_of_kinks(found: Influence) -> None:
    if windows := kinked(found):
        _log.warning(
            "under opposite random sample weights (w and 1 - w) the derivatives are unlike, over steps %s: training is "
            "too kinked there to foretell removals well. Long windows fail first; ask for shorter local ones",
            ", ".join(map(str, windows)),
        )


def check_draws(draws: Any, seed: Any) -> None:
    """Raise :class:`InputError` unless ``draws`` is even and positive, and ``seed`` is not negative."""
    if not isinstance(draws, Integral) or draws < 2 or draws % 2 or not isinstance(seed, Integral) or seed < 0:
        raise InputError(
            f"draws={draws!r}, seed={seed!r}; expected an even number of draws, 2 or more (they come in pairs w, "
            "1 - w, and a standard error needs two pairs), and a seed of 0 or more"
        )


def over_pairs(means: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over pairs of draws, without pairs of which one is too long.

    Args:
        means: of each pair's derivatives, ``[pairs, windows, queries, samples]``.
        lengths: of each draw's derivative, ``[pairs, 2, windows, queries]``.

    Returns:
        Means and their standard errors, ``[windows, queries, samples]``, and the number of pairs kept, ``[windows,
        queries]``. Means are NaN where no pair is kept, errors where fewer than two are.
    """
    scores, errors = np.full((2, *means.shape[1:]), np.nan)
    counted = np.zeros(means.shape[1:3], dtype=np.int64)
    for window, query in np.ndindex(*counted.shape):
        length = lengths[:, :, window, query]
        finite = np.isfinite(length)
        median = np.median(length[finite]) if finite.any() else 0.0
        # If the median is 0, most derivatives are 0, and any other would be too long.
        kept = (finite & ((length <= LONGEST * median) | (median == 0))).all(axis=1)
        own = means[kept, window, query]
        counted[window, query] = len(own)
        if len(own):
            scores[window, query] = own.mean(axis=0)
        if len(own) > 1:
            errors[window, query] = stats.sem(own, axis=0)
    return scores, errors, counted
