"""Flipped labels among the lowest scores: by method, window and share of flips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dit_mlflow.evaluation import detection
from dit_mlflow.evaluation.figures import (
    AUROC,
    AVERAGE_PRECISION,
    BY_WINDOW,
    DETECTION,
    DETECTION_ACCURACY,
    RECALL_AT_K,
)
from dit_mlflow.plots.canvas import HARMFUL, HELPFUL, MARKED, NEUTRAL

from .cases import Case, seeds_of
from .panels import legend_above, of_case, over_epochs, panels
from .scored import TENTH, THIRDS, WHOLE, flipped_scores
from .table import Series, Table, Unit, by_case, every_seed, grid, mean_of, number

SHARES = (0.04, 0.08, TENTH, 0.12, 0.16, 0.2, 0.3)
FEW_SHARES = (TENTH, 0.3)
MEASURES = (DETECTION_ACCURACY.leaf, RECALL_AT_K.leaf, AUROC.leaf, AVERAGE_PRECISION.leaf)
CLAIMED = 0.98
"""Accuracy in finding flipped labels, "above" (arXiv 2502.10793, abstract)."""

MARGIN = 0.01
"""AUROC that counts as no difference."""

SOURCES = {
    ("dit", "local"): "DIT",
    ("leave_one_out", "local"): "exact leave-one-out",
    ("tracin", "none"): "TracIn",
    ("influence_function", "none"): "influence function",
    ("loss", "none"): "loss",
    ("aum", "none"): "AUM",
    ("confident_learning", "none"): "confident learning (cleanlab)",
}
"""Methods compared over the whole run, for which all kinds are the same."""

SOURCES_OF = {method: words for (method, _), words in SOURCES.items()}

PUBLISHED = {
    ("adult", "logreg"): {0.1: 0.53, 0.2: 0.66, 0.3: 0.69},
    ("adult", "dnn"): {0.1: 0.53, 0.2: 0.65, 0.3: 0.72},
}
"""Recall among the lowest k, measured with the published code."""


LINES = {
    "dit": (HELPFUL, "--", "DIT, all of training"),
    "leave_one_out": ("black", ":", "exact leave-one-out, all of training"),
    "loss": (HARMFUL, "-.", "loss at the end"),
    "confident_learning": (MARKED, "-", "confident learning"),
}
"""What the figure shows."""


class Detection(Table):
    """How well low scores find flipped labels."""

    name = "detection"
    title = "Flipped labels"
    facets = ("kind", "window", "share")
    figures = (*MEASURES, "seconds", "loss_fallen")

    def units(self, cases: Sequence[Case], seeds: int, quick: bool) -> list[Unit]:
        return [
            Unit(case, seed, share)
            for case in cases
            for seed in seeds_of(case, seeds)
            # Of the CNNs, of which a unit takes up to minutes, few.
            for share in (FEW_SHARES if quick or not case.detects else SHARES)
        ]

    def measure(self, unit: Unit) -> pd.DataFrame:
        found = flipped_scores(unit.case, unit.seed, unit.share)
        rows = []
        for method, kind in found.values:
            for window in found.windows:
                values = detection(found.of(method, kind, window), found.corrupted).values
                if not values:
                    continue
                spent = " ".join((method, *(() if kind == "none" else (kind,)), window))
                row = {
                    "kind": kind,
                    "window": window,
                    "share": unit.share,
                    **{name: values[name] for name in MEASURES},
                    "seconds": found.seconds.get(spent, np.nan),
                    "loss_fallen": found.figures.get(f"loss_fallen_by_{window}", np.nan) if method == "dit" else np.nan,
                }
                rows.append(
                    {"data": unit.case.data, "model": unit.case.model, "method": method, "seed": unit.seed, **row}
                )
        return pd.DataFrame(rows)

    def series(self, rows: pd.DataFrame) -> Iterable[Series]:
        """Over the share of flips in percent; of single epochs, over epochs, by share."""
        for row in rows.to_dict("records"):
            percent = round(100 * row["share"])
            for name in MEASURES:
                if str(row["window"]).isdecimal():
                    yield f"{BY_WINDOW}flipped_{percent}/{DETECTION}{name}", int(row["window"]), row[name]
                else:
                    place = WHOLE if row["window"] == WHOLE else f"{row['kind']}_{row['window']}"
                    yield f"by_percent_flipped/{place}/{DETECTION}{name}", percent, row[name]

    def condensed(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Leave out single epochs, which the figure shows."""
        return rows[~rows["window"].astype(str).str.isdecimal()]

    def figure(self, rows: pd.DataFrame) -> Figure:
        """AUROC of each epoch's scores, a panel for each case; all of training as lines."""
        shown = rows[rows["share"] == TENTH]
        figure, drawn = panels(shown, 3, 1.9)
        for case, axes in drawn.items():
            own = of_case(shown, case)
            epochs = own[(own["method"] == "dit") & own["window"].astype(str).str.isdecimal()]
            over_epochs(axes, epochs, AUROC.leaf, HELPFUL, "DIT, one epoch")
            whole = own[own["window"] == WHOLE].groupby("method")[AUROC.leaf].mean()
            for method, (colour, style, label) in LINES.items():
                if method in whole:
                    axes.axhline(whole[method], color=colour, ls=style, lw=1.1, label=label)
            axes.axhline(0.5, color=NEUTRAL, lw=0.6)
        legend_above(figure, 3)
        figure.supylabel(f"{AUROC.heading}, {100 * TENTH:.0f} % flipped (chance 0.5)", fontsize=10)
        figure.supxlabel("epoch; line: mean over seeds, band: all seeds", fontsize=10)
        return figure

    def section(self, rows: pd.DataFrame) -> str:
        whole = rows[rows["window"] == WHOLE].assign(
            by=lambda table: [SOURCES[pair] for pair in zip(table["method"], table["kind"], strict=True)]
        )
        thirds = rows[(rows["method"] == "dit") & (rows["kind"] == "local")]
        shares = sorted(rows["share"].unique())
        words = [*_accuracy_words(whole), *_convergence_words(thirds)]
        at = whole[whole["share"] == TENTH]
        percent = f"{100 * TENTH:.0f} % flipped"
        names = list(SOURCES.values())
        words += [
            f"## All of training, AUROC, {percent}\n",
            grid(at, ["data", "model"], "by", names, lambda cell: mean_of(cell[AUROC.leaf], 2)),
            "## All of training, accuracy of DIT by share of flips (flagging none: 1 minus the share)\n",
            _by_share(whole[whole["method"] == "dit"], DETECTION_ACCURACY.leaf, shares),
            "## All of training, recall among the k lowest, k = number flipped (chance: the share)\n",
            "DIT:\n",
            _by_share(whole[whole["method"] == "dit"], RECALL_AT_K.leaf, shares),
            "Exact leave-one-out (not of the CNNs, where it costs too much):\n",
            _by_share(whole[whole["method"] == "leave_one_out"], RECALL_AT_K.leaf, shares),
            "Confident learning:\n",
            _by_share(whole[whole["method"] == "confident_learning"], RECALL_AT_K.leaf, shares),
            f"## Parts of training, AUROC of DIT, {percent}\n",
            grid(
                rows[(rows["method"] == "dit") & (rows["share"] == TENTH)],
                ["data", "model", "kind"],
                "window",
                [*THIRDS, WHOLE],
                lambda cell: mean_of(cell[AUROC.leaf], 2),
            ),
            f"Exact leave-one-out, `local`, {percent}:\n",
            grid(
                rows[(rows["method"] == "leave_one_out") & (rows["share"] == TENTH)],
                ["data", "model"],
                "window",
                [*THIRDS, WHOLE],
                lambda cell: mean_of(cell[AUROC.leaf], 2),
            ),
            f"## Every seed: AUROC of DIT, all of training, {percent}\n",
            every_seed(at[at["method"] == "dit"], ["data", "model"], AUROC.leaf),
            *_published(whole),
        ]
        return "\n\n".join(words)


def _by_share(rows: pd.DataFrame, figure: str, shares: Sequence[float]) -> str:
    named = rows.assign(percent=[f"{100 * share:.0f} %" for share in rows["share"]])
    return grid(
        named,
        ["data", "model"],
        "percent",
        [f"{100 * share:.0f} %" for share in shares],
        lambda cell: mean_of(cell[figure], 2),
    )


def _accuracy_words(whole: pd.DataFrame) -> list[str]:
    means = whole.groupby(["method", "data", "model", "share"], sort=False)[DETECTION_ACCURACY.leaf].mean()
    dit = means["dit"]
    held = dit[dit > CLAIMED]
    where = "; ".join(f"{data} {model} at {100 * share:.0f} %" for data, model, share in held.index) or "nowhere"
    compared = [name for name in ("leave_one_out", "confident_learning", "loss") if name in means]
    counts = ", ".join(
        f"{SOURCES_OF[name]} in {(means[name] > CLAIMED).sum()} of {len(means[name])}" for name in compared
    )
    fewest = dit.index.get_level_values("share").min()
    return [
        f"**Claim: more than {100 * CLAIMED:.0f} % of the samples are told rightly.** DIT over all of training reaches "
        f"that mean accuracy in {len(held)} of {len(dit)} settings (data, model, share of flips): {where}. With few "
        f"flips, accuracy flatters: flagging nothing is right for {100 * (1 - fewest):.0f} % of the samples where "
        f"{100 * fewest:.0f} % are flipped. Of the others, {counts}."
    ]


def _convergence_words(thirds: pd.DataFrame) -> list[str]:
    table = thirds[thirds["window"].isin(["late", WHOLE])].pivot_table(
        index=["data", "model", "seed", "share"], columns="window", values=[AUROC.leaf, "seconds"]
    )
    early = thirds[thirds["window"].isin(["early", WHOLE])].pivot_table(
        index=["data", "model", "seed", "share"], columns="window", values=AUROC.leaf
    )
    differences = (table[AUROC.leaf]["late"] - table[AUROC.leaf][WHOLE]).groupby(["data", "model"], sort=False).mean()
    ratio = (table["seconds"]["late"] / table["seconds"][WHOLE]).median()
    fallen = thirds[thirds["window"] == "late"]["loss_fallen"].median()
    good, bad = differences[differences >= -MARGIN], differences[differences < -MARGIN]
    first = (early["early"] - early[WHOLE]).groupby(["data", "model"], sort=False).mean()

    return [
        "**Claim: the convergence period finds flipped labels as well as all of training, for less.** Taken as the "
        f"last third of the steps, before which the validation loss had fallen by {100 * fallen:.0f} % (median) of all "
        f"that it falls, a `local` sweep over it costs {number(ratio, 2)} of the sweep over all of training (median, "
        f"CPU time). Its AUROC is as good (less than {MARGIN} below, in the mean over shares of flips and seeds) in "
        f"{len(good)} of {len(differences)} cases: {by_case(good, 3)}. It is worse in {by_case(bad, 3) or 'none'} "
        f"(difference of AUROC). The first third is as good in "
        f"{(first >= -MARGIN).sum()} of {len(first)}."
    ]


def _published(whole: pd.DataFrame) -> list[str]:
    lines = []
    for (data, model), recalls in PUBLISHED.items():
        own = whole[(whole["data"] == data) & (whole["model"] == model) & (whole["method"] == "dit")]
        for share, theirs in recalls.items():
            values = own[np.isclose(own["share"], share)][RECALL_AT_K.leaf]
            if len(values):
                cells = {
                    "ours": mean_of(values, 2),
                    "published code": number(theirs, 2),
                    "gap": number(values.mean() - theirs, 2),
                }
                lines += [
                    {"data": data, "model": model, "flipped": f"{100 * share:.0f} %", "of": name, "value": text}
                    for name, text in cells.items()
                ]
    if not lines:
        return []
    table = grid(
        pd.DataFrame(lines),
        ["data", "model", "flipped"],
        "of",
        ("ours", "published code", "gap"),
        lambda cell: str(cell["value"].iloc[0]),
    )
    return ["## Recall among the k lowest, against the published code\n", table]
