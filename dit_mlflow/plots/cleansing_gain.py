"""Did cleaning help? Test figure against the share of samples cleaned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit_mlflow.evaluation.figures import HIGH, LOW, SHARE, TEST, figure_of
from dit_mlflow.evaluation.trials import NO_CLEANING, RANDOM, Cleansing, Outcome, rank
from dit_mlflow.plots.canvas import MARKERS, NEUTRAL, PALETTE, literal

MAX_LINES = len(PALETTE)
"""Most strategies that are drawn: those that are best on the validation split."""


def plot_cleansing(cleansing: Cleansing) -> Figure:
    """Test figure against the share of samples that is cleaned; a line for each strategy.

    Bars are intervals of the mean over pairs of seeds; the band reaches from the lowest to the highest random draw; the
    ring marks what the validation split chose (at 0 on the line without cleaning, if it chose to clean nothing).
    """
    judged = figure_of(TEST + cleansing.metric)
    name, scale = judged.name, 100 if judged.unit == SHARE else 1
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    before = scale * cleansing.before.mean(name)
    axes.axhline(before, color="black", lw=1, ls="--", label=NO_CLEANING)
    shares = sorted({100 * outcome.trial.fraction for outcome in cleansing.outcomes})
    # Side by side, so that bars do not cover each other; narrower than the gaps between fractions.
    apart = 0.06 * min(np.diff(shares), default=1.0)
    if RANDOM in cleansing.strategies:
        _band(axes, cleansing.by(RANDOM), name, scale)
    strategies = _drawn(cleansing)
    for place, strategy in enumerate(strategies):
        shift = apart * (place - (len(strategies) - 1) / 2)
        x, mean = _line(axes, cleansing.by(strategy), name, scale, place, shift)
        if cleansing.chosen in cleansing.by(strategy):
            here = cleansing.by(strategy).index(cleansing.chosen)
            _ring(axes, x[here], mean[here])
    if cleansing.chosen is cleansing.before:
        _ring(axes, 0, before)
    axes.set_xlim(-apart, max(shares) + 8 * apart)
    axes.set_xticks(shares)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:g} %")
    done = {"drop": "dropped", "relabel": "given another label", "reweight": "given a lower weight"}
    axes.set_xlabel(f"training samples {done[cleansing.action]}")
    axes.set_ylabel(f"{literal(judged.heading, 60)}{' (%)' if scale == 100 else ''}\nbars: 95 % interval over seeds")
    axes.set_title(f"Does cleaning help? ({'higher' if judged.higher_is_better else 'lower'} is better)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _drawn(cleansing: Cleansing) -> list[str]:
    """Strategies to draw a line for, in their order."""
    strategies = [strategy for strategy in cleansing.strategies if strategy != RANDOM]
    best = {strategy: min(rank(o, cleansing.metric) for o in cleansing.by(strategy)) for strategy in strategies}
    kept = sorted(strategies, key=lambda strategy: best[strategy])[:MAX_LINES]
    return [strategy for strategy in strategies if strategy in kept]


def _line(
    axes: Axes, outcomes: Sequence[Outcome], name: str, scale: float, place: int, shift: float
) -> tuple[np.ndarray, np.ndarray]:
    """A strategy's means with their intervals; returns where they were drawn."""
    found = [outcome.summary().values for outcome in outcomes]
    x = np.array([100 * outcome.trial.fraction for outcome in outcomes]) + shift
    mean = scale * np.array([values[name] for values in found])
    ends = [[values.get(name + end, values[name]) for values in found] for end in (LOW, HIGH)]
    style: dict[str, Any] = {"marker": MARKERS[place], "color": PALETTE[place], "label": outcomes[0].trial.strategy}
    style |= {"capsize": 3, "lw": 1.6, "elinewidth": 1}
    axes.errorbar(x, mean, yerr=np.abs(scale * np.array(ends) - mean), **style)
    return x, mean


def _band(axes: Axes, outcomes: Sequence[Outcome], name: str, scale: float) -> None:
    x = [100 * outcome.trial.fraction for outcome in outcomes]
    draws = [scale * outcome.figures[name].mean(axis=1) for outcome in outcomes]
    low, high = [found.min() for found in draws], [found.max() for found in draws]
    axes.fill_between(x, low, high, color=NEUTRAL, alpha=0.25, lw=0)
    label = f"{RANDOM}, {len(draws[0])} draws (band: lowest to highest)"
    axes.plot(x, [found.mean() for found in draws], color=NEUTRAL, lw=1.5, marker="x", label=label)


def _ring(axes: Axes, x: float, y: float) -> None:
    style: dict[str, Any] = {"mfc": "none", "mec": "black", "mew": 1.3, "ls": "none", "zorder": 5, "clip_on": False}
    axes.plot([x], [y], marker="o", ms=15, label="chosen on the validation split", **style)
