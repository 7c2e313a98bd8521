"""Removal influence: what taking a share of the samples away does, calibrated by retraining without random shares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence import Influence, Kind, Query, Window
from dit_mlflow.influence.draws import DRAWS_AGREE, Draws, expected_over, kinked, warn_of_kinks
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.sweep import tracked
from dit_mlflow.methods.banks import EXACT, Banks, put
from dit_mlflow.methods.blend import FEWEST
from dit_mlflow.methods.dit import OF_SWEEP, Dit
from dit_mlflow.methods.method import Estimate, Method, RetrainingMethod
from dit_mlflow.methods.tracin import TracIn
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.compiled_step import Compile, check_compile
from dit_mlflow.retraining import Effort
from dit_mlflow.told import logger_of
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state

_log = logger_of(__name__)

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
    ``Beta(2, 1)``, and leave-one-out where it is known or affordable, as for small networks. The constant
    ``a``, what all removals of that share have in common, is no sample's. The blend is calibrated: a sum of its scores
    foretells size as well as order.

    In windows where opposite draws disagree (``metadata["draws_agree"]`` below 0.5, as over whole runs under AdamW), a
    few draws are little more than noise. There the mean over ``U(0, 1)`` is taken over ``trainings`` draws, and TracIn
    is one more of the ``s^(k)``.

    The bank is that of datamodels (Ilyas et al. 2022, arXiv 2202.00622), which fit all scores to it; a few dozen
    retrainings are far too few for that, and enough for a handful of coefficients. Where a retraining among many costs
    little, as for small networks, more is done in windows in which they foretell others badly (an LDS below 0.9, by
    cross-validation). First all samples are left out, one at a time, if the budget's time holds that (in all windows if
    a quarter of it does). Where that is not enough, the bank grows to what half of the budget's time holds, and a ridge
    regression adds to each sample's score what the blend leaves unexplained: a datamodel whose prior is the blend.

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
        ``standard_error``: of drawing weights (pooled over samples: Smyth 2004, doi 10.2202/1544-6115.1027), of the
        coefficients (bootstrap over the bank), and of what single samples do beyond the blend (of 32 retrainings, at
        most all that they leave unexplained; of a large bank, the posterior of the ridge regression); that a set's
        effect is not the sum of its members' is not in it. NaN where the error of drawing is unknown: of a
        single pair of draws, as from a budget below 16.
        ``metadata["bank"]`` says, for each window (by its name) and query, how well the blend foretells retrainings
        that did not choose it: ``order`` (LDS: Spearman), ``size`` (slope of real on foretold change; 1 is right),
        their intervals of 95 %, the coefficients, the constant ``a``, and the number of ``retrainings``. The change by
        leaving out a random share is foretold by ``a`` and the sum of the scores in it; by 0, if none of it is in a
        step of the window. ``metadata["draws_agree"]``, and a warning before the retrainings where training is too
        kinked: see :func:`dit_mlflow.expected_influence`.

    Raises:
        InputError: a share or a budget that cannot be used, and what :func:`dit_mlflow.track` refuses.
        UnsupportedError: see :func:`dit_mlflow.track`; or too few of the retrainings end with a finite query or leave
            out a sample of the window's steps.

    Cost: ``1 + trainings / 2`` sweeps along a replay of their own, ``trainings`` more where opposite draws disagree,
    and ``2 * trainings`` retrainings; where these are foretold badly, one without each sample if these take the time of
    ``trainings`` trainings at most, and as many of the bank as take that of ``trainings / 2``, ``32 * trainings`` at
    most. The time of retrainings side by side is counted, not measured, so that scores are the same on every machine.
    ``metadata["spent"]`` says how many were made.
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
    trainings, seed = int(trainings), int(seed)
    check_compile(compile)
    question = Question.of(trajectory, workload, windows, kind, queries)
    if exact is not None:
        _check_exact(exact, question)
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
        parts[EXACT] = exact.select(list(question.windows))
    told = {key: value for key, value in few.metadata.items() if key in (DRAWS_AGREE, "derivative", "compile")}
    common = {"trainings": trainings, "seed": seed, **told}
    bank = Banks(question, parts, trainings, seed, dtype, effort)
    return [bank.blended(removed, 1 + 2 * draws + many, common) for removed in shares]


def _where_kinked(question: Question, engine: Engine, few: Influence, more: Draws, dtype: str) -> dict[str, Influence]:
    """For the windows of ``question``: the mean over more draws in place of ``few``, and TracIn. NaN: other windows."""
    found: dict[str, Influence] = {}
    with suppress(UnsupportedError):  # Training may diverge in every pair; the few stay then.
        (many,) = expected_over(question, engine, [more], dtype)
        found["uniform"] = put(few, many)
    with suppress(UnsupportedError):  # It needs a step that is a loss, then an optimizer.
        effects = TracIn()(question.trajectory, question.workload, question.windows, queries=question.queries)
        nothing = replace(few, scores=np.full_like(few.scores, np.nan), standard_error=None, degrees_of_freedom=None)
        found["tracin"] = put(nothing, effects)
    return found


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
    if not whole or trainings < FEWEST or seed < 0:
        raise InputError(
            f"trainings={trainings!r}, seed={seed!r}; expected a budget of {FEWEST} trainings or more, and a "
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
