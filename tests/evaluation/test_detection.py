from __future__ import annotations

import numpy as np
import pytest

from dit_mlflow.evaluation import detection


def test_values_by_hand() -> None:
    """Corrupted 1 and 3; the two lowest scores are 1 and 0. Ranked from low: 1 (hit), 0, 3 (hit), 2, 4."""
    found = detection(np.array([-1.0, -2.0, 1.0, 0.5, 2.0]), [1, 3]).values
    assert found == pytest.approx(
        {
            "accuracy": 3 / 5,
            "recall_at_k": 1 / 2,
            "auroc": 5 / 6,
            "average_precision": (1 / 1 + 2 / 3) / 2,
        }
    )


def test_perfect_and_worst() -> None:
    scores = np.array([-3.0, -2.0, 1.0, 2.0])
    assert set(detection(scores, [0, 1]).values.values()) == {1.0}
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
