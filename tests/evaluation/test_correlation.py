from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats

from dit_mlflow.evaluation import correlation_intervals, correlations, correlations_with_intervals, detection

NAN = np.nan


def test_values_by_hand() -> None:
    """Ranks (1 2 3 4) against (1 3 2 4): rho = 1 - 6*2/60, tau = (5-1)/6; the single highest score is the same."""
    found = correlations(np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0])).values
    assert found == pytest.approx(
        {"pearson": 0.8, "spearman": 0.8, "kendall": 2 / 3, "jaccard_30": 1.0, "jaccard_bottom_30": 1.0}
    )


def test_jaccard_of_the_top_thirty_percent() -> None:
    """Top 3 of 10: {9, 8, 7} and {9, 8, 0}: 2 shared of 4."""
    truth = np.arange(10.0)
    truth[[0, 7]] = truth[[7, 0]]
    assert correlations(np.arange(10.0), truth).values["jaccard_30"] == pytest.approx(0.5)


def test_samples_without_a_score_are_left_out() -> None:
    estimate = np.array([NAN, 1.0, 2.0, 3.0, 9.0])
    truth = np.array([5.0, 1.0, 2.0, 3.0, NAN])
    assert correlations(estimate, truth).values["pearson"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("estimate", "truth", "reason"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "all 3 estimated scores are equal"),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], "all 3 ground truth scores are equal"),
        ([1.0, NAN], [1.0, 2.0], "both an estimate and ground truth: 1 samples"),
        ([1.0, 1 + 2**-52, 1.0], [1.0, 2.0, 3.0], "all 3 estimated scores are equal but for rounding (from 1.0 to 1.0"),
    ],
)
def test_undefined_figures_have_a_reason(estimate: list[float], truth: list[float], reason: str) -> None:
    found = correlations(np.array(estimate), np.array(truth))
    assert not found.values
    assert set(found.undefined) == {"pearson", "spearman", "kendall", "jaccard_30", "jaccard_bottom_30"}
    assert all(why.startswith(reason) for why in found.undefined.values())


def test_resamples_constant_but_for_rounding_take_no_part() -> None:
    """One score in ten tells the estimate from a constant; every third resample is without it."""
    estimate = 1 + 2**-52 * np.arange(10.0)
    estimate[0] = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = correlation_intervals(estimate, np.arange(10.0), names=["pearson"])["pearson"]
    assert -1 <= low <= high < 0


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    generator = np.random.default_rng(0)
    truth = generator.normal(size=80)
    estimate = truth + generator.normal(size=80)
    estimate[3] = np.nan
    low, high = correlation_intervals(estimate, truth, resamples=2000)["pearson"]
    known = np.isfinite(estimate)
    expected = stats.bootstrap(
        (estimate[known], truth[known]),
        lambda a, b: stats.pearsonr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert correlation_intervals(np.ones(5), np.arange(5.0)) == {}


def test_bottom_jaccard_looks_at_the_lowest() -> None:
    truth = np.arange(10.0)
    estimate = np.array([0, 1, 2, 5, 6, 7, 8, 9, 3, 4.0])
    found = correlations(estimate, truth).values
    assert found["jaccard_bottom_30"] == 1
    assert found["jaccard_30"] == pytest.approx(1 / 5)


def test_of_a_handful_of_samples_nothing_is_told() -> None:
    nine, ten = np.arange(9.0), np.arange(10.0)
    assert correlation_intervals(nine, nine**2) == {}
    told = correlations_with_intervals(nine, nine**2, ["spearman"])
    assert told.values == {}
    assert told.undefined == {"spearman": "both an estimate and ground truth: 9 samples; at least 10 are needed"}
    told = correlations_with_intervals(ten, ten**2, ["spearman"])
    assert told.values == pytest.approx({"spearman": 1, "spearman_low": 1, "spearman_high": 1})
    # Alone, as a function of two vectors, the correlation is what it is.
    assert correlations(nine, nine**2).values["spearman"] == pytest.approx(1)


def test_no_figure_depends_on_the_order_of_the_samples() -> None:
    generator = np.random.default_rng(0)
    estimate, truth = generator.integers(0, 4, size=(2, 60)).astype(float)
    corrupted = generator.random(60) < 0.2
    agreement = correlations(estimate, truth).values
    found = detection(estimate, np.flatnonzero(corrupted).tolist()).values
    for _ in range(5):
        order = generator.permutation(60)
        assert correlations(estimate[order], truth[order]).values == pytest.approx(agreement, abs=1e-12)
        damaged = np.flatnonzero(corrupted[order]).tolist()
        assert detection(estimate[order], damaged).values == pytest.approx(found, abs=1e-12)


def test_jaccard_of_sparse_scores_that_share_nothing_is_that_of_chance() -> None:
    """Top 30 of 100: 5 ones and 25 of the 95 zeros in each; shared are on average 2 (5 · 25/95) + 90 (25/95)²."""
    first, second = np.zeros(100), np.zeros(100)
    first[:5] = second[50:55] = 1
    shared = 2 * 5 * 25 / 95 + 90 * (25 / 95) ** 2
    assert correlations(first, second).values["jaccard_30"] == pytest.approx(shared / (60 - shared))

    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        chosen = [set(np.lexsort((generator.random(100), -scores))[:30]) for scores in (first, second)]
        drawn.append(len(chosen[0] & chosen[1]))
    assert shared == pytest.approx(np.mean(drawn), abs=0.15)
