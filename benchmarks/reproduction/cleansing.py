"""Test accuracy after training again without what each method flags."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dit_mlflow import Workload
from dit_mlflow.evaluation.figures import ACCURACY, PRECISION, TEST, figure_of
from dit_mlflow.evaluation.trials import NO_CLEANING, RANDOM, random_scores, trials, tried_out, untouched
from dit_mlflow.plots.canvas import HARMFUL, HELPFUL, MARKED, NEUTRAL, SMALL
from dit_mlflow.retraining.changed_data import subset

from .cases import Case, seeds_of
from .memory import remembered
from .panels import cases_of, of_case, panels
from .scored import WHOLE, fingerprint, flipped_scores
from .table import Series, Table, Unit, grid, listed, mean_of, number

JUDGED = figure_of(TEST + ACCURACY)
SHARES = (0.1, 0.2, 0.3)
REPEATS = 2
"""Pairs of seeds that are trained with, beside the seed of data and flips."""

DRAWS = 3
FLIPPED = "the flipped ones"
STRATEGIES = {
    "dit": ("dit", "local", WHOLE),
    "dit, late third": ("dit", "local", "late"),
    "leave_one_out": ("leave_one_out", "local", WHOLE),
    "tracin": ("tracin", "none", WHOLE),
    "influence_function": ("influence_function", "none", WHOLE),
    "loss": ("loss", "none", WHOLE),
    "aum": ("aum", "none", WHOLE),
    "confident_learning": ("confident_learning", "none", WHOLE),
}


class Cleansing(Table):
    """As many samples as were flipped are dropped, lowest score first; validation made the scores, test judges."""

    name = "cleansing"
    title = "Training again without what is flagged"
    facets = ("share",)
    figures = ("test_accuracy", "gain", "precision")

    def units(self, cases: Sequence[Case], seeds: int, quick: bool) -> list[Unit]:
        """Without the CNNs, of which a unit, some 25 trainings, takes up to minutes."""
        small = [case for case in cases if case.detects]
        return [
            Unit(case, seed, share)
            for case in small
            for seed in seeds_of(case, seeds)
            for share in SHARES[-1:] * quick or SHARES
        ]

    def measure(self, unit: Unit) -> pd.DataFrame:
        keys = {"data": unit.case.data, "model": unit.case.model, "seed": unit.seed, "share": unit.share}
        return pd.DataFrame([{**keys, **row} for row in _cleaned(unit, fingerprint())])

    def series(self, rows: pd.DataFrame) -> Iterable[Series]:
        for row in rows.to_dict("records"):
            for name, value in (
                (JUDGED.name, "test_accuracy"),
                (JUDGED.gain.name, "gain"),
                (PRECISION.name, "precision"),
            ):
                yield f"by_percent_flipped/{name}", round(100 * row["share"]), row[value]

    def figure(self, rows: pd.DataFrame) -> Figure:
        """Gain in test accuracy by method, a panel for each case."""
        share = max(rows["share"])
        shown = rows[(rows["share"] == share) & (rows["method"] != NO_CLEANING)]
        methods = list(dict.fromkeys(shown["method"]))
        figure, drawn = panels(shown, 4, 0.3 + 0.22 * len(methods))
        for case, axes in drawn.items():
            own = of_case(shown, case)
            for place, method in enumerate(methods):
                gains = 100 * own[own["method"] == method]["gain"]
                colour = {RANDOM: NEUTRAL, FLIPPED: "black", "leave_one_out": MARKED}.get(
                    method, HELPFUL if "dit" in method else HARMFUL
                )
                axes.scatter(gains, [place] * len(gains), s=10, color=colour, alpha=0.45, lw=0)
                axes.scatter([gains.mean()], [place], s=40, marker="|", color=colour)
            axes.axvline(0, color="black", lw=0.7)
            axes.grid(axis="y", lw=0.3)
        first = next(iter(drawn.values()))
        first.set_yticks(range(len(methods)), methods, fontsize=SMALL)
        first.invert_yaxis()
        figure.supxlabel(
            f"points of test accuracy gained, {100 * share:.0f} % flipped; a point per seed, a bar for the mean",
            fontsize=10,
        )
        return figure

    def section(self, rows: pd.DataFrame) -> str:
        shown = rows.assign(points=100 * rows["gain"], flipped=[f"{100 * share:.0f} %" for share in rows["share"]])
        shares = list(dict.fromkeys(shown["flipped"]))
        means = shown.groupby(["method", "data", "model", "share"], sort=False)["points"].mean()
        words = [self._words(means)]
        for case in cases_of(shown):
            own = of_case(shown, case)
            before = own[own["method"] == NO_CLEANING]
            parts = [
                f"{share}: {100 * before[before['flipped'] == share]['test_accuracy'].mean():.1f}" for share in shares
            ]
            words += [
                f"## {' '.join(case)}: points of test accuracy gained\n",
                f"Without cleaning, test accuracy in percent at {', '.join(parts)}.\n",
                grid(
                    own[own["method"] != NO_CLEANING],
                    ["method"],
                    "flipped",
                    shares,
                    lambda cell: mean_of(cell["points"], 1),
                ),
                f"Every seed, `dit`, {shares[-1]}: "
                + listed(own[(own["method"] == "dit") & (own["flipped"] == shares[-1])]["points"], 1),
            ]
        return "\n\n".join(words)

    def _words(self, means: pd.Series) -> str:
        wins = {
            name: int((means[name] > means["dit"]).sum()) for name in ("loss", "confident_learning", "aum", "tracin")
        }
        total = len(means["dit"])
        above = int((means["dit"] > means[RANDOM]).sum())
        counts = ", ".join(f"`{name}` in {count}" for name, count in wins.items())
        gains = [number(means[name].mean(), 1) for name in ("dit", RANDOM, FLIPPED)]
        return (
            "**Cleansing** (the paper repairs flagged labels by an oracle, so that false positives cost nothing; here "
            "as many samples as were flipped are dropped, lowest score first, and training begins anew). Dropping what "
            f"DIT flags gains {gains[0]} points of test accuracy in the mean over {total} settings (data, model, share "
            f"of flips), at random {gains[1]}, the truly flipped ones {gains[2]}. DIT is above random in {above} of "
            f"{total}. Methods that gain more than DIT: {counts}."
        )


@remembered
def _cleaned(unit: Unit, code: str) -> list[dict[str, object]]:
    """What came of every way to flag, and of none."""
    found = flipped_scores(unit.case, unit.seed, unit.share)
    workload = unit.case.workload(unit.seed, unit.share)
    n = workload.num_samples
    strategies = {name: found.of(*key)[None] for name, key in STRATEGIES.items() if key[:2] in found.values}
    strategies[RANDOM] = random_scores(DRAWS, n, unit.seed)
    strategies[FLIPPED] = -np.isin(np.arange(n), found.corrupted).astype(float)[None]
    seeds = [(unit.seed + 1000 * repeat, unit.seed + 1000 * repeat) for repeat in range(REPEATS)]

    def without(flagged: np.ndarray) -> Workload:
        return subset(workload, np.delete(np.arange(n), flagged))

    before = tried_out(untouched(n), lambda _: workload, seeds).mean(JUDGED.name)
    rows: list[dict[str, object]] = [{"method": NO_CLEANING, "test_accuracy": before, "gain": 0.0, "precision": np.nan}]
    for trial in trials(strategies, {unit.share: len(found.corrupted)}):
        after = tried_out(trial, without, seeds).mean(JUDGED.name)
        precision = trial.found(found.corrupted).values[PRECISION.leaf]
        rows.append({"method": trial.strategy, "test_accuracy": after, "gain": after - before, "precision": precision})
    return rows
