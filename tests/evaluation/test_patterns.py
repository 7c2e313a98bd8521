from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

from dit_mlflow import Influence, InputError, Window
from dit_mlflow.evaluation.patterns import (
    correlations_by_pattern,
    pattern_counts,
    patterns,
    standardised_scores,
    window_correlations,
)


def influence(scores: list[list[float]]) -> Influence:
    """Of samples by windows."""
    values = np.array(scores).T[:, None]
    windows = tuple(Window(k, k + 1) for k in range(len(values)))
    return Influence(values, windows, ("loss",), np.arange(len(scores)), "local", "dit")


KINDS = {
    "early": [8.0, 1.0, 0.5, 0.5],
    "late": [0.0, 0.5, 1.0, 8.0],
    "stable": [2.0, 2.0, 2.0, 2.0],
    "fluctuating": [3.0, -3.0, 3.0, -3.0],
    "none": [0.0, 0.0, 0.0, 0.0],
}
SCALES = [10.0, 3.0, 1.0, 0.01]


def test_patterns_do_not_depend_on_how_large_a_windows_scores_are() -> None:
    rows = [*KINDS.values(), *([-x for x in row] for row in KINDS.values())]
    found = patterns(influence(rows))
    assert found.tolist() == [*KINDS, *KINDS]
    scaled = [[x * scale for x, scale in zip(row, SCALES, strict=True)] for row in rows]
    assert patterns(influence(scaled)).tolist() == found.tolist()
    assert pattern_counts(found).values == dict.fromkeys(("early", "late", "stable", "fluctuating"), 2.0)


def test_a_middle_window_counts_half_to_each_side() -> None:
    rows = [[2.0, 2.0, 0.0], [0.0, 2.0, 2.0], [2.0, 0.1, 0.0]]
    assert patterns(influence(rows), concentrated=0.74).tolist()[2] == "early"
    assert patterns(influence(rows), concentrated=0.99).tolist() == ["stable", "stable", "stable"]


def test_window_correlations_are_of_ranks() -> None:
    found = window_correlations(influence([[1.0, 9.0, 5.0], [2.0, 4.0, 5.0], [3.0, 1.0, 5.0]]))
    np.testing.assert_allclose(found[:2, :2], [[1, -1], [-1, 1]])
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize("settings", [{"concentrated": 0.5}, {"mixed": 0.6}])
def test_definitions_that_overlap_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected 2 windows or more"):
        patterns(influence([[1.0, 2.0]]), **settings)
    with pytest.raises(InputError, match="patterns of 1 windows"):
        patterns(influence([[1.0]]))


def test_agreement_by_pattern() -> None:
    names = np.repeat(["early", "late", "stable"], [10, 9, 11])
    estimate = np.concatenate([np.arange(10.0), np.arange(9.0), np.arange(11.0)])
    truth = np.concatenate([np.arange(10.0), np.arange(9.0), -np.arange(11.0)])
    found = correlations_by_pattern(estimate, truth, names)
    assert found.values["early/spearman"] == pytest.approx(1)
    assert found.values["stable/pearson"] == pytest.approx(-1)
    assert found.undefined.keys() == {"late/spearman", "late/pearson"}
    assert "ground truth: 9 samples" in found.undefined["late/pearson"]


def test_scores_without_a_finite_value_count_as_none() -> None:
    found = standardised_scores(influence([[np.nan, 4.0], [2.0, 2.0], [3.0, 0.0]]))
    np.testing.assert_allclose(found[0], np.array([0, 2, 3]) / np.sqrt(13 / 3))


def test_window_correlations_are_those_of_each_pair_of_windows_alone() -> None:
    """Some windows have scores of fewer samples; one is constant, one has ties, one has a single score."""
    scores = np.random.default_rng(0).standard_normal((6, 30))
    scores[1, :10], scores[2, 5:25] = np.nan, np.nan
    scores[3], scores[4] = 2.0, scores[4].round()
    scores[5, 1:] = np.nan
    found = window_correlations(influence(scores.T.tolist()))
    for a, b in np.ndindex(6, 6):
        known = np.isfinite(scores[a]) & np.isfinite(scores[b])
        if {a, b} & {3, 5}:
            assert np.isnan(found[a, b])
        else:
            expected = stats.spearmanr(scores[a, known], scores[b, known]).statistic
            np.testing.assert_allclose(found[a, b], expected, rtol=1e-12)


def test_window_correlations_of_many_windows_take_no_time() -> None:
    """Each pair alone took a millisecond: 500 windows took minutes."""
    scores = np.random.default_rng(0).standard_normal((500, 40))
    begun = time.process_time()
    found = window_correlations(influence(scores.T.tolist()))
    assert time.process_time() - begun < 2.0
    np.testing.assert_allclose(found.diagonal(), 1.0)
