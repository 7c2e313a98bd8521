"""Figures and tables show the numbers they were given."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from torch.utils.data import TensorDataset

from dit_mlflow import Influence, Window, Workload
from dit_mlflow.evaluation import Metrics, patterns
from dit_mlflow.explanation import Gallery, terminal_table, top_samples_table, whole_run_table, windows_table
from dit_mlflow.plots import (
    plot_against_truth,
    plot_fidelity_against_cost,
    plot_heat_map,
    plot_patterns,
    plot_recall_curves,
    plot_top_samples,
    plot_window_correlations,
    plot_window_samples,
)
from dit_mlflow.plots.canvas import HARMFUL, HELPFUL, NEUTRAL

WINDOWS = (Window(0, 4), Window(4, 8), Window(8, 12))


def influence(seed: int) -> Influence:
    scores = np.random.default_rng(seed).standard_normal((3, 1, 20))
    return Influence(scores, WINDOWS, ("loss",), np.arange(20), "local", "dit")


def gallery(**changes: Any) -> Gallery:
    data = TensorDataset(torch.arange(20.0)[:, None], torch.zeros(20))
    return Gallery(Workload(torch.nn.Linear(1, 1), lambda model, batch: model(batch[0])[:, 0], data, data, **changes))


def texts(figure: Figure) -> list[str]:
    """Everything that is written in a figure, drawn once so that wrong markup would show."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_top_samples_are_drawn_with_their_scores_and_stand_beside() -> None:
    found = influence(0)
    pictures = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    known = gallery(show=lambda index: pictures[index], describe=lambda index: f"cost $5 and $6 of {index} " + "x" * 99)
    figure = plot_top_samples(found, known, k=2)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines() if str(line.get_label()).isdecimal()}
    assert len(lines) == 4
    for sample, line in lines.items():
        np.testing.assert_array_equal(line.get_ydata(), found.scores[:, 0, int(sample)])
    mean = found.scores[:, 0].mean(axis=0)
    order = np.argsort(mean)
    assert lines[str(order[0])].get_color() == HARMFUL
    assert lines[str(order[-1])].get_color() == HELPFUL
    drawn = [np.asarray(image.get_array()) for image in figure.findobj(AxesImage)]
    expected = pictures[[order[-1], order[-2], order[0], order[1]]]
    np.testing.assert_array_equal(np.stack(drawn), expected)
    written = "\n".join(texts(figure))
    assert f"sample {order[0]}\ncost \\$5 and" in written
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0-4", "4-8", "8-12"]


def test_texts_and_rows_stand_beside_the_lines_as_excerpts() -> None:
    def show(index: int) -> str | dict[str, Any]:
        return f"A film about {index} {'long ' * 500}" if index % 2 else {"age": index, "dose": 1.23456, "pay": 12345.0}

    written = "\n".join(texts(plot_top_samples(influence(0), gallery(show=show), k=4)))
    harmful = int(np.argsort(influence(0).scores[:, 0].mean(axis=0))[0])
    assert (f"“A film about {harmful}" if harmful % 2 else f"age={harmful}, dose=1.23, pay=12345") in written
    assert max(map(len, written.splitlines())) < 80


def test_a_workload_whose_functions_fail_loses_only_what_they_tell(caplog: pytest.LogCaptureFixture) -> None:
    def fail(index: int) -> str:
        raise KeyError(index)

    broken = gallery(show=fail, describe=fail, label=fail)
    figure = plot_top_samples(influence(0), broken)
    assert any(text.startswith("sample ") for text in texts(figure))
    # Each of the three once, not once a sample.
    assert len(caplog.records) == 3


def test_heat_map_shows_standardised_scores_of_the_samples_that_matter() -> None:
    found = influence(0)
    size = np.sqrt((found.scores[:, 0] ** 2).mean(axis=1))
    expected = (found.scores[:, 0] / size[:, None]).T
    order = np.argsort(expected.mean(axis=1))
    rows = [*order[:4], *order[-4:]]
    figure = plot_heat_map(found, gallery(corrupted=[order[1], order[9], order[-1]]), k=4)
    axes = figure.axes[0]
    (image,) = axes.get_images()
    np.testing.assert_allclose(np.asarray(image.get_array()), expected[rows])
    assert image.get_clim()[0] == -image.get_clim()[1]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [int(label.split(":")[0]) for label in labels] == rows
    marked = np.asarray(axes.collections[0].get_offsets())[:, 1]
    assert marked.tolist() == [1, 7]


def test_patterns_count_their_samples_and_draw_their_mean() -> None:
    early, late, stable, fluctuating = [8, 1, 1], [1, 1, 8], [4, 4, 4], [5, -5, 5]
    scores = np.array([early, early, late, stable, fluctuating, [-8, -1, -1], [0, 0, 0]], dtype=float).T[:, None]
    found = Influence(scores, WINDOWS, ("loss",), np.arange(10, 17), "local", "dit")
    names = patterns(found)
    figure = plot_patterns(found, names)
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split(" samples")[0] for title in titles] == [
        f"{name}: {(names == name).sum()} of 7" for name in ("early", "late", "stable", "fluctuating")
    ]
    assert (names == "early").sum() == 3
    size = np.sqrt((scores[:, 0] ** 2).mean(axis=1))
    curve = np.abs(scores[:, 0, 0]) / size
    # Harmful and helpful alike: the three early samples have one curve.
    mean = next(line for line in figure.axes[0].get_lines() if line.get_label() == "mean")
    np.testing.assert_allclose(mean.get_ydata(), 100 * curve / curve.sum())


def test_window_samples_show_pictures_scores_and_the_exact_value() -> None:
    found = influence(0)
    exact = np.full(20, np.nan)
    order = np.argsort(found.of(1))
    exact[order[0]] = -0.25
    pictures = np.random.default_rng(0).random((20, 8, 8, 3))
    figure = plot_window_samples(found, 1, gallery(show=lambda index: pictures[index]), exact, k=3)
    written = "\n".join(texts(figure))
    assert "leave-one-out −0.25" in written
    assert written.count("leave-one-out") == 1
    for sample in (*order[:3], *order[-3:]):
        assert f"{sample}: " in written
        assert f"{found.of(1)[sample]:+.3g}".replace("-", "−") in written
    drawn = [np.asarray(image.get_array()) for image in figure.findobj(AxesImage)]
    np.testing.assert_allclose(np.stack(drawn), pictures[[*order[:3], *order[:-4:-1]]])


def test_names_of_methods_do_not_cover_one_another() -> None:
    generator = np.random.default_rng(0)
    names = [f"influence_function_{k}" for k in range(12)]
    spearman = generator.uniform(-0.3, 1, 12)
    table = pd.DataFrame({"method": names, "measures": "query", "seconds": generator.uniform(0.05, 3, 12)})
    table = table.assign(spearman=spearman, spearman_low=spearman - 0.1, spearman_high=spearman + 0.1)
    figure = plot_fidelity_against_cost(table)
    FigureCanvasAgg(figure).draw()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_everything_is_large_enough_to_read() -> None:
    """At 8 inches of width, MLflow's UI shows a point as 0.9 to 1.6 pixels."""
    found, other = influence(0), influence(1)
    known = gallery(corrupted=[1, 2])
    figures = [
        plot_top_samples(found, known),
        plot_heat_map(found, known),
        plot_patterns(found, patterns(found)),
        plot_against_truth(found, other, range(3), [1, 2]),
        plot_recall_curves({"dit": found.of(0)}, [1, 2]),
        plot_window_correlations(found),
        plot_window_samples(found, 0, known),
    ]
    for figure in figures:
        assert figure.get_figwidth() == 8
        figure.canvas.draw()
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()]
        assert min(sizes) >= 9


def test_of_many_recall_curves_those_that_find_most_are_named() -> None:
    scores = {f"m{k:02d}": np.r_[np.full(2, k), np.arange(18)].astype(float) for k in range(30)}
    figure = plot_recall_curves({"dit": -np.arange(20.0), **scores}, [0, 1])
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    # Low scores are inspected first: those that put the damaged two lowest are the first fourteen but one.
    assert [label for label in labels if str(label).startswith(("m", "dit"))] == [
        "dit",
        *(f"m{k:02d}" for k in range(13)),
    ]
    assert "17 others" in labels
    assert sum(line.get_color() == NEUTRAL for line in figure.axes[0].get_lines()) >= 17


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
    assert f"r = {pearson:.3f}" in figure.axes[1].texts[0].get_text()


@pytest.mark.parametrize("count", [1, 2, 40])
def test_many_windows_stay_readable(count: int) -> None:
    windows = tuple(Window(t, t + 1) for t in range(count))
    scores = np.random.default_rng(0).standard_normal((count, 1, 5))
    result = Influence(scores, windows, ("loss",), np.arange(5), "local", "dit")
    assert len(plot_against_truth(result, result, range(count)).axes) == min(count, 9)
    for figure in (plot_top_samples(result), plot_heat_map(result), plot_window_correlations(result)):
        FigureCanvasAgg(figure).draw()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_rotation() == 0]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_windows_table_names_extremes_and_metrics() -> None:
    found = influence(0)
    metrics = [Metrics({"ground_truth/spearman": 0.5 + index / 10}) for index in range(3)]
    table = windows_table(found, metrics)
    assert table["most_harmful"].tolist() == [int(found.of(index).argmin()) for index in range(3)]
    assert table["most_helpful"].tolist() == [int(found.of(index).argmax()) for index in range(3)]
    assert table["ground_truth/spearman"].tolist() == [0.5, 0.6, 0.7]
    text = terminal_table(table, {"start": "from", "ground_truth/spearman": "Spearman", "absent": "x"})
    assert text.splitlines()[1].split() == ["0", "0.500"]


def test_indices_stay_whole_numbers_where_a_window_harms_nobody() -> None:
    found = influence(0)
    found.scores[0] = np.abs(found.scores[0])
    text = terminal_table(windows_table(found, [Metrics()] * 3), {"most_harmful": "worst"})
    assert [line.strip() for line in text.splitlines()[1:]] == ["-", *(str(int(found.of(k).argmin())) for k in (1, 2))]


def test_top_samples_table_carries_truth_and_descriptions() -> None:
    estimate, truth = influence(0), influence(1)
    table = top_samples_table(estimate, truth, gallery(corrupted=[4], describe=lambda index: f"sample {index}"))
    row = table[(table["window_start"] == 4) & (table["side"] == "helpful") & (table["rank"] == 1)].iloc[0]
    best = int(estimate.of(1).argmax())
    assert (row["window"], row["sample_index"], row["sample"]) == ("4-8", best, f"sample {best}")
    assert row["score"] == float(f"{estimate.of(1)[best]:.4g}")
    assert row["leave_one_out"] == float(f"{truth.of(1)[best]:.4g}")
    assert (table["corrupted"] == (table["sample_index"] == 4)).all()
    # Window by window, harmful before helpful, each by rank.
    order = list(zip(table["window_start"], table["side"], table["rank"], strict=True))
    assert order == sorted(order)


def test_whole_run_table_ranks_by_exact_scores_and_shows_both() -> None:
    estimate = influence(0).select([influence(0).windows[0]])
    exact = influence(1)
    exact.scores[:, :, ::2] = np.nan
    table = whole_run_table(estimate, exact, gallery())
    first = table[table["rank"] == 1].set_index("side")
    best = np.where(np.isfinite(exact.of(0)), exact.of(0), estimate.of(0))
    for side, sample in (("harmful", best.argmin()), ("helpful", best.argmax())):
        assert first.loc[side, "sample_index"] == sample
        assert first.loc[side, "estimate"] == float(f"{estimate.of(0)[sample]:.4g}")
        expected = exact.of(0)[sample]
        assert first.loc[side, "leave_one_out"] == pytest.approx(float(f"{expected:.4g}"), nan_ok=True)
    assert "score" not in table and "leave_one_out" not in whole_run_table(estimate, None, gallery())


def test_scores_that_are_all_zero_can_be_shown() -> None:
    """A window in which no sample moved anything: no extremes, no correlation, no failure."""
    flat = Influence(np.zeros((3, 1, 20)), WINDOWS, ("loss",), np.arange(20), "local", "dit")
    assert windows_table(flat, [Metrics()] * 3)["most_harmful"].isna().all()
    assert "↓ harmful: none on average" in texts(plot_top_samples(flat))
    assert "all equal" in texts(plot_against_truth(flat, flat, range(3)))
    assert "no such sample" in texts(plot_patterns(flat, patterns(flat)))
    assert "↑ helpful: none" in texts(plot_window_samples(flat, 0))
    assert "no sample mattered on average" in texts(plot_heat_map(flat))


def test_characters_of_any_kind_are_drawn_as_they_are() -> None:
    hostile = ["$\\frac{$ $x_$", "<script>", "a\nb\x1b[31m", "\u202eright to left", "😀", "x" * 10_000]
    known = gallery(describe=lambda index: hostile[index % len(hostile)], show=lambda index: hostile[index % 6])
    figures = (plot_top_samples(influence(0), known), plot_heat_map(influence(0), known))
    for figure in (*figures, plot_window_samples(influence(0), 0, known)):
        written = "".join(texts(figure))
        assert "\x1b" not in written
        assert "\u202e" not in written


def test_names_of_methods_are_no_mathematics() -> None:
    """That of scores computed elsewhere is the name of their file."""
    name = "$\\frac{$ \x1b"
    found = replace(influence(0), method=name)
    table = pd.DataFrame({"method": [name], "measures": "query", "seconds": 1.0, "spearman": 0.5})
    figures = (
        plot_top_samples(found, gallery()),
        plot_heat_map(found, gallery()),
        plot_window_correlations(found),
        plot_against_truth(found, influence(1), [0], []),
        plot_recall_curves({name: np.arange(20.0)}, [0]),
        plot_fidelity_against_cost(table.assign(spearman_low=0.4, spearman_high=0.6)),
    )
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        assert "\x1b" not in "".join(texts(figure))
