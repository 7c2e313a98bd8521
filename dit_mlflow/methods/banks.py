"""Retrainings without random shares of the samples, as many as it takes, that choose scores of removals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence import Influence, Window
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.blend import FEWEST, LARGE, Blend, pooled
from dit_mlflow.retraining import Effort, Subsets, leave_one_out, train_on_subsets
from dit_mlflow.retraining.subsets import met
from dit_mlflow.retraining.work import time_of_one
from dit_mlflow.told import logger_of

_log = logger_of(__name__)

EXACT = "leave_one_out"
"""The name of that part of a blend."""

MOST = 32
"""Largest number of retrainings in a bank, for each training of the budget."""


@dataclass(eq=False)
class Banks:
    """Retrainings without random shares of the samples, which choose the blend of ``parts``.

    Leave-one-out is made, and becomes a part, where it is not known and helps or costs little.
    """

    question: Question
    parts: dict[str, Influence]
    trainings: int
    seed: int
    dtype: torch.dtype | None
    effort: Effort | None
    left_out: int = 0

    def blended(self, removed: float, sweeps: int, common: dict[str, Any]) -> Influence:
        """The answer, when a share ``removed`` goes."""
        question, spent = self.question, 2 * self.trainings
        bank = self._bank(question.windows, removed, spent)
        blends = {w: self._blends(bank, w) for w in question.windows if self._leaves_out(bank, w)}
        again = self._made_exact(self._poor(blends))
        blends |= {w: self._blends(bank, w) for w in again if w in blends}
        poor = self._poor(blends)
        if poor and self._most > max(spent, LARGE):
            bank, spent = self._bank(poor, removed, self._most, bank), self._most
            blends = {w: blends[w] for w in question.windows if w not in poor}
        found = [blends.get(w) or self._blends(bank, w) for w in question.windows]
        return question.answer(
            np.array([[blend.scores for blend in of_window] for of_window in found]),
            "removal",
            str(self.dtype or "recorded"),
            standard_error=np.array([[blend.errors for blend in of_window] for of_window in found]),
            degrees_of_freedom=np.array([[blend.freedom for blend in of_window] for of_window in found]),
            removed=float(removed),
            **common,
            spent={"sweeps": sweeps, "retrainings": spent, EXACT: self.left_out},
            bank={
                str(window): [blend.judged for blend in of_window]
                for window, of_window in zip(question.windows, found, strict=True)
            },
            max_drift=max(float(part.metadata.get("max_drift", 0.0)) for part in self.parts.values()),
        )

    def _bank(self, windows: Sequence[Window], removed: float, size: int, known: Subsets | None = None) -> Subsets:
        question = self.question
        given = (question.trajectory, question.workload, windows, question.kind, question.queries)
        # A share of whole samples, so that as many stay as do not go: of 5, half are 2 and not 3.
        samples, seed, dtype, effort = question.workload.num_samples, self.seed, self.dtype, self.effort
        share = 1 - round(removed * samples) / samples
        bank = train_on_subsets(*given, subsets=size, share=share, seed=seed, dtype=dtype, effort=effort, known=known)
        _warn_of_broken(bank)
        return bank

    @cached_property
    def _each(self) -> float:
        return time_of_one(self.question, self.dtype, self.effort)

    @property
    def _most(self) -> int:
        """As many retrainings as half of the budget's time holds."""
        return min(MOST * self.trainings, int(self.trainings / 2 / self._each))

    def _poor(self, blends: Mapping[Window, Sequence[Blend]]) -> list[Window]:
        """The windows for some of whose queries retrainings are not foretold well, or not yet."""
        foretold = {window for window, found in blends.items() if all(blend.foretells for blend in found)}
        return [window for window in self.question.windows if window not in foretold]

    def _made_exact(self, poor: Sequence[Window]) -> list[Window]:
        """The windows whose leave-one-out became a part now: ``poor`` ones, or all if a quarter of the budget does."""
        question, known = self.question, self.parts.get(EXACT)
        if known is not None and not self.left_out:
            return []
        cost = self._each * question.workload.num_samples
        if known is None:
            known = replace(self.parts["dit"], scores=np.full(question.shape, np.nan))
        wanted = question.windows if 4 * cost <= self.trainings else poor
        new = [window for window in wanted if np.isnan(known.of(window)).all()]
        if not new or cost > self.trainings:
            return []
        given = (question.trajectory, question.workload, new, question.kind, question.queries)
        try:
            exact = leave_one_out(*given, dtype=self.dtype, effort=self.effort)
        except UnsupportedError:  # Training may diverge without each sample; the other parts stay.
            return []
        self.parts[EXACT] = put(known, exact)
        self.left_out = question.workload.num_samples
        return new

    @cached_property
    def _met(self) -> np.ndarray:
        return met(self.question)

    def _gone(self, bank: Subsets, window: Window) -> np.ndarray:
        """Samples of the window's steps that are left out, bool ``[bank, samples]``."""
        found: np.ndarray = ~bank.kept & self._met[self.question.windows.index(window)]
        return found

    def _leaves_out(self, bank: Subsets, window: Window) -> bool:
        """Whether enough of the retrainings leave out a sample of the window's steps."""
        return int(self._gone(bank, window).any(axis=1).sum()) >= FEWEST

    def _blends(self, bank: Subsets, window: Window) -> list[Blend]:
        """By query."""
        row, place = self.question.windows.index(window), bank.windows.index(window)
        return [
            Blend.fitted(
                {
                    name: part.scores[row, query]
                    for name, part in self.parts.items()
                    if np.isfinite(part.scores[row, query]).all()
                },
                {name: pooled(part, row, query) for name, part in self.parts.items()},
                self._gone(bank, window),
                bank.changes[place, query],
                self.seed,
            )
            for query in range(len(self.question.queries))
        ]


def _warn_of_broken(bank: Subsets) -> None:
    broken = int((~np.isfinite(bank.changes)).sum(axis=2).max())
    if broken:
        _log.warning(
            "removal: for some window and query, %d of %d trainings without a share of the samples are left out, since "
            "the query is not a finite number there. Scores are of the others alone; take a smaller share (removed)",
            broken,
            len(bank.kept),
        )


def put(into: Influence, part: Influence) -> Influence:
    """``into``, with scores and errors of ``part`` in its windows."""
    places = [into.windows.index(window) for window in part.windows]

    def placed(own: np.ndarray | None, values: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
        if own is None and values is None:
            return None
        found = np.full(shape, np.nan) if own is None else own.copy()
        found[places] = np.nan if values is None else values
        return found

    shape = into.scores.shape
    scores = placed(into.scores, part.scores, shape)
    assert scores is not None
    return replace(
        into,
        scores=scores,
        standard_error=placed(into.standard_error, part.standard_error, shape),
        degrees_of_freedom=placed(into.degrees_of_freedom, part.degrees_of_freedom, shape[:2]),
    )
