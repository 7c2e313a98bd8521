"""Data Shapley against the definition: all subsets trained by a plain loop, weighed by Shapley's formula."""

from __future__ import annotations

from itertools import permutations
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import all_subsets, few_samples, trained_on
from workloads import digits_workload

from dit_mlflow import InputError, Trajectory, Window, Workload, parse_windows, train
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.data_shapley import DataShapley, shapley_values
from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.subsets import outcomes


def exact(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """``mean_j = sum_{S without j} [q(S) - q(S and j)] / (n binomial(n - 1, |S|))``."""
    n = kept.shape[1]
    at = {tuple(row): value for row, value in zip(kept.tolist(), values, strict=True)}
    found = np.zeros(n)
    for j in range(n):
        for row in kept[~kept[:, j]].tolist():
            joined = [*row]
            joined[j] = True
            found[j] += (at[tuple(row)] - at[tuple(joined)]) / (n * comb(n - 1, sum(row)))
    return found


@pytest.fixture
def workload() -> Workload:
    return few_samples()


@pytest.fixture
def trajectory(workload: Workload, tmp_path: Any) -> Trajectory:
    return train(workload, tmp_path / "t")


def test_over_all_orders_it_is_shapleys_formula(workload: Workload, trajectory: Trajectory) -> None:
    kept = all_subsets(5)
    expected = exact(trained_on(workload, trajectory, kept), kept)
    question = Question.of(trajectory, workload, [Window(0, trajectory.num_steps)], "local", None)
    orders = np.array(list(permutations(range(5))))
    found = shapley_values(
        lambda rows: outcomes(question, rows, torch.float64, Effort())[0], orders, tolerance=0, patience=1
    )
    np.testing.assert_allclose(found.scores[0, 0], expected, rtol=1e-6, atol=1e-9)
    assert found.truncated[0, 0] == 0


def test_estimates_converge_and_sum_to_what_all_samples_do(workload: Workload, trajectory: Trajectory) -> None:
    kept = all_subsets(5)
    values = trained_on(workload, trajectory, kept)
    expected = exact(values, kept)
    found = DataShapley(retrainings=3000, tolerance=0, dtype=torch.float64)(trajectory, workload)
    assert found.metadata["orders"] == 600
    error = found.metadata["standard_errors"][0][0]
    assert error < 0.1 * np.abs(expected).max()
    assert np.abs(found.of(0) - expected).max() < 4 * error
    assert found.of(0).sum() == pytest.approx(values[0] - values[-1], rel=1e-6)


@pytest.mark.parametrize("patience", [1, 2])
def test_truncation_is_that_of_the_paper(patience: int) -> None:
    """One order after the other, on changes made up; two queries end at places of their own."""
    generator = np.random.default_rng(0)
    gains = generator.exponential(size=(2, 40)) * np.linspace(1, 0.01, 40)

    def changes_of(kept: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.sqrt((~kept).astype(float) @ gains.T).T[None]
        return found

    orders = np.stack([generator.permutation(40) for _ in range(7)])
    expected, followed = np.zeros((2, 40)), np.zeros(2)
    limits = 0.4 * changes_of(np.zeros((1, 40), dtype=bool))[0, :, 0]
    for order in orders:
        for query, limit in enumerate(limits):
            kept = np.zeros((1, 40), dtype=bool)
            calm, before = 0, changes_of(kept)[0, query, 0]
            for sample in order:
                if calm >= patience:
                    break
                kept[0, sample] = True
                after = changes_of(kept)[0, query, 0]
                expected[query, sample] += (before - after) / 7
                calm = calm + 1 if abs(after) < limit else 0
                followed[query] += 1
                before = after
    found = shapley_values(changes_of, orders, tolerance=0.4, patience=patience)
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.truncated[0], 1 - followed / (7 * 40))
    assert found.truncated.min() > 0


def test_truncation_saves_trainings_and_hardly_changes_scores(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = digits_workload(epochs=6)
    trajectory = train(workload, tmp_path / "t")
    trained = []
    real = outcomes

    def counted(question: Any, kept: np.ndarray, *rest: Any) -> Any:
        trained.append(len(kept))
        return real(question, kept, *rest)

    monkeypatch.setattr("dit_mlflow.methods.data_shapley.outcomes", counted)
    whole = DataShapley(retrainings=240, tolerance=0)(trajectory, workload)
    assert sum(trained) == 241
    trained.clear()
    part = DataShapley(retrainings=240, tolerance=0.2, patience=2)(trajectory, workload)
    assert sum(trained) < 230
    assert part.metadata["truncated"][0][0] > 0.05
    assert np.corrcoef(whole.of(0), part.of(0))[0, 1] > 0.95


def test_windows_that_share_a_start_are_answered_as_alone(workload: Workload, trajectory: Trajectory) -> None:
    windows = parse_windows("2", trajectory)
    run = DataShapley(retrainings=100, dtype=torch.float64)
    together = run(trajectory, workload, windows, "cumulative")
    for k, window in enumerate(windows):
        alone = run(trajectory, workload, [window], "cumulative")
        np.testing.assert_allclose(together.of(k), alone.of(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retrainings": 9}, r"1 order of 5 samples; expected 2 orders or more \(10 retrainings\)"),
        ({"tolerance": -0.1}, "expected 0 or more"),
        ({"patience": 0}, "1 sample or more"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    settings: Any, message: str, workload: Workload, trajectory: Trajectory
) -> None:
    with pytest.raises(InputError, match=message):
        DataShapley(**settings)(trajectory, workload)
