"""Influence scores: the one result type that every method returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from dit_mlflow.errors import InputError, checked_path
from dit_mlflow.influence.stored_result import METADATA_FILE, SCORES_FILE, description_of, read_result
from dit_mlflow.influence.window import Window


@dataclass(frozen=True, eq=False, repr=False)
class Influence:
    """Scores of every training sample, per window and query.

    **Sign**: the change in the query caused by removing the sample. For a loss, positive = helpful,
    negative = harmful.

    Attributes:
        scores: float64 ``[windows, queries, samples]``, in units of the query; NaN = not computed.
        windows: in the order of the first axis.
        queries: their names, in the order of the second axis.
        samples: int64 ``[samples]``, training set indices in the order of the third axis.
        kind: ``local``, ``final`` or ``cumulative``; ``none`` for methods without one.
        method: the estimator's name.
        metadata: further description (trajectory digest, dtype, cost); JSON values.
        standard_error: float64, like ``scores``; NaN = unknown; ``None`` = all unknown.
        degrees_of_freedom: of the standard errors, ``[windows, queries]``; ``None`` = infinitely many.
    """

    scores: np.ndarray
    windows: tuple[Window, ...]
    queries: tuple[str, ...]
    samples: np.ndarray
    kind: str
    method: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    standard_error: np.ndarray | None = None
    degrees_of_freedom: np.ndarray | None = None

    def __post_init__(self) -> None:
        expected = (len(self.windows), len(self.queries), len(self.samples))
        if self.scores.shape != expected:
            raise InputError(
                f"scores have shape {self.scores.shape}; expected [windows, queries, samples] = {expected}"
            )
        if np.isinf(self.scores).any():
            raise InputError("a score is infinite; expected finite numbers, and NaN where there is no score")
        for name, found, wanted in (
            ("standard_error", self.standard_error, expected),
            ("degrees_of_freedom", self.degrees_of_freedom, expected[:2]),
        ):
            if found is not None and (found.shape != wanted or (found < 0).any()):
                raise InputError(f"{name} has shape {found.shape}, or is negative; expected {wanted}, 0 or more each")

    def __repr__(self) -> str:
        windows, queries, samples = self.scores.shape
        return f"<Influence by {self.method} ({self.kind}): {windows} windows, {queries} queries, {samples} samples>"

    @property
    def measures(self) -> str:
        """``query``: scores are in units of the query; ``ranking``, ``suspicion``: see the method's class."""
        return str(self.metadata.get("measures", "query"))

    @property
    def removed(self) -> float | None:
        """The fraction of samples whose removal the scores predict (``removal_influence``); ``None`` = one sample's."""
        share = self.metadata.get("removed")
        return None if share is None else float(share)

    @property
    def coupled(self) -> bool:
        """Whether the loss couples samples (contrastive terms, mixup, batch statistics). Removal then takes the
        sample's own loss away, while the sample stays in its batches, unless the scores are of its :attr:`absence`."""
        return bool(self.metadata.get("coupled", False))

    @property
    def absence(self) -> bool:
        """Whether removed samples are not in their batches either: ``leave_one_out(removal="absent")``."""
        return self.metadata.get("removal") == "absent"

    @property
    def unclear(self) -> np.ndarray:
        """Which scores have a 95 % interval that contains 0, bool, like ``scores``: neither helpful nor harmful."""
        if self.standard_error is None:
            return np.zeros(self.scores.shape, dtype=bool)
        low, high = self.interval()
        return (low <= 0) & (high >= 0)

    def of(self, window: Window | int, query: str | None = None) -> np.ndarray:
        """Scores ``[samples]`` of one window, or its position, and one query (default: the first)."""
        position = self.windows.index(window) if isinstance(window, Window) else window
        return self.scores[position, 0 if query is None else self.queries.index(query)]

    def select(self, windows: list[Window]) -> Influence:
        """The same result with only ``windows``, in that order."""
        positions = [self.windows.index(window) for window in windows]
        error, freedom = self.standard_error, self.degrees_of_freedom
        return replace(
            self,
            scores=self.scores[positions],
            windows=tuple(windows),
            standard_error=None if error is None else error[positions],
            degrees_of_freedom=None if freedom is None else freedom[positions],
        )

    def of_group(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The first-order effect of removing samples together: the sum of their scores, ``[windows, queries]``.

        NaN where one of the scores was not computed. It has no standard error: those of single samples come from the
        same draws, and cannot be added up, nor do they know that a group is not the sum of its members. Sums foretell
        which of two random sets of one size matters more. The size of a class's effect they miss by far:
        :func:`dit_mlflow.leave_groups_out` retrains once for each group.

        Args:
            indices: training set indices; each counts once.

        Raises:
            InputError: an index is not among :attr:`samples`.
        """
        group = np.unique(np.asarray(indices, dtype=np.int64))
        if len(missing := np.setdiff1d(group, self.samples)):
            raise InputError(
                f"samples {missing[:5].tolist()} of the group have no scores here; expected indices among samples"
            )
        total: np.ndarray = self.scores[:, :, np.isin(self.samples, group)].sum(axis=2)
        return total

    def interval(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of each score's interval, like ``scores``, by Student's t; NaN = unknown.

        Raises:
            InputError: there is no :attr:`standard_error`.
        """
        if self.standard_error is None:
            raise InputError(f"scores by {self.method} have no standard error, so they have no interval")
        freedom = np.inf if self.degrees_of_freedom is None else self.degrees_of_freedom[:, :, None]
        half = stats.t.ppf((1 + confidence) / 2, freedom) * self.standard_error
        return self.scores - half, self.scores + half

    def to_frame(self) -> pd.DataFrame:
        """Long form: ``sample_index, window_index, window_start, window_end, query, score, standard_error``.

        Without the last column if :attr:`standard_error` is ``None``.
        """
        window, query, sample = (axis.ravel() for axis in np.indices(self.scores.shape))
        bounds = np.array([(window.start, window.end) for window in self.windows], dtype=np.int64).reshape(-1, 2)
        return pd.DataFrame(
            {
                "sample_index": np.asarray(self.samples, dtype=np.int64)[sample],
                "window_index": window,
                "window_start": bounds[window, 0],
                "window_end": bounds[window, 1],
                "query": np.asarray(self.queries, dtype=object)[query],
                "score": self.scores.ravel(),
                **({} if self.standard_error is None else {"standard_error": self.standard_error.ravel()}),
            }
        )

    def top(self, k: int) -> pd.DataFrame:
        """The ``k`` most harmful and the ``k`` most helpful samples of each window and query.

        Columns as :meth:`to_frame`, and ``side`` (``harmful``: negative scores, most negative first; ``helpful``:
        positive scores, largest first) and ``rank`` from 1. A sample whose 95 % interval contains 0 is neither.
        """
        frame = self.to_frame()[~self.unclear.ravel()].dropna(subset=["score"])
        keys = ["window_index", "query"]
        sides = []
        for side, kept, ascending in (
            ("harmful", frame[frame["score"] < 0], True),
            ("helpful", frame[frame["score"] > 0], False),
        ):
            ordered = kept.sort_values([*keys, "score"], ascending=[True, True, ascending], kind="stable")
            best = ordered.groupby(keys, sort=False).head(k).copy()
            best["side"] = side
            best["rank"] = best.groupby(keys, sort=False).cumcount() + 1
            sides.append(best)
        return pd.concat(sides, ignore_index=True)

    def save(self, directory: str | Path) -> Path:
        """Write ``scores.parquet`` (long form) and ``metadata.json`` into ``directory``, made if missing.

        Raises:
            InputError: :meth:`load` would not give the same back; the message names the field. Nothing is written.
        """
        content = description_of(self)
        folder = checked_path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_frame().to_parquet(folder / SCORES_FILE, index=False)
        (folder / METADATA_FILE).write_bytes(content)
        return folder

    @classmethod
    def load(cls, directory: str | Path) -> Influence:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the folder holds no result, or its two files contradict each other; the message names the
                field. No code from the files runs, and memory is bounded by the size of the scores.
        """
        return cls(**read_result(checked_path(directory)))
