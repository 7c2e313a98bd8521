"""What a comparison says over its trainings: means with intervals, and what the seeds change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dit_mlflow.evaluation import mean_interval, stability

FIGURES = ("spearman", "pearson", "lds", "recall_at_k", "auroc")
"""Whose interval over trainings is told, and whose variance is told apart."""


def summarised(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method: means over trainings; with several, the intervals are those of the mean (Student's t).

    ``trainings`` is the number of those on which the method worked, ``asked`` of all.
    """
    summary = []
    for name, group in rows.groupby("method", sort=False):
        worked = group[~group["failed"]]
        row: dict[str, object] = {"method": name, "measures": group["measures"].iloc[0], "trainings": len(worked)}
        row["asked"] = len(group)
        for column in worked.select_dtypes("number"):
            values = worked[column].dropna()
            row.setdefault(str(column), float(values.mean()) if len(values) else None)
            if len(values) > 1 and (column in FIGURES or f"{column}_low" in worked):
                low, high = mean_interval(values.to_numpy())
                row |= {f"{column}_low": low, f"{column}_high": high}
            elif len(group) > 1 and f"{column}_low" in worked:
                # Of the one training that is left, an interval would be over samples.
                row |= {f"{column}_low": np.nan, f"{column}_high": np.nan}
        errors = group["error"].dropna() if "error" in group else pd.Series(dtype=object)
        row |= {"failed": worked.empty, "error": str(errors.iloc[0]) if len(errors) else ""}
        summary.append(row)
    return pd.DataFrame(summary)


def stability_table(
    rows: pd.DataFrame, scores: Mapping[str, np.ndarray], grid: Sequence[tuple[int, int]]
) -> pd.DataFrame:
    """How much of a method's result is the seeds': a row per method and figure, for methods that never failed.

    Args:
        rows: one for each training and method, the trainings in the order of ``grid``.
        scores: whole-run scores ``[samples]`` by the run in a row's ``run_id``.
        grid: seeds of weights and of batch order; every pair of them once.

    Returns:
        Columns ``method``, ``of``, ``mean``, ``low``, ``high``, ``share_init``, ``share_order``, ``share_rest``. For
        ``of=scores``: mean Spearman correlation between two trainings, its interval, and shares of the variance of the
        samples' scores, see :func:`dit_mlflow.evaluation.stability`. For a figure: its mean, the interval of the mean
        (Student's t), and shares of its variance. Shares need two seeds of each at least.
    """
    shape = (len({init for init, _ in grid}), len({order for _, order in grid}))
    table: list[dict[str, object]] = []
    for name, group in rows.groupby("method", sort=False):
        if group["failed"].any():
            continue
        found = np.stack([scores[run] for run in group["run_id"]])
        agreement = stability(found.reshape(*shape, -1)).values
        bounds = {"mean": "spearman", "low": "spearman_low", "high": "spearman_high"}
        shares = ("share_init", "share_order", "share_rest")
        told = {column: agreement.get(key) for column, key in bounds.items()}
        table.append({"method": name, "of": "scores", **told, **{key: agreement.get(key) for key in shares}})
        for figure in (figure for figure in FIGURES if figure in group and group[figure].notna().all()):
            values = group[figure].to_numpy(dtype=np.float64)
            low, high = mean_interval(values)
            parts = stability(values.reshape(*shape, 1)).values
            row = {"method": name, "of": figure, "mean": float(values.mean()), "low": low, "high": high}
            table.append({**row, **{key: parts.get(key) for key in shares}})
    return pd.DataFrame(table)
