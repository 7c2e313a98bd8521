from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import train_again, validation_loss
from scipy import stats
from workloads import digits_workload

from dit_mlflow import InputError, Window, leave_one_out, track, train
from dit_mlflow.evaluation import trust


@pytest.mark.parametrize("kind", ["local", "final", "cumulative"])
def test_sample_and_direction_are_those_of_plain_retrainings(kind: Any, tmp_path: Any) -> None:
    """Against leave-one-out of the same samples, and, along the scores, a plain loop with other weights."""
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    end = trajectory.num_steps
    windows = [Window(0, end), Window(3, 7)]
    estimate = track(trajectory, workload, windows, kind)
    found = trust(estimate, trajectory, workload, samples=10, seed=3)
    truth = leave_one_out(trajectory, workload, windows, kind, samples=10, sample_seed=3)
    # Not bit for bit: whether retrainings run side by side is decided by the clock.
    for drawn, given in zip(found, trust(estimate, trajectory, workload, truth=truth), strict=True):
        assert given.values == pytest.approx(drawn.values, rel=1e-5)
        assert given.undefined == drawn.undefined
    for k, figures in enumerate(metrics.values for metrics in found):
        known = np.isfinite(truth.of(k))
        scores, exact = estimate.of(k)[known], truth.of(k)[known]
        assert figures["samples"] == 10
        assert figures["spearman"] == pytest.approx(stats.spearmanr(scores, exact).statistic)
        assert figures["spearman_low"] <= figures["spearman"] <= figures["spearman_high"]
        assert figures["spread_ratio"] == pytest.approx(scores.std() / exact.std())
    if kind != "final":
        scores = estimate.of(0)
        direction = scores / np.linalg.norm(scores)
        recorded = validation_loss(workload, train_again(workload, trajectory, lambda t, i: 1.0, end))
        up, down = (
            validation_loss(
                workload, train_again(workload, trajectory, lambda t, i, sign=sign: 1 + sign * direction[i], end)
            )
            - recorded
            for sign in (1, -1)
        )
        odd, even = (up - down) / 2, (up + down) / 2
        assert found[0].values["smoothness"] == pytest.approx(abs(odd) / (abs(odd) + abs(even)), abs=2e-3)
        assert found[0].values["slope_ratio"] == pytest.approx(-odd / np.linalg.norm(scores), rel=2e-3)


def test_gentle_training_is_smooth_and_wrong_scores_show(tmp_path: Any) -> None:
    """A small learning rate is linear in the weights; scores of double size have half the slope, reversed ones none."""
    workload = digits_workload(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1e-3))
    trajectory = train(workload, tmp_path / "t")
    estimate = track(trajectory, workload, [Window(0, trajectory.num_steps)], dtype=torch.float64)
    (right,) = trust(estimate, trajectory, workload)
    assert right.values["smoothness"] > 0.99
    assert right.values["slope_ratio"] == pytest.approx(1, abs=0.01)
    (twice,) = trust(replace(estimate, scores=-2 * estimate.scores), trajectory, workload)
    assert twice.values["slope_ratio"] == pytest.approx(-right.values["slope_ratio"] / 2)
    assert twice.values["spread_ratio"] == pytest.approx(2 * right.values["spread_ratio"])
    assert twice.values["spearman"] == pytest.approx(-right.values["spearman"])


def test_a_window_that_changed_nothing_says_so(tmp_path: Any) -> None:
    workload = digits_workload(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    trajectory = train(workload, tmp_path / "t")
    (found,) = trust(track(trajectory, workload, [Window(0, 3)]), trajectory, workload, samples=12)
    assert found.values == {"samples": 12}
    assert "all scores are 0" in found.undefined["smoothness"]
    assert "all 12 estimated scores are equal" in found.undefined["spearman"]


def test_too_few_samples_are_refused(tmp_path: Any) -> None:
    workload = digits_workload(epochs=1)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(InputError, match="samples=2, 1 queries; expected 3"):
        trust(track(trajectory, workload, [Window(0, 2)]), trajectory, workload, samples=2)
