from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from dit_mlflow import InputError
from dit_mlflow.evaluation import detection, recall_curve
from dit_mlflow.evaluation.detection import NAMES


def test_values_by_hand() -> None:
    """Corrupted 1 and 3; the two lowest scores are 1 and 0. Ranked from low: 1 (hit), 0, 3 (hit), 2, 4."""
    found = detection(np.array([-1.0, -2.0, 1.0, 0.5, 2.0]), [1, 3]).values
    assert found == pytest.approx(
        {
            "accuracy": 3 / 5,
            "recall_at_k": 1 / 2,
            "auroc": 5 / 6,
            "average_precision": (1 / 1 + 2 / 3) / 2,
            "accuracy_chance": 13 / 25,
            "recall_at_k_chance": 2 / 5,
            "auroc_chance": 1 / 2,
            "average_precision_chance": (137 / 60 + (5 - 137 / 60) / 4) / 5,
        }
    )


def test_perfect_and_worst() -> None:
    scores = np.array([-3.0, -2.0, 1.0, 2.0])
    assert all(detection(scores, [0, 1]).values[name] == 1 for name in NAMES)
    assert detection(scores, [2, 3]).values["auroc"] == 0.0


def test_samples_without_a_score_are_left_out() -> None:
    found = detection(np.array([np.nan, -1.0, 1.0, 2.0]), [0, 1]).values
    assert found["recall_at_k"] == 1.0


@pytest.mark.parametrize(
    ("scores", "corrupted", "reason"),
    [
        ([1.0, 2.0], [], "0 of 2 samples are corrupted"),
        ([1.0, 2.0], [0, 1], "2 of 2 samples are corrupted"),
        ([1.0, 1.0], [0], "all scores are equal"),
    ],
)
def test_undefined_figures_have_a_reason(scores: list[float], corrupted: list[int], reason: str) -> None:
    found = detection(np.array(scores), corrupted)
    assert not found.values
    assert set(found.undefined.values()) == {reason}


def test_chance_is_the_mean_over_all_orders() -> None:
    found = [detection(np.array(order, dtype=float), [0, 1]).values for order in permutations(range(5))]
    for name in NAMES:
        assert np.mean([values[name] for values in found]) == pytest.approx(found[0][f"{name}_chance"]), name


def test_equal_scores_are_in_random_order_not_in_that_of_the_samples() -> None:
    """Two flagged: -1, and one of the three zeros, of which two are corrupted. Mean over all orders of the zeros."""
    scores, corrupted = np.array([0.0, 3.0, 0.0, -1.0, 0.0]), [0, 2]
    zeros = np.flatnonzero(scores == 0)
    apart = [scores.copy() for _ in range(6)]
    for one, order in zip(apart, permutations([0.1, 0.2, 0.3]), strict=True):
        one[zeros] = order
    found = detection(scores, corrupted).values
    for name in ("accuracy", "recall_at_k"):
        assert found[name] == pytest.approx(np.mean([detection(one, corrupted).values[name] for one in apart])), name
    share, recall = recall_curve(scores, corrupted)
    assert found["recall_at_k"] == pytest.approx(recall[share == 2 / 5].item())
    for order in permutations(range(5)):
        places = np.array(order)
        assert detection(scores[places], np.flatnonzero(np.isin(places, corrupted))).values == pytest.approx(found)


@pytest.mark.parametrize("tied", [False, True])
def test_area_under_the_recall_curve_is_that_of_the_auroc(tied: bool) -> None:
    """With a corrupted share s: s / 2 + (1 - s) AUROC, ties included."""
    scores = np.random.default_rng(0).normal(size=40)
    scores = np.r_[np.round(scores) if tied else scores, np.nan]
    share, recall = recall_curve(scores, [*range(10), 40])
    assert (share[0], recall[0], share[-1], recall[-1]) == (0, 0, 1, 1)
    auroc = detection(scores, range(10)).values["auroc"]
    area = ((recall[1:] + recall[:-1]) / 2 * np.diff(share)).sum()
    assert area == pytest.approx(0.25 / 2 + 0.75 * auroc)
    with pytest.raises(InputError, match="nothing to recall"):
        recall_curve(scores, [40])


def test_samples_that_are_not_there_are_named() -> None:
    for corrupted in ([0, 4], [-1], np.array([4])):
        with pytest.raises(InputError, match=rf"samples \[{corrupted[-1]}\]; there are scores of 0 … 3"):
            detection(np.arange(4.0), corrupted)
