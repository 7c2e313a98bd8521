from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracles import train_again, validation_loss
from scipy import stats
from workloads import digits_workload

from dit_mlflow import InputError, Window, leave_one_out, train
from dit_mlflow.evaluation.correlation import datamodeling_score
from dit_mlflow.retraining.subsets import Subsets, train_on_subsets


def test_subsets_are_trained_as_a_plain_loop_would(tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    window = Window(0, trajectory.num_steps)
    subsets = train_on_subsets(trajectory, workload, [window], subsets=12)
    assert (subsets.kept.sum(axis=1) == 12).all()
    recorded = validation_loss(workload, train_again(workload, trajectory, lambda t, i: 1.0, window.end))
    for kept, change in zip(subsets.kept[:3], subsets.changes[0, 0], strict=False):
        model = train_again(workload, trajectory, lambda t, i, kept=kept: float(kept[i]), window.end)  # type: ignore
        assert change == pytest.approx(validation_loss(workload, model) - recorded, rel=1e-3)
    truth = leave_one_out(trajectory, workload, [window]).of(0)
    assert datamodeling_score(truth, subsets, window).values["lds"] > 0.6


def test_score_is_the_correlation_of_summed_scores() -> None:
    """Exactly additive outcomes score 1, reversed ones -1; noise lies between, inside its interval."""
    generator = np.random.default_rng(0)
    kept = generator.random((40, 30)) < 0.5
    scores = generator.normal(size=30)
    outcomes = ~kept @ scores
    noisy = outcomes + generator.normal(size=40) * outcomes.std()
    subsets = Subsets(kept, np.stack([outcomes, -outcomes, noisy])[:, None], (Window(0, 1), Window(1, 2), Window(2, 3)))
    found = [datamodeling_score(scores, subsets, window).values for window in subsets.windows]
    assert (found[0]["lds"], found[1]["lds"]) == (pytest.approx(1), pytest.approx(-1))
    assert found[2]["lds"] == pytest.approx(stats.spearmanr(outcomes, noisy).statistic)
    assert found[2]["lds_low"] < found[2]["lds"] < found[2]["lds_high"]
    assert "lds" in datamodeling_score(np.zeros(30), subsets).undefined


def test_of_too_few_subsets_there_is_none() -> None:
    kept = np.random.default_rng(0).random((9, 30)) < 0.5
    scores = np.arange(30.0)
    subsets = Subsets(kept, (~kept @ scores)[None, None], (Window(0, 1),))
    assert datamodeling_score(scores, subsets).values["lds"] == pytest.approx(1)
    few = datamodeling_score(scores, subsets, fewest=10)
    assert few.values == {} and few.undefined["lds"] == "9 trainings on random subsets; at least 10 are needed"


@pytest.mark.parametrize("settings", [{"subsets": 2}, {"share": 0.0}, {"share": 1.0}])
def test_subsets_that_say_nothing_are_refused(settings: Any, tmp_path: Any) -> None:
    workload = digits_workload(epochs=1)
    with pytest.raises(InputError, match="expected 3 or more"):
        train_on_subsets(train(workload, tmp_path / "t"), workload, [Window(0, 1)], **settings)
