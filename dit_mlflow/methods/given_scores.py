"""Scores that were computed elsewhere, as a method among others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.errors import ParserWarning

from dit_mlflow.errors import InputError, first_line
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.trajectory.untrusted import open_regular

SAMPLE, SCORE = "sample_index", "score"
"""Columns of the file."""


def read_table(path: str | Path, dtype: Mapping[str, str], missing: bool = True) -> pd.DataFrame:
    """A CSV file; raises :class:`ValueError` if it is none, also if its columns do not stand under their names.

    ``missing``: whether texts such as ``NA`` mean that there is no value.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)
        try:
            # Pipes and devices may have no end.
            open_regular(Path(path)).close()
            # Else pandas takes a field more than the header has, as of 0,25 for 0.25, for another first column.
            return pd.read_csv(path, index_col=False, dtype=dict(dtype), keep_default_na=missing)
        except ParserWarning as error:
            raise ValueError("lines have more fields than the header") from error
        except (OSError, ValueError):
            raise
        except Exception as error:  # Any kind: each of the archives that pandas opens by their names has its own.
            raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error


@dataclass(frozen=True)
class GivenScores(Method):
    """Scores from a CSV file with the columns ``sample_index`` and ``score``: of another library, or made by hand.

    They are of the whole run, one for each training sample. **Sign**: as everywhere, positive = removing the sample
    raises the query. Many libraries have the opposite one; a clearly negative agreement says so.

    Attributes:
        path: of the file.
        name: the file's name without its ending.

    Raises:
        InputError: the file cannot be read, lacks a column, or names a sample twice or one that is not there.
    """

    path: Path
    name: str = ""  # type: ignore[misc]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.path.stem)
        self._table()

    def estimate(self, question: Question) -> Estimate:
        self.check(question.workload.num_samples)
        scores = self._table().set_index(SAMPLE)[SCORE].sort_index().to_numpy()
        return Estimate(np.broadcast_to(scores, question.shape).copy(), details={"file": self.path.name})

    def check(self, num_samples: int) -> None:
        """Raise :class:`InputError` unless there is a finite score for each training sample, and for no other."""
        table = self._table()
        if set(table[SAMPLE]) != set(range(num_samples)) or not np.isfinite(table[SCORE]).all():
            known = table[np.isfinite(table[SCORE])][SAMPLE].between(0, num_samples - 1).sum()
            raise InputError(
                f"scores={str(self.path)!r} has finite scores of {known} training samples in {len(table)} lines; "
                f"expected one for each of the samples 0 … {num_samples - 1}"
            )

    def _table(self) -> pd.DataFrame:
        try:
            table = read_table(self.path, {SAMPLE: "int64", SCORE: "float64"})
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"scores={str(self.path)!r} cannot be read: {error}; expected a CSV file with the columns {SAMPLE} "
                f"(whole numbers) and {SCORE}"
            ) from error
        if {SAMPLE, SCORE} - set(table):
            raise InputError(
                f"scores={str(self.path)!r} has the columns {', '.join(map(str, table))}; expected {SAMPLE} and "
                f"{SCORE} among them, with commas between"
            )
        twice = table[SAMPLE][table[SAMPLE].duplicated()]
        if table.empty or len(twice):
            what = "names no sample" if table.empty else f"names a sample twice, {twice.iloc[0]}"
            raise InputError(f"scores={str(self.path)!r} {what}; expected one score for each sample")
        return table
