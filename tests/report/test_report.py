"""Figures and tables show the numbers they were given."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from dit_mlflow import Influence, Window
from dit_mlflow.evaluation import Metrics
from dit_mlflow.report import plot_against_truth, plot_top_samples, terminal_table, top_samples_table, windows_table
from dit_mlflow.report.plots import HARMFUL

WINDOWS = (Window(0, 4), Window(4, 8), Window(8, 12))


def influence(seed: int) -> Influence:
    scores = np.random.default_rng(seed).standard_normal((3, 1, 20))
    return Influence(scores, WINDOWS, ("loss",), np.arange(20), "local", "dit")


def test_top_samples_are_drawn_with_their_scores() -> None:
    found = influence(0)
    axes = plot_top_samples(found, k=2, describe=lambda index: f"cost $5 and $6 of {index} " + "x" * 99).axes[0]
    lines = {line.get_label().split(":")[0]: line for line in axes.get_lines() if ":" in str(line.get_label())}
    assert len(lines) == 4
    for sample, line in lines.items():
        np.testing.assert_array_equal(line.get_ydata(), found.scores[:, 0, int(sample)])
        assert len(str(line.get_label())) < 60
    lowest = found.scores[:, 0].mean(axis=0).argmin()
    assert lines[str(lowest)].get_color() == HARMFUL
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0-4", "4-8", "8-12"]


def test_scatter_shows_every_sample_and_marks_the_corrupted() -> None:
    estimate, truth = influence(0), influence(1)
    truth.scores[:, :, 7] = np.nan
    figure = plot_against_truth(estimate, truth, range(3), corrupted=[2, 3])
    assert len(figure.axes) == 3
    clean, marked = (c for c in figure.axes[1].collections if isinstance(c, PathCollection))
    offsets = np.asarray(marked.get_offsets())
    np.testing.assert_array_equal(offsets, np.c_[truth.of(1)[[2, 3]], estimate.of(1)[[2, 3]]])
    assert len(np.asarray(clean.get_offsets())) == 18
    known = np.isfinite(truth.of(1))
    pearson = np.corrcoef(estimate.of(1)[known], truth.of(1)[known])[0, 1]
    assert f"Pearson {pearson:.3f}" in figure.axes[1].get_title()


@pytest.mark.parametrize("count", [1, 2, 40])
def test_many_windows_stay_readable(count: int) -> None:
    windows = tuple(Window(t, t + 1) for t in range(count))
    scores = np.random.default_rng(0).standard_normal((count, 1, 5))
    result = Influence(scores, windows, ("loss",), np.arange(5), "local", "dit")
    assert len(plot_against_truth(result, result, range(count)).axes) == min(count, 12)
    plot_top_samples(result).canvas.draw()


def test_windows_table_names_extremes_and_metrics() -> None:
    found = influence(0)
    metrics = [Metrics({"ground_truth/spearman": 0.5 + index / 10}) for index in range(3)]
    table = windows_table(found, metrics)
    assert table["most_harmful"].tolist() == [int(found.of(index).argmin()) for index in range(3)]
    assert table["most_helpful"].tolist() == [int(found.of(index).argmax()) for index in range(3)]
    assert table["ground_truth/spearman"].tolist() == [0.5, 0.6, 0.7]
    text = terminal_table(table, {"start": "from", "ground_truth/spearman": "Spearman", "absent": "x"})
    assert text.splitlines()[1].split() == ["0", "0.500"]


def test_top_samples_table_carries_truth_and_descriptions() -> None:
    estimate, truth = influence(0), influence(1)
    table = top_samples_table(estimate, truth, corrupted=[4], describe=lambda index: f"sample {index}")
    row = table[(table["window_start"] == 4) & (table["side"] == "helpful") & (table["rank"] == 1)].iloc[0]
    best = int(estimate.of(1).argmax())
    assert (row["sample_index"], row["sample"], row["score"]) == (best, f"sample {best}", estimate.of(1)[best])
    assert row["leave_one_out"] == truth.of(1)[best]
    assert (table["corrupted"] == (table["sample_index"] == 4)).all()


def test_scores_that_are_all_zero_can_be_shown() -> None:
    """A window in which no sample moved anything: no extremes, no correlation, no failure."""
    flat = Influence(np.zeros((3, 1, 20)), WINDOWS, ("loss",), np.arange(20), "local", "dit")
    assert windows_table(flat, [Metrics()] * 3)["most_harmful"].isna().all()
    plot_top_samples(flat).canvas.draw()
    plot_against_truth(flat, flat, range(3)).canvas.draw()
