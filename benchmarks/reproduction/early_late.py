"""Does early influence predict late influence?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dit_mlflow.evaluation import window_correlations
from dit_mlflow.plots.canvas import DIVERGING, SMALL, new_figure

from .panels import cases_of, legend_above, of_case
from .patterns import over_windows
from .scored import KINDS, scores
from .table import Series, Table, Unit, every_seed, grid, mean_of, number

WORDS = {"leave_one_out": "exact leave-one-out", "dit": "DIT"}
METHODS = tuple(WORDS)
FIGURES = {
    "first_last": "first and last",
    "first_middle": "first and middle",
    "middle_last": "middle and last",
    "neighbours": "neighbours, mean",
}
"""Pairs of windows, and their names in the document."""

PUBLISHED = {("adult", "logreg"): -0.25, ("adult", "dnn"): -0.29}
"""Exact leave-one-out with the published code, ``cumulative``, first and last window."""

WEAK = 0.3
"""Correlation below which one is called weak here."""


class EarlyLate(Table):
    """Spearman correlation between windows, by exact leave-one-out and by DIT."""

    name = "early_late"
    title = "Early and late influence"
    facets = ("kind",)
    figures = (*FIGURES, "matrix_difference")

    def measure(self, unit: Unit) -> pd.DataFrame:
        found = scores(unit.case, unit.seed)
        rows = []
        for kind in KINDS:
            matrices = {method: window_correlations(over_windows(found, method, kind)) for method in METHODS}
            difference = np.nanmean(np.abs(np.subtract(*matrices.values())))
            for method, matrix in matrices.items():
                last = len(matrix) - 1
                middle = len(matrix) // 2
                beside = np.diagonal(matrix, 1)
                row = {
                    "first_last": matrix[0, last],
                    "first_middle": matrix[0, middle],
                    "middle_last": matrix[middle, last],
                    # Of three windows far apart, none is another's neighbour.
                    "neighbours": np.nanmean(beside) if len(matrix) > 3 and np.isfinite(beside).any() else np.nan,
                    "matrix_difference": difference if method == "dit" else np.nan,
                }
                keys = {"data": unit.case.data, "model": unit.case.model, "method": method, "seed": unit.seed}
                rows.append({**keys, "kind": kind, **row})
        return pd.DataFrame(rows)

    def series(self, rows: pd.DataFrame) -> Iterable[Series]:
        for row in rows.to_dict("records"):
            for name in self.figures:
                yield f"between_windows/{row['kind']}/{name}", 0, row[name]

    def figure(self, rows: pd.DataFrame) -> Figure:
        """First against last window: a point per seed, by case and kind, exact and estimated."""
        cases = cases_of(rows)
        figure = new_figure(1.2 + 0.42 * len(cases))
        for axes, kind in zip(figure.subplots(1, 3, sharey=True), KINDS, strict=True):
            for method, shift, marker in (("leave_one_out", -0.15, "o"), ("dit", 0.15, "D")):
                own = rows[(rows["kind"] == kind) & (rows["method"] == method)]
                places = [cases.index(case) + shift for case in zip(own["data"], own["model"], strict=True)]
                colour = DIVERGING(1.0 if method == "dit" else 0.0)
                axes.scatter(
                    own["first_last"], places, s=16, marker=marker, color=colour, alpha=0.6, lw=0, label=WORDS[method]
                )
            axes.axvline(0, color="black", lw=0.8)
            axes.set_xlim(-1.05, 1.05)
            axes.set_title(kind, fontsize=10)
            axes.grid(axis="y", lw=0.3)
        figure.axes[0].set_yticks(range(len(cases)), [" ".join(case) for case in cases], fontsize=SMALL)
        figure.axes[0].invert_yaxis()
        legend_above(figure, 2)
        figure.supxlabel(
            "Spearman correlation of the first and the last window's influence; a point per seed", fontsize=10
        )
        return figure

    def section(self, rows: pd.DataFrame) -> str:
        exact = rows[rows["method"] == "leave_one_out"]
        lines = []
        for kind in KINDS:
            means = exact[exact["kind"] == kind].groupby(["data", "model"], sort=False)["first_last"].mean()
            weak = int((means < WEAK).sum())
            lines.append(
                f"{weak} of {len(means)} cases for `{kind}` ({number(means.min(), 2)} to {number(means.max(), 2)})"
            )
        estimated = rows[rows["method"] == "dit"]["matrix_difference"].mean()
        pairs = list(FIGURES.values())
        words = [
            "**Claim: early and late influence are weakly correlated.** By exact leave-one-out, the mean Spearman "
            f"correlation between the first and the last epoch is below {WEAK} in "
            + "; ".join(lines)
            + ". DIT tells the "
            f"same: over all pairs of windows it differs from the exact one by {number(estimated, 2)} in the mean.",
        ]
        for kind in KINDS:
            own = rows[rows["kind"] == kind].melt(["data", "model", "method"], list(FIGURES))
            own["variable"] = own["variable"].map(FIGURES)
            words += [
                f"## `{kind}`\n",
                grid(
                    own,
                    ["data", "model", "method"],
                    "variable",
                    pairs,
                    lambda cell: mean_of(cell["value"], 2),
                ),
            ]
        seeds = exact[exact["kind"] == "cumulative"]
        words += [
            "## Every seed: first and last epoch, exact, `cumulative`\n",
            every_seed(seeds, ["data", "model"], "first_last"),
        ]
        ours = {case: of_case(seeds, case)["first_last"] for case in PUBLISHED}
        beside = [
            f"{' '.join(case)} {number(theirs, 2)} (ours {mean_of(ours[case], 2)})"
            for case, theirs in PUBLISHED.items()
            if len(ours[case])
        ]
        if beside:
            words.append("Exact leave-one-out with the published code, seeds 0 to 2: " + "; ".join(beside) + ".")
        return "\n\n".join(words)
