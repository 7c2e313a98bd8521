"""Removal influence: what taking a share of the samples away does, calibrated by retraining without random shares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import optimize, special, stats

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence import Influence, Kind, Query, Window
from dit_mlflow.influence.draws import DRAWS_AGREE, Draws, expected_over, kinked, warn_of_kinks
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.sweep import tracked
from dit_mlflow.methods.dit import OF_SWEEP, Dit
from dit_mlflow.methods.method import Estimate, Method, RetrainingMethod
from dit_mlflow.methods.tracin import TracIn
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.compiled_step import Compile, check_compile
from dit_mlflow.retraining import Effort, leave_one_out, train_on_subsets
from dit_mlflow.told import logger_of
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state

_log = logger_of(__name__)

FEWEST_TRAININGS = 8
"""Budget below which a blend cannot be fitted and judged."""

FOLDS = 4
"""Parts of the bank, each foretold by the blend that the others choose."""

RESAMPLES = 200
"""Of the bank, for intervals."""

BETA = 0.5
"""Power of the draws that stand for few removals: Beta(2, 1)."""


def removal_influence(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    removed: float = 0.1,
    trainings: int = 16,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    effort: Effort | None = None,
    exact: Influence | None = None,
    compile: Compile = "auto",
) -> Influence:
    r"""What taking samples away does to the query, when a share of them goes.

    No single score foretells removals everywhere: the derivative at weight 1 (``track``) is best for a few samples and
    smooth training, its mean over random weights (``expected_influence``) for many samples and kinked training, and
    which is which depends on data, network and optimizer. So a **bank** of retrainings without random shares of the
    samples chooses, for each window and query:

    .. math:: s = \sum_k c_k s^{(k)}, \qquad
              c = \arg\min_{c \ge 0, a} \sum_S \Big( f(1 - 1_S) - f(1) - a - \sum_{j \in S} s_j \Big)^2

    with ``S`` the sets that were left out, and ``s^(k)``: the derivative at 1, its means over weights ``U(0, 1)`` and
    ``Beta(2, 1)``, and leave-one-out where it is known or the budget holds a training for each sample. The constant
    ``a``, what all removals of that share have in common, is no sample's. The blend is calibrated: a sum of its scores
    foretells size as well as order.

    In windows where opposite draws disagree (``metadata["draws_agree"]`` below 0.5, as over whole runs under AdamW), a
    few draws are little more than noise. There the mean over ``U(0, 1)`` is taken over ``trainings`` draws, and TracIn
    is one more of the ``s^(k)``.

    The bank is that of datamodels (Ilyas et al. 2022, arXiv 2202.00622), which fit all scores to it; a few dozen
    retrainings are far too few for that, and enough for a handful of coefficients.

    Args:
        trajectory, workload, windows, kind, queries, dtype, memory_budget, compile: as for :func:`dit_mlflow.track`.
        removed: the share of the training samples that one thinks of taking away, two or more and not all.
        trainings: the budget: a quarter of it draws of each kind, and a bank of twice as many retrainings, which take
            the time of a few where they run side by side.
        seed: of draws and bank.
        effort: of the retrainings, see :func:`dit_mlflow.leave_one_out`.
        exact: leave-one-out of the same windows, kind and queries, where it is known.

    Returns:
        Scores ``[windows, queries, training samples]`` in units of the query. **Sign**: change of the query caused by
        removing the sample, when a share ``removed`` goes; for a loss, positive = helpful, negative = harmful.
        ``standard_error``: of drawing weights (pooled over samples: Smyth 2004, doi 10.2202/1544-6115.1027) and of the
        coefficients (bootstrap over the bank); that a set's effect is not the sum of its members' is not in it.
        ``metadata["bank"]`` says, for each window (by its name) and query, how well the blend foretells retrainings
        that did not choose it: ``order`` (LDS: Spearman), ``size`` (slope of real on foretold change; 1 is right),
        their intervals of 95 %, the coefficients, and the constant ``a``: the change by leaving out a random share is
        foretold by ``a`` and the sum of the scores in it. ``metadata["draws_agree"]``, and a warning before the
        retrainings where training is too kinked: see :func:`dit_mlflow.expected_influence`.

    Raises:
        InputError: a share or a budget that cannot be used, and what :func:`dit_mlflow.track` refuses.
        UnsupportedError: see :func:`dit_mlflow.track`; or too few of the retrainings end with a finite query.

    Cost: ``1 + trainings / 2`` sweeps along a replay of their own, ``trainings`` more where opposite draws disagree,
    and ``2 * trainings`` retrainings. ``metadata["spent"]`` says how many.
    """
    given = (trajectory, workload, windows, kind, queries)
    (found,) = removal_curve(*given, [removed], trainings, seed, dtype, memory_budget, effort, exact, compile)
    return found


def removal_curve(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind,
    queries: Sequence[Query] | None,
    shares: Sequence[float],
    trainings: int = 16,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    effort: Effort | None = None,
    exact: Influence | None = None,
    compile: Compile = "auto",
) -> list[Influence]:
    """:func:`removal_influence` at each of ``shares``: their sweeps are the same, each has a bank of its own."""
    for removed in shares:
        check_removal(workload.num_samples, removed, trainings, seed)
    check_compile(compile)
    question = Question.of(trajectory, workload, windows, kind, queries)
    given = (trajectory, workload, question.windows, question.kind, question.queries)
    draws = 2 * max(1, trainings // 8)
    with preserved_random_state():
        engine = Engine(trajectory.replay(workload, dtype), memory_budget, compile=compile)
        named = str(dtype or "recorded")
        kinds = [Draws(draws, seed), Draws(draws, seed + 1, BETA)]
        names = ("dit", "uniform", "beta")
        found = [tracked(question, engine, named), *expected_over(question, engine, kinds, named)]
        parts = dict(zip(names, found, strict=True))
        warn_of_kinks(parts["uniform"])
        few, disagreeing = parts["uniform"], kinked(parts["uniform"])
        many = 4 * draws if disagreeing else 0
        if disagreeing:
            parts |= _where_kinked(replace(question, windows=tuple(disagreeing)), engine, few, Draws(many, seed), named)
    if exact is not None:
        _check_exact(exact, question)
        parts["leave_one_out"] = exact.select(list(question.windows))
    elif trainings >= workload.num_samples:
        parts["leave_one_out"] = leave_one_out(*given, dtype=dtype, effort=effort)
    spent = {"sweeps": 1 + 2 * draws + many, "retrainings": 2 * trainings}
    told = {key: value for key, value in few.metadata.items() if key in (DRAWS_AGREE, "derivative", "compile")}
    common = {"trainings": int(trainings), "seed": int(seed), "spent": spent, **told}
    return [_blended(question, parts, removed, 2 * trainings, seed, dtype, effort, common) for removed in shares]


def _where_kinked(question: Question, engine: Engine, few: Influence, more: Draws, dtype: str) -> dict[str, Influence]:
    """For the windows of ``question``: the mean over more draws in place of ``few``, and TracIn. NaN: other windows."""
    found: dict[str, Influence] = {}
    with suppress(UnsupportedError):  # Training may diverge in every pair; the few stay then.
        (many,) = expected_over(question, engine, [more], dtype)
        found["uniform"] = _put(few, many)
    with suppress(UnsupportedError):  # It needs a step that is a loss, then an optimizer.
        effects = TracIn()(question.trajectory, question.workload, question.windows, queries=question.queries)
        found["tracin"] = _put(replace(few, scores=np.full_like(few.scores, np.nan), standard_error=None), effects)
    return found


def _put(into: Influence, part: Influence) -> Influence:
    """``into``, with scores and errors of ``part`` in its windows."""
    places = [into.windows.index(window) for window in part.windows]

    def put(own: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        found = own.copy()
        found[places] = own[places] if values is None else values
        return found

    errors, freedom = into.standard_error, into.degrees_of_freedom
    return replace(
        into,
        scores=put(into.scores, part.scores),
        standard_error=None if errors is None else put(errors, part.standard_error),
        degrees_of_freedom=None if freedom is None else put(freedom, part.degrees_of_freedom),
    )


def _blended(
    question: Question,
    parts: dict[str, Influence],
    removed: float,
    retrainings: int,
    seed: int,
    dtype: torch.dtype | None,
    effort: Effort | None,
    common: dict[str, Any],
) -> Influence:
    """The blend of the parts that a bank of retrainings without a share of the samples chooses."""
    given = (question.trajectory, question.workload, question.windows, question.kind, question.queries)
    bank = train_on_subsets(*given, subsets=retrainings, share=1 - removed, seed=seed, dtype=dtype, effort=effort)
    scores, errors = np.zeros(question.shape), np.zeros(question.shape)
    freedom = np.zeros(question.shape[:2])
    judged: dict[str, list[dict[str, Any]]] = {str(window): [] for window in question.windows}
    for window, query in np.ndindex(*question.shape[:2]):
        blend = Blend.fitted(
            {
                name: part.scores[window, query]
                for name, part in parts.items()
                if np.isfinite(part.scores[window, query]).all()
            },
            {name: _pooled(part, window, query) for name, part in parts.items()},
            ~bank.kept,
            bank.changes[window, query],
            seed,
        )
        scores[window, query], errors[window, query] = blend.scores, blend.errors
        freedom[window, query] = blend.freedom
        judged[str(question.windows[window])].append(blend.judged)
    return question.answer(
        scores,
        "removal",
        str(dtype or "recorded"),
        standard_error=errors,
        degrees_of_freedom=freedom,
        removed=float(removed),
        **common,
        bank=judged,
        max_drift=max(float(part.metadata.get("max_drift", 0.0)) for part in parts.values()),
    )


@dataclass(frozen=True, eq=False)
class Blend:
    """Scores chosen by a bank, for one window and query.

    Attributes:
        scores, errors: ``[samples]``.
        freedom: degrees of freedom of the errors.
        judged: JSON values: ``order``, ``size``, their intervals, ``coefficients``, ``constant``.
    """

    scores: np.ndarray
    errors: np.ndarray
    freedom: float
    judged: dict[str, Any]

    @classmethod
    def fitted(
        cls,
        parts: dict[str, np.ndarray],
        pooled: dict[str, tuple[np.ndarray, float]],
        gone: np.ndarray,
        changes: np.ndarray,
        seed: int,
    ) -> Blend:
        """The blend of ``parts [samples]`` that foretells ``changes [bank]`` where ``gone [bank, samples]`` are absent.

        Args:
            pooled: standard errors ``[samples]`` of the parts, and their degrees of freedom.

        Raises:
            UnsupportedError: fewer than :data:`FEWEST_TRAININGS` of the changes are finite.
        """
        finite = np.isfinite(changes)
        if finite.sum() < FEWEST_TRAININGS:
            raise UnsupportedError(
                f"{int((~finite).sum())} of {len(changes)} trainings without a share of the samples gave a query that "
                "is not a finite number; take a smaller share (removed), or use track"
            )
        gone, changes = gone[finite], changes[finite]
        stacked = np.stack(list(parts.values()))
        sums = gone @ stacked.T
        coefficients = _fit(sums, changes)
        random = np.random.default_rng(seed)
        drawn = random.integers(len(changes), size=(RESAMPLES, len(changes)))
        fits = np.array([_fit(sums[rows], changes[rows]) for rows in drawn])
        of_fit = (fits @ stacked).std(axis=0)
        of_draws = [c * pooled[name][0] for c, name in zip(coefficients, parts, strict=True)]
        used = [pooled[name][1] for c, name in zip(coefficients, parts, strict=True) if c > 0]
        return cls(
            coefficients @ stacked,
            np.sqrt(of_fit**2 + np.sum(np.square(of_draws), axis=0)),
            min([len(changes) - len(parts) - 1.0, *used]),
            {
                "coefficients": dict(zip(parts, coefficients.tolist(), strict=True)),
                "constant": float(changes.mean() - sums.mean(axis=0) @ coefficients),
                **_judged(_foretold(sums, changes), changes, drawn),
            },
        )


def _fit(sums: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Nonnegative least squares with a free constant, of ``changes [bank]`` on ``sums [bank, parts]``."""
    centred = sums - sums.mean(axis=0)
    scale = centred.std(axis=0)
    scale[scale == 0] = np.inf
    found: np.ndarray = optimize.nnls(centred / scale, changes - changes.mean())[0] / scale
    return found


def _foretold(sums: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Each change by the fit to the other folds, ``[bank]``."""
    fold = np.arange(len(changes)) % FOLDS
    found = np.empty(len(changes))
    for left in range(FOLDS):
        of, rest = fold == left, fold != left
        found[of] = changes[rest].mean() + (sums[of] - sums[rest].mean(axis=0)) @ _fit(sums[rest], changes[rest])
    return found


def _judged(foretold: np.ndarray, changes: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """LDS and slope with intervals over resamples ``drawn [resamples, bank]``; ``None`` where all changes are equal."""
    rows = np.vstack([np.arange(len(changes)), drawn])
    x, y = foretold[rows], changes[rows]
    known = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    if not known[0]:
        return dict.fromkeys(("order", "order_interval", "size", "size_interval"))
    figures = {"order": _slopes(_standardised(x[known]), _standardised(y[known])), "size": _slopes(x[known], y[known])}
    return {
        key: value
        for name, found in figures.items()
        for key, value in (
            (name, float(found[0])),
            (f"{name}_interval", np.quantile(found[1:], [0.025, 0.975]).tolist()),
        )
    }


def _standardised(values: np.ndarray) -> np.ndarray:
    """Ranks of each row, of which a slope is Spearman's correlation."""
    ranks = stats.rankdata(values, axis=1)
    scaled: np.ndarray = ranks / ranks.std(axis=1, keepdims=True)
    return scaled


def _slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of ``y`` on ``x``, row by row."""
    centred = x - x.mean(axis=1, keepdims=True)
    found: np.ndarray = (centred * y).sum(axis=1) / np.square(centred).sum(axis=1)
    return found


def _pooled(part: Influence, window: int, query: int) -> tuple[np.ndarray, float]:
    """Standard errors ``[samples]``, each drawn towards what all have in common, and their degrees of freedom.

    A variance of two or three pairs of draws says little; by the prior that all samples' variances suggest (Smyth 2004,
    equations 7 to 10) it says more.
    """
    if part.standard_error is None or part.degrees_of_freedom is None:
        return np.zeros(part.scores.shape[2]), np.inf
    variance = np.square(part.standard_error[window, query])
    own = float(part.degrees_of_freedom[window, query])
    known = variance > 0
    if own < 1 or known.sum() < 2:
        return np.sqrt(np.nan_to_num(variance)), max(own, 1.0)
    centred = np.log(variance[known]) - special.digamma(own / 2) + np.log(own / 2)
    spread = centred.var(ddof=1) - special.polygamma(1, own / 2)
    prior = 2 * _inverse_trigamma(spread) if spread > 0 else np.inf
    if np.isinf(prior):
        return np.where(known, np.exp(centred.mean() / 2), 0.0), np.inf
    common = np.exp(centred.mean() + special.digamma(prior / 2) - np.log(prior / 2))
    moderated = (prior * common + own * variance) / (prior + own)
    return np.where(known, np.sqrt(moderated), 0.0), prior + own


def _inverse_trigamma(value: float) -> float:
    return float(optimize.brentq(lambda x: special.polygamma(1, x) - value, 1e-8, 1e8))


def _check_exact(exact: Influence, question: Question) -> None:
    asked = tuple(query.name for query in question.queries)
    missing = [window for window in question.windows if window not in exact.windows]
    others = not np.array_equal(exact.samples, np.arange(question.workload.num_samples))
    if missing or others or exact.kind != question.kind or exact.queries != asked:
        raise InputError(
            f"exact scores of kind {exact.kind!r}, queries {list(exact.queries)}, windows "
            f"{', '.join(map(str, exact.windows))}, of {len(exact.samples)} samples; expected what is asked for: kind "
            f"{question.kind!r}, queries {list(asked)}, windows {', '.join(map(str, question.windows))}, of "
            f"{question.workload.num_samples}"
        )


def check_removal(samples: int, removed: Any, trainings: Any, seed: Any) -> None:
    """Raise :class:`InputError` for a share or a budget that cannot be used."""
    whole = isinstance(trainings, (int, np.integer)) and isinstance(seed, (int, np.integer))
    if not whole or trainings < FEWEST_TRAININGS or seed < 0:
        raise InputError(
            f"trainings={trainings!r}, seed={seed!r}; expected a budget of {FEWEST_TRAININGS} trainings or more, and a "
            "seed of 0 or more"
        )
    if not isinstance(removed, (int, float)) or not 0 < removed < 1 or not 1 < round(removed * samples) < samples:
        raise InputError(
            f"removed={removed!r} of {samples} samples; expected a share between 0 and 1 that is two samples or more "
            f"(2 / {samples}) and not all; of one sample alone, removed=0 and leave_one_out tell"
        )


@dataclass(frozen=True, kw_only=True)
class Removal(RetrainingMethod):
    """What taking a share of the samples away does: :func:`dit_mlflow.removal_influence`.

    Attributes:
        removed, trainings, seed, dtype, memory_budget, effort, exact, compile: see there.
    """

    name = "removal"
    of_many = True

    removed: float = 0.1
    trainings: int = 16
    seed: int = 0
    memory_budget: int | None = None
    exact: Influence | None = None
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        check_compile(self.compile)

    def informed_by(self, exact: Influence) -> Removal:
        return replace(self, exact=exact)

    def estimate(self, question: Question) -> Estimate:
        found = removal_influence(
            question.trajectory,
            question.workload,
            question.windows,
            question.kind,
            question.queries,
            self.removed,
            self.trainings,
            self.seed,
            self.dtype,
            self.memory_budget,
            self.effort,
            self.exact,
            self.compile,
        )
        names = ("removed", "trainings", "seed", "spent", "bank", DRAWS_AGREE, *OF_SWEEP)
        details = {name: found.metadata[name] for name in names if name in found.metadata}
        return Estimate(found.scores, found.metadata["dtype"], details, found.standard_error, found.degrees_of_freedom)


def usual_share(samples: int) -> float:
    """A tenth of the samples, and two at least."""
    return max(Removal.removed, 2 / samples)


def usual_method(samples: int) -> Method:
    """Removal influence at the usual share; the derivative, where two samples would be all."""
    return Removal(removed=usual_share(samples)) if samples > 2 else Dit()
