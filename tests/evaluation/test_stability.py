from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from dit_mlflow import InputError
from dit_mlflow.evaluation import stability
from dit_mlflow.evaluation.stability import variance_components


def simulated(a: int, b: int, samples: int, init: float, order: float, rest: float) -> np.ndarray:
    """Scores with these standard deviations around a mean of each sample."""
    generator = np.random.default_rng(0)
    parts = [(1, 1, 1.0), (a, 1, init), (1, b, order), (a, b, rest)]
    return sum((generator.normal(scale=scale, size=(*shape, samples)) for *shape, scale in parts), np.zeros(()))


def test_components_are_recovered() -> None:
    scores = simulated(4, 3, 20_000, init=2.0, order=1.0, rest=0.5)
    np.testing.assert_allclose(variance_components(scores).mean(axis=1), [4, 1, 0.25], rtol=0.03)
    found = stability(scores).values
    shares = [found[f"share_{name}"] for name in ("init", "order", "rest")]
    np.testing.assert_allclose(shares, np.array([4, 1, 0.25]) / 5.25, atol=0.01)
    assert found["components_cut"] == 0


def test_components_by_hand() -> None:
    """Rows differ by 2, columns by 1, no interaction: variances 2 and 0.5 of (0, 2) and (0, 1)."""
    scores = np.array([[0.0, 1.0], [2.0, 3.0]])[:, :, None]
    np.testing.assert_allclose(variance_components(scores)[:, 0], [2, 0.5, 0])


def test_a_negative_component_is_cut_and_counted() -> None:
    """Pure interaction: both main effects come out negative."""
    found = stability(np.array([[1.0, -1.0], [-1.0, 1.0]])[:, :, None] * [1, 2, 3] + np.arange(3) * 10).values
    assert [found[name] for name in ("share_init", "share_order", "share_rest", "components_cut")] == [0, 0, 1, 2]


def test_agreement_is_the_mean_over_pairs_inside_its_interval() -> None:
    scores = simulated(3, 2, 50, init=0.5, order=0.5, rest=0.5)
    scores[1, 1, 7] = np.nan
    runs = np.delete(scores, 7, axis=2).reshape(6, -1)
    expected = np.mean([stats.spearmanr(a, b).statistic for a, b in combinations(runs, 2)])
    found = stability(scores).values
    assert found["spearman"] == pytest.approx(expected)
    assert found["spearman_low"] < expected < found["spearman_high"] < 1


@pytest.mark.parametrize(
    ("scores", "names", "reason"),
    [
        (np.random.default_rng(0).normal(size=(1, 4, 9)), {"share_init", "share_order", "share_rest"}, "at least 2"),
        (np.ones((2, 2, 1)) * np.arange(9), {"share_init", "share_order", "share_rest"}, "do not differ"),
        (np.random.default_rng(0).normal(size=(2, 2, 9)) * [[[1], [0]], [[1], [1]]], {"spearman"}, "runs 0 and 1: all"),
    ],
)
def test_undefined_figures_have_a_reason(scores: np.ndarray, names: set[str], reason: str) -> None:
    found = stability(scores)
    assert set(found.undefined) == names
    assert all(reason in why for why in found.undefined.values())
    assert not names & set(found.values)


def test_scores_need_both_axes_of_seeds() -> None:
    with pytest.raises(InputError, match="init seeds, order seeds"):
        stability(np.ones((4, 9)))
