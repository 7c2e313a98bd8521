"""Datamodels against dense least squares, and against what an orthogonal design makes of the lasso."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import all_subsets, few_samples, trained_on
from workloads import digits_workload

from dit_mlflow import InputError, Window, leave_one_out, train
from dit_mlflow.methods.datamodel import Datamodel, linear_fit
from dit_mlflow.methods.downsampling import mean_difference
from dit_mlflow.retraining.subsets import random_subsets


@pytest.fixture
def outcomes(tmp_path: Any) -> tuple[np.ndarray, np.ndarray]:
    """All subsets of five samples, and the validation loss after training on each."""
    workload = few_samples()
    kept = all_subsets(5)
    return kept, trained_on(workload, train(workload, tmp_path / "t"), kept)


def least_squares(kept: np.ndarray, values: np.ndarray, penalty: float = 0.0) -> np.ndarray:
    """Normal equations with an unpenalised constant, by dense matrices."""
    design = np.column_stack([np.ones(len(kept)), kept])
    squared = np.diag([0.0] + [penalty] * kept.shape[1])
    return np.linalg.solve(design.T @ design + squared, design.T @ values)[1:]


def test_ridge_solves_the_normal_equations(outcomes: Any) -> None:
    for penalty in (1e-9, 3.0):
        found, _ = linear_fit(*outcomes, "ridge", penalty)
        np.testing.assert_allclose(found, least_squares(*outcomes, penalty), rtol=1e-6)


def test_explained_is_what_is_foretold_of_subsets_not_seen() -> None:
    generator = np.random.default_rng(0)
    kept = generator.random((200, 10)) < 0.5
    linear, noise = kept @ generator.normal(size=10), generator.normal(size=200)
    mixed = linear / linear.std() + noise
    for regression in ("lasso", "ridge"):
        for values, expected in ((linear, 1.0), (noise, 0.0), (mixed, 0.5)):
            assert linear_fit(kept, values, regression)[1] == pytest.approx(expected, abs=0.15)


def test_over_all_subsets_least_squares_are_the_banzhaf_value(outcomes: Any) -> None:
    """Hammer and Holzman 1992: the best linear approximation; without a penalty, downsampling and datamodel are one."""
    np.testing.assert_allclose(-least_squares(*outcomes), mean_difference(*outcomes)[0], rtol=1e-9)


def test_over_all_subsets_the_lasso_shrinks_each_by_the_same(outcomes: Any) -> None:
    """Centred masks of all subsets are orthogonal with variance 1/4: soft thresholding at four times the penalty."""
    exact = least_squares(*outcomes)
    penalty = 0.1 * np.abs(exact).max()
    found, _ = linear_fit(*outcomes, "lasso", penalty)
    expected = np.sign(exact) * np.maximum(np.abs(exact) - 4 * penalty, 0)
    assert 0 < np.count_nonzero(expected) < 5
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("regression", ["lasso", "ridge"])
def test_the_method_fits_what_plain_trainings_say(regression: Any, tmp_path: Any) -> None:
    workload = few_samples()
    trajectory = train(workload, tmp_path / "t")
    drawn = random_subsets(5, 2000, 0.7, seed=4)
    rows, which = np.unique(drawn, axis=0, return_inverse=True)
    expected = -least_squares(drawn, trained_on(workload, trajectory, rows)[which.reshape(-1)])
    run = Datamodel(subsets=2000, share=0.7, regression=regression, seed=4, dtype=torch.float64)
    found = run(trajectory, workload)
    np.testing.assert_allclose(found.of(0), expected, atol=0.02 * np.abs(expected).max())
    assert found.metadata["explained"][0][0] > 0.5


def test_it_foretells_leave_one_out(tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 5), Window(0, 9)]
    truth = leave_one_out(trajectory, workload, windows, "local")
    found = Datamodel(subsets=600)(trajectory, workload, windows)
    for k in range(2):
        assert np.corrcoef(found.of(k), truth.of(k))[0, 1] > 0.9
    unmet = np.setdiff1d(np.arange(24), np.concatenate([trajectory.step(t).samples for t in range(5)]))
    assert (found.of(0)[unmet] == 0).all()


def test_a_budget_that_tells_nothing_says_so(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    workload = digits_workload(epochs=1)
    trajectory = train(workload, tmp_path / "t")
    with caplog.at_level(logging.WARNING):
        found = Datamodel(subsets=100, penalty=10.0)(trajectory, workload)
    assert (found.of(0) == 0).all()
    assert "100 subsets are too few to tell any sample from the others for mean_validation_loss" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regression": "elastic"}, "expected lasso or ridge"),
        ({"penalty": 0.0}, "a number above 0"),
        ({"subsets": 7}, "expected 8 or more"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Datamodel(**settings)
