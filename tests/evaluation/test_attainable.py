from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from workloads import digits_workload

from dit_mlflow import Window, leave_one_out, train
from dit_mlflow.evaluation import attainable


def test_float32_against_float64_over_the_samples_of_the_truth(tmp_path: Any) -> None:
    """A training in float64 attains 1; in float32, what leave-one-out of every sample says, and less when steps are
    so small that rounding hides the effects."""
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, trajectory.num_steps), Window(2, 6)]
    truth = leave_one_out(trajectory, workload, windows, samples=12)
    found = attainable(truth, trajectory, workload)
    again = leave_one_out(trajectory, workload, windows, samples=12, dtype=None)
    for k, figures in enumerate(found):
        known = truth.of(k) == truth.of(k)
        expected = stats.spearmanr(again.of(k)[known], truth.of(k)[known]).statistic
        assert figures.values["attainable_spearman"] == pytest.approx(expected)

    def small_steps(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-6)

    workload = digits_workload(optimizer=small_steps)
    trajectory = train(workload, tmp_path / "small")
    truth = leave_one_out(trajectory, workload, windows[:1])
    (hidden,) = attainable(truth, trajectory, workload)
    assert hidden.values["attainable_spearman"] < 0.9 < found[0].values["attainable_spearman"]
