"""Scores that were computed elsewhere, as a method among others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dit_mlflow.errors import InputError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method

SAMPLE, SCORE = "sample_index", "score"
"""Columns of the file."""


@dataclass(frozen=True)
class GivenScores(Method):
    """Scores from a CSV file with the columns ``sample_index`` and ``score``: of another library, or made by hand.

    They are of the whole run. **Sign**: as everywhere, positive = removing the sample raises the query. Many libraries
    have the opposite one; a clearly negative agreement says so.

    Attributes:
        path: of the file; samples that it does not name have no score.
        name: the file's name without its ending.

    Raises:
        InputError: the file cannot be read, lacks a column, or names a sample twice or one that is not there.
    """

    path: Path
    name: str = ""  # type: ignore[misc]

    skips = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.path.stem)
        self._table()

    def estimate(self, question: Question) -> Estimate:
        table, n = self._table(), question.workload.num_samples
        if not table[SAMPLE].between(0, n - 1).all():
            raise InputError(f"{self.path} names sample {table[SAMPLE].max()}; the training set has 0 … {n - 1}")
        scores = np.full(n, np.nan)
        scores[table[SAMPLE]] = table[SCORE]
        return Estimate(np.broadcast_to(scores, question.shape).copy(), details={"file": self.path.name})

    def _table(self) -> pd.DataFrame:
        try:
            table = pd.read_csv(self.path, usecols=[SAMPLE, SCORE], dtype={SAMPLE: "int64", SCORE: "float64"})
        except (OSError, ValueError) as error:
            raise InputError(
                f"scores={str(self.path)!r} cannot be read: {error}; expected a CSV file with the columns {SAMPLE} "
                f"(whole numbers) and {SCORE}"
            ) from error
        if table.empty or table[SAMPLE].duplicated().any():
            what = "names no sample" if table.empty else "names a sample twice"
            raise InputError(f"scores={str(self.path)!r} {what}; expected one score for each sample")
        return table
