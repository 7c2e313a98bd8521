"""Early influencers, late bloomers, stable and fluctuating samples: how many there are, and how well DIT finds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dit_mlflow import Influence, Window
from dit_mlflow.evaluation import correlations, patterns
from dit_mlflow.evaluation.figures import PATTERN, SPEARMAN
from dit_mlflow.evaluation.patterns import PATTERNS
from dit_mlflow.plots.canvas import HARMFUL, HELPFUL, MARKED, NEUTRAL, SMALL, new_figure

from .cases import Case
from .panels import cases_of, legend_above
from .scored import WHOLE, Scores, scores
from .table import Series, Table, Unit, grid, mean_of

AMONG = f"{SPEARMAN.leaf}_"
"""Prefix of a pattern's name: agreement among its samples."""

KINDS = ("local", "cumulative")
METHODS = ("leave_one_out", "dit")
COLOURS = dict(zip(PATTERNS, (HELPFUL, HARMFUL, NEUTRAL, MARKED), strict=True))


class Patterns(Table):
    """Shares of the four patterns over the epochs, and fidelity within each."""

    name = "patterns"
    title = "Patterns"
    facets = ("kind",)
    figures = (*PATTERNS, "same", *(AMONG + name for name in PATTERNS))

    def units(self, cases: Sequence[Case], seeds: int, quick: bool) -> list[Unit]:
        """Keep the cases with a window for every epoch."""
        return super().units([case for case in cases if case.windows == "epochs"], seeds, quick)

    def measure(self, unit: Unit) -> pd.DataFrame:
        found = scores(unit.case, unit.seed)
        rows = []
        for kind in KINDS:
            names = {method: patterns(over_windows(found, method, kind)) for method in METHODS}
            known = np.isfinite(found.of("leave_one_out", "final", WHOLE)) & (names["leave_one_out"] != "none")
            for method in METHODS:
                row: dict[str, object] = {name: (names[method][known] == name).mean() for name in PATTERNS}
                if method == "dit":
                    row["same"] = (names["dit"] == names["leave_one_out"])[known].mean()
                    for name in PATTERNS:
                        chosen = known & (names["dit"] == name)
                        pair = (found.of(of, "final", WHOLE)[chosen] for of in ("dit", "leave_one_out"))
                        # Of a handful of samples, a correlation says nothing.
                        agreement = correlations(*pair).values if chosen.sum() >= 8 else {}
                        row[AMONG + name] = agreement.get(SPEARMAN.leaf, np.nan)
                keys = {"data": unit.case.data, "model": unit.case.model, "method": method, "seed": unit.seed}
                rows.append({**keys, "kind": kind, **row})
        return pd.DataFrame(rows)

    def series(self, rows: pd.DataFrame) -> Iterable[Series]:
        for row in rows.to_dict("records"):
            for name in self.figures:
                yield f"{PATTERN}{row['kind']}/{name}", 0, row.get(name, np.nan)

    def figure(self, rows: pd.DataFrame) -> Figure:
        """Shares as stacked bars, exact above estimated."""
        cases = cases_of(rows)
        figure = new_figure(1.1 + 0.55 * len(cases))
        for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
            for method, shift in (("leave_one_out", -0.2), ("dit", 0.2)):
                own = rows[(rows["kind"] == kind) & (rows["method"] == method)].groupby(["data", "model"], sort=False)
                means = own[list(PATTERNS)].mean().reindex(cases)
                left = np.zeros(len(cases))
                for name in PATTERNS:
                    style = {"color": COLOURS[name], "alpha": 1.0 if method == "leave_one_out" else 0.6}
                    label = name if method == "leave_one_out" else None
                    axes.barh(np.arange(len(cases)) + shift, means[name], 0.36, left=left, label=label, **style)
                    left += means[name].to_numpy()
            axes.set_title(kind, fontsize=10)
            axes.set_xlim(0, 1)
        figure.axes[0].set_yticks(range(len(cases)), [" ".join(case) for case in cases], fontsize=SMALL)
        figure.axes[0].invert_yaxis()
        legend_above(figure, 4)
        figure.supxlabel(
            "share of the samples, mean over seeds; above: exact leave-one-out, below, paler: DIT", fontsize=10
        )
        return figure

    def section(self, rows: pd.DataFrame) -> str:
        exact, own = (rows[rows["method"] == method] for method in METHODS)
        everywhere = exact.groupby(["data", "model", "kind"], sort=False)[list(PATTERNS)].mean()
        all_four = int((everywhere > 0.01).all(axis=1).sum())
        same = own.groupby(["data", "model", "kind"], sort=False)["same"].mean()
        words = [
            "**Claim: there are four patterns.** With the definition of `dit_mlflow.evaluation.patterns` (the paper "
            "gives words, no formula), each of the four holds more than 1 % of the samples, by exact leave-one-out, in "
            f"{all_four} of {len(everywhere)} (case, kind). DIT gives a sample the same pattern "
            f"as exact leave-one-out does for {100 * same.min():.0f} to {100 * same.max():.0f} % of the samples.",
            "Cases with windows for every epoch; the CNNs have three.",
        ]
        for kind in KINDS:
            shares = exact[exact["kind"] == kind].melt(["data", "model", "seed"], list(PATTERNS))
            figures = ["same", *(AMONG + name for name in PATTERNS)]
            fidelity = own[own["kind"] == kind].melt(["data", "model", "seed"], figures)
            fidelity["variable"] = fidelity["variable"].str.removeprefix(AMONG)
            words += [
                f"## `{kind}`: shares, exact\n",
                grid(shares, ["data", "model"], "variable", PATTERNS, lambda cell: mean_of(cell["value"], 2)),
                f"## `{kind}`: fidelity\n",
                "Share of samples to which DIT gives the exact pattern, and Spearman correlation of the whole run's "
                "scores with exact leave-one-out among the samples of each pattern of DIT (8 of them or more):\n",
                grid(
                    fidelity, ["data", "model"], "variable", ("same", *PATTERNS), lambda cell: mean_of(cell["value"], 2)
                ),
            ]
        return "\n\n".join(words)


def over_windows(found: Scores, method: str, kind: str) -> Influence:
    """Scores of all windows but the whole run."""
    names = [name for name in found.windows if name != WHOLE]
    table = np.stack([found.of(method, kind, name) for name in names])[:, None]
    windows = tuple(Window(*found.windows[name]) for name in names)
    return Influence(table, windows, ("mean validation loss",), np.arange(table.shape[2]), kind, method)
