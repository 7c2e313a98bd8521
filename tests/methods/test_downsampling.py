"""Downsampling against the expectation over all subsets, each trained by a plain loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from enumeration import all_subsets, few_samples, trained_on
from workloads import digits_workload

from dit_mlflow import InputError, Trajectory, UnsupportedError, Window, leave_one_out, parameter_value, train
from dit_mlflow import mean_validation_loss as validation_query
from dit_mlflow.methods import method
from dit_mlflow.methods.downsampling import Downsampling, mean_difference
from dit_mlflow.retraining import Effort
from dit_mlflow.retraining.counterfactuals import Retraining
from dit_mlflow.retraining.subsets import random_subsets


def exact(values: np.ndarray, kept: np.ndarray, share: float) -> np.ndarray:
    """Expected change of the query by removal from a random part of the others: pair by pair, ``[samples]``."""
    at = {tuple(row): value for row, value in zip(kept.tolist(), values, strict=True)}
    found = np.zeros(kept.shape[1])
    for j in range(kept.shape[1]):
        for row in kept[kept[:, j]].tolist():
            without = [*row]
            without[j] = False
            others = sum(row) - 1
            chance = share**others * (1 - share) ** (len(row) - 1 - others)
            found[j] += chance * (at[tuple(without)] - at[tuple(row)])
    return found


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_estimates_converge_to_the_expectation_over_all_subsets(share: float, tmp_path: Any) -> None:
    workload = few_samples()
    trajectory = train(workload, tmp_path / "t")
    kept = all_subsets(5)
    expected = exact(trained_on(workload, trajectory, kept), kept, share)
    # Equal subsets are trained once: 20,000 draws cost 32 trainings.
    run = Downsampling(subsets=20_000, share=share, dtype=torch.float64)
    found = run(trajectory, workload)
    error = found.metadata["standard_errors"][0][0]
    assert error < 0.1 * np.abs(expected).max()
    assert np.abs(found.of(0) - expected).max() < 4 * error
    assert np.sign(found.of(0)).tolist() == np.sign(expected).tolist()


def test_over_all_subsets_it_is_the_banzhaf_value(tmp_path: Any) -> None:
    workload = few_samples(4)
    trajectory = train(workload, tmp_path / "t")
    kept = all_subsets(4)
    values = trained_on(workload, trajectory, kept)
    found, errors = mean_difference(kept, values)
    np.testing.assert_allclose(found, exact(values, kept, 0.5), rtol=1e-10)
    by_hand = [np.sqrt(values[~column].var() / 8 + values[column].var() / 8) for column in kept.T]
    np.testing.assert_allclose(errors, by_hand, rtol=1e-10)


def test_close_to_all_samples_it_is_leave_one_out(tmp_path: Any) -> None:
    """Windows, kinds and queries are those of the exact method."""
    workload = few_samples()
    trajectory = train(workload, tmp_path / "t")
    queries = [validation_query(workload), parameter_value("0.weight", 2, 20)]
    asked: Any = ([Window(2, 5), Window(5, 9)], "final", queries)
    run = Downsampling(subsets=60_000, share=0.998, dtype=torch.float64)
    found = run(trajectory, workload, *asked)
    truth = leave_one_out(trajectory, workload, *asked)
    assert found.kind == "final"
    np.testing.assert_allclose(found.scores, truth.scores, atol=0.02 * np.abs(truth.scores).max())


def test_samples_that_a_window_never_met_score_exactly_zero(tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    scores = Downsampling(subsets=64, share=0.5)(trajectory, workload, [Window(3, 5)]).of(0)
    seen = np.unique(np.concatenate([trajectory.step(t).samples for t in (3, 4)]))
    np.testing.assert_array_equal(np.flatnonzero(scores), seen)


@pytest.mark.parametrize("name", ["downsampling", "datamodel"])
def test_too_few_subsets_say_nothing_about_some_samples(name: str, tmp_path: Any) -> None:
    workload = digits_workload(epochs=1)
    trajectory = train(workload, tmp_path / "t")
    few = type(method(name))(subsets=8, share=0.9)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"of 24 samples \(.*in all of the 8 subsets or in none.*take 74 subsets"):
        few(trajectory, workload)
    kept = random_subsets(24, 74, 0.9, seed=3)
    assert len(kept) == 74
    assert kept.any(axis=0).all() and not kept.all(axis=0).any()


@pytest.mark.parametrize("settings", [{"subsets": 1}, {"share": 0.0}, {"share": 1.0}])
def test_settings_that_cannot_be_used_are_refused(settings: Any, tmp_path: Any) -> None:
    workload = digits_workload(epochs=1)
    with pytest.raises(InputError, match="expected 2 or more"):
        Downsampling(**settings)(train(workload, tmp_path / "t"), workload)


def test_trainings_that_diverge_are_refused(tmp_path: Any) -> None:
    """Two samples hold each other in check; without one of them, the quadratic loss explodes."""

    def quadratic(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        inputs, sign = batch
        return sign[:, 0] * model(inputs)[:, 0] ** 4

    inputs = torch.ones(2, 1)
    held = torch.utils.data.TensorDataset(inputs, torch.tensor([[1.0], [-1.0]]))
    workload = digits_workload(
        model=lambda: torch.nn.Linear(1, 1),
        loss=quadratic,
        train_set=held,
        validation_set=held,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1e3),
        batch_size=2,
        epochs=12,
    )
    trajectory: Trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match="not finite"):
        Downsampling(subsets=16, share=0.5)(trajectory, workload)


@pytest.mark.parametrize("name", ["downsampling", "data_shapley"])
def test_broken_off_it_goes_on_from_what_was_finished(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = few_samples()
    trajectory = train(workload, tmp_path / "t")
    run: Any = type(method(name))(effort=Effort(folder=tmp_path / "kept"))
    first = run(trajectory, workload)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Retraining, "run", refuse)
    np.testing.assert_array_equal(run(trajectory, workload).scores, first.scores)
