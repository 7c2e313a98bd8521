"""Write docs/figures.md from dit_mlflow/evaluation/figures.py: ``python docs/figures.py``."""

from __future__ import annotations

from pathlib import Path

from dit_mlflow.evaluation.figures import ATTAINABLE, BY_WINDOW, CHANCE, FIGURES, HIGH, LOW, Figure

DIRECTION = {True: "higher", False: "lower", None: "–"}

FORMS = {"": "itself", LOW: f"`…{LOW}`", HIGH: f"`…{HIGH}`", CHANCE: f"`…{CHANCE}`", BY_WINDOW: f"`{BY_WINDOW}…`"}
FORMS[ATTAINABLE] = f"`{ATTAINABLE}…`"

HEAD = """# Every figure that is logged

Written by `python docs/figures.py` from `dit_mlflow/evaluation/figures.py`. How to add one:
[extending/figure.md](extending/figure.md).

The name is that of the metric in MLflow; the heading stands above it in tables and plots; better is what is higher or
lower, or – where neither is. A figure that is undefined is not logged: the tag `dit.undefined.<name>` says why. Longer
names are made of a figure's:

| | |
|---|---|
| `…_low`, `…_high` | ends of its interval, 95 % |
| `…_chance` | what scores in random order give, for `detection/…` |
| `ground_truth/attainable_…` | of exact retraining, in the recorded precision, with itself: the most to be asked |
| `by_window/…` | its value in each window; the step is the window's number |
| `mean_over_windows/…` | with a model: the mean of these |
| `patterns/early/spearman`, … | agreement among the samples of a pattern |
| `before/…`, `by_fraction/…` | of `cleanse`: without cleaning; over the number of samples cleaned |
| `gain/…` | of `cleanse`: how much better it is than without cleaning; higher is better, of a loss too |
| `…_lowest_draw`, `…_highest_draw` | of `cleanse`: the least and the largest over random draws of samples |

`validation/…` and `test/…` are also the metrics of a workload, by the names that `Workload.metrics` gives them, such as
`accuracy`: means over the split, of which higher is taken to be better.

**Default** are the names in the column of that heading (itself: the figure's own name); one with two of these forms,
such as `by_window/ground_truth/attainable_spearman`, is not. `-P all_figures=true` (`--all-figures`) logs all of
them. The tables `windows.json`, `comparison.json` and `cleansing.json` hold all figures of windows, methods and trials,
whatever is logged. A correlation over fewer than 10 samples, or an LDS
over fewer than 10 subsets, is never logged; the tag says so.

| name | heading | unit | better | default | what it says |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The page, Markdown."""
    return HEAD + "".join(map(_row, FIGURES.values()))


def _row(figure: Figure) -> str:
    better = DIRECTION[figure.higher_is_better]
    default = ", ".join(FORMS[form] for form in figure.forms if form in FORMS) or "–"
    return f"| `{figure.name}` | {figure.heading} | {figure.unit or '–'} | {better} | {default} | {figure.sentence} |\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
