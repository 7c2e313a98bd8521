"""Derivatives at random weights against differences of whole trainings; their mean against closed forms."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import train_again, validation_loss
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import TensorDataset
from workloads import SAMPLES, digits_workload

from dit_mlflow import (
    Influence,
    InputError,
    Query,
    UnsupportedError,
    Window,
    Workload,
    expected_influence,
    parse_windows,
    sample_losses,
    track,
    train,
)
from dit_mlflow.influence.draws import agreement, kinked, over_pairs
from dit_mlflow.methods.dit import Expected

KINDS: tuple[Any, ...] = ("local", "final", "cumulative")
OPTIMIZERS: dict[str, Any] = {
    "sgd momentum": partial(SGD, lr=0.2, momentum=0.9),
    "adam": partial(Adam, lr=0.02, eps=1e-4),
}
WINDOWS = [Window(4, 9), Window(1, 4), Window(1, 6)]
"""Two that overlap, and two that begin together; the later one first."""


def clipped(name: str) -> Workload:
    return digits_workload(optimizer=lambda model: OPTIMIZERS[name](model.parameters()), clip_grad_norm=0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_under_weights_match_differences(name: str, kind: Any, tmp_path: Path) -> None:
    workload = clipped(name)
    trajectory = train(workload, tmp_path / "t")
    weights = np.random.default_rng(0).random(SAMPLES)
    found = track(trajectory, workload, WINDOWS, kind, weights=weights, dtype=torch.float64)

    def value(at: np.ndarray, first: int, last: int, until: int) -> float:
        def weight_of(t: int, i: int) -> float:
            return float(at[i]) if first <= t < last else 1.0

        return validation_loss(workload, train_again(workload, trajectory, weight_of, until))

    def effect(at: np.ndarray, window: Window) -> float:
        if kind == "cumulative":
            return value(at, 0, window.end, window.end) - value(at, 0, window.start, window.start)
        return value(at, window.start, window.end, window.end if kind == "local" else trajectory.num_steps)

    for window in WINDOWS:
        scores, samples = found.of(window), range(0, SAMPLES, 6)
        for j in samples:
            step = 1e-5 * np.eye(SAMPLES)[j]
            expected = (effect(weights - step, window) - effect(weights + step, window)) / 2e-5
            assert abs(scores[j] - expected) < 1e-6 * np.abs(scores).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "dtype"), [("sgd momentum", None), ("adam", torch.float64)])
def test_weights_of_1_give_the_scores_as_recorded(name: str, dtype: Any, kind: Any, tmp_path: Path) -> None:
    """Bit for bit, where the replay is."""
    workload = clipped(name)
    trajectory = train(workload, tmp_path / "t")
    recorded = track(trajectory, workload, parse_windows("3", trajectory), kind, dtype=dtype)
    weighted = track(
        trajectory, workload, parse_windows("3", trajectory), kind, weights=torch.ones(SAMPLES), dtype=dtype
    )
    np.testing.assert_array_equal(weighted.scores, recorded.scores)


def test_cumulative_windows_under_weights_add_up_to_the_whole_run(tmp_path: Path) -> None:
    workload = clipped("adam")
    trajectory = train(workload, tmp_path / "t")
    weights = np.random.default_rng(0).random(SAMPLES)
    parts = track(
        trajectory, workload, parse_windows("3", trajectory), "cumulative", weights=weights, dtype=torch.float64
    )
    whole = track(trajectory, workload, [Window(0, 9)], weights=weights, dtype=torch.float64)
    np.testing.assert_allclose(parts.scores.sum(axis=0), whole.scores[0], rtol=1e-9, atol=1e-12)


class Linear(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.theta


def regression(samples: int, size: int, batch_size: int, lr: float) -> tuple[Workload, np.ndarray, np.ndarray]:
    """Squared errors of a linear model, one epoch of plain SGD; and inputs and targets."""
    random = np.random.default_rng(5)
    inputs, targets = random.standard_normal((samples, size)), random.standard_normal(samples)
    data = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(targets))
    workload = Workload(
        model=lambda: Linear(size),
        loss=lambda model, batch: (model(batch[0]) - batch[1]) ** 2 / 2,
        train_set=data,
        validation_set=data,
        optimizer=lambda model: SGD(model.parameters(), lr=lr),
        batch_size=batch_size,
        epochs=1,
    )
    return workload, inputs, targets


def one_step(tmp_path: Path) -> tuple[Workload, Any, np.ndarray, Any]:
    """A step on all samples: ``theta(w) = theta_0 - G w``. With them ``G`` and ``theta``."""
    workload, inputs, targets = regression(12, 3, 12, lr=2.0)
    start = np.linspace(-1, 1, 3)
    step = 2.0 / 12 * (inputs * (inputs @ start - targets)[:, None]).T
    return workload, train(workload, tmp_path / "t"), step, lambda w: start - step @ w


def test_of_a_quadratic_the_mean_over_any_pairs_is_exact(tmp_path: Path) -> None:
    """The query ``|theta|^2 / 2`` after one step is quadratic in ``w``: its derivative is linear."""
    workload, trajectory, step, theta = one_step(tmp_path)
    query = Query("half the square", lambda model: model.theta.square().sum() / 2)
    asked = (trajectory, workload, [Window(0, 1)], "local", [query])
    expected = step.T @ theta(np.full(12, 0.5))
    pair, three = expected_influence(*asked, draws=2), expected_influence(*asked, draws=6, seed=3)
    np.testing.assert_allclose(pair.of(0), expected, rtol=1e-12)
    np.testing.assert_allclose(three.of(0), expected, rtol=1e-12)
    assert pair.standard_error is None
    assert three.standard_error is not None and three.degrees_of_freedom is not None
    assert three.standard_error.max() < 1e-12
    assert three.degrees_of_freedom.tolist() == [[2]]
    single = track(*asked, weights=np.random.default_rng(0).random(12)).of(0)
    assert np.abs(single - expected).max() > 0.01 * np.abs(expected).max(), "a single draw is not"


def test_draws_that_are_too_long_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The query ``exp(c theta_0)``, whose derivative is ``c exp(c theta_0)`` times a constant vector."""
    workload, trajectory, step, theta = one_step(tmp_path)
    query = Query("exponential", lambda model: torch.exp(8 * model.theta[0]))
    found = expected_influence(trajectory, workload, [Window(0, 1)], "local", [query], draws=16, seed=1)
    uniform = np.random.default_rng(1).random((8, 12))
    slopes = np.array([[8 * np.exp(8 * theta(w)[0]) for w in (u, 1 - u)] for u in uniform])
    kept = slopes.max(axis=1) <= 3 * np.median(slopes)
    assert 2 <= kept.sum() <= 7
    np.testing.assert_allclose(found.of(0), slopes[kept].mean() * step[0], rtol=1e-12)
    errors = np.abs(step[0]) * slopes[kept].mean(axis=1).std(ddof=1) / np.sqrt(kept.sum())
    assert found.standard_error is not None
    np.testing.assert_allclose(found.standard_error[0, 0], errors, rtol=1e-9)
    assert found.metadata["draws_left_out"] == 16 - 2 * kept.sum()
    assert f"{16 - 2 * kept.sum()} of 16 draws are left out" in caplog.text


def multilinear(tmp_path: Path) -> tuple[Workload, Any, Query, Any]:
    """Eight steps of one sample each and a linear query, so that ``f`` is linear in every weight; and ``f``."""
    workload, inputs, targets = regression(8, 2, 1, lr=0.4)
    trajectory = train(workload, tmp_path / "t")
    order = [int(trajectory.step(t).samples[0]) for t in range(8)]

    def f(weights: np.ndarray) -> np.ndarray:
        theta = np.tile(np.linspace(-1, 1, 2), (len(weights), 1))
        for i in order:
            theta = theta - 0.4 * (weights[:, i] * (theta @ inputs[i] - targets[i]))[:, None] * inputs[i]
        return theta @ np.array([1.0, 2.0])

    direction = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return workload, trajectory, Query("direction", lambda model: direction @ model.theta), f


def slopes(f: Any, weights: np.ndarray) -> np.ndarray:
    """``-df / dw_j`` of a multilinear ``f`` at ``weights [draws, 8]``, from its values at ``w_j`` 0 and 1."""
    found = np.empty_like(weights)
    for j in range(weights.shape[1]):
        without, whole = weights.copy(), weights.copy()
        without[:, j], whole[:, j] = 0, 1
        found[:, j] = f(without) - f(whole)
    return found


def test_where_the_query_is_linear_in_each_weight_it_is_the_banzhaf_value(tmp_path: Path) -> None:
    workload, trajectory, query, f = multilinear(tmp_path)
    corners = np.array(list(product([0.0, 1.0], repeat=8)))
    banzhaf = -slopes(f, corners).mean(axis=0)
    asked = (trajectory, workload, [Window(0, 8)], "local", [query])
    middle = track(*asked, weights=np.full(8, 0.5)).of(0)
    np.testing.assert_allclose(middle, -banzhaf, rtol=1e-11)
    found = expected_influence(*asked, draws=64, seed=0)
    assert found.standard_error is not None
    low, high = found.interval(0.999)
    assert ((low[0, 0] < -banzhaf) & (-banzhaf < high[0, 0])).all()
    spread = np.abs(banzhaf).max()
    assert 1e-4 * spread < found.standard_error.max() < 0.2 * spread


@pytest.mark.parametrize("pairs", [2, 8])
def test_intervals_of_95_percent_cover(pairs: int, tmp_path: Path) -> None:
    """200 repetitions on the multilinear query, whose mean is known."""
    f = multilinear(tmp_path)[3]
    truth = slopes(f, np.full((1, 8), 0.5))[0]
    random, covered = np.random.default_rng(0), []
    for _ in range(200):
        u = random.random((pairs, 8))
        drawn = np.stack([slopes(f, u), slopes(f, 1 - u)], axis=1)[:, :, None, None]
        scores, errors, counted = over_pairs(drawn.mean(axis=1), np.linalg.norm(drawn, axis=-1))
        found = Influence(scores, (Window(0, 8),), ("q",), np.arange(8), "local", "expected", {}, errors, counted - 1)
        low, high = found.interval()
        covered.append((low <= truth) & (truth <= high))
    assert 0.90 <= np.mean(covered) <= 0.99


def test_pairs_with_a_long_or_broken_draw_do_not_count() -> None:
    """Three pairs; windows: as long as may be, one draw long, one not finite, all broken, most of them 0."""
    means = np.arange(1.0, 4.0)[:, None, None, None] * np.ones((3, 5, 1, 2))
    lengths = np.ones((3, 2, 5, 1))
    lengths[2, 0, 0] = 3.0
    lengths[1, 0, 1] = 3.01
    lengths[2, 1, 2] = np.nan
    lengths[:, 0, 3] = np.inf
    lengths[:, :, 4] = 0
    lengths[0, 0, 4] = 5
    means[2, 2], means[:, 3] = np.nan, np.inf
    scores, errors, counted = over_pairs(means, lengths)
    assert counted[:, 0].tolist() == [3, 2, 2, 0, 3]
    np.testing.assert_allclose(scores[:, 0, 0], [2, 2, 1.5, np.nan, 2])
    np.testing.assert_allclose(errors[:, 0, 0], [1 / np.sqrt(3), 1, 0.5, np.nan, 1 / np.sqrt(3)])


def test_agreement_is_the_cosine_of_partners() -> None:
    """Median over pairs; pairs that are not finite do not count, and of a derivative of 0 there is none."""
    random = np.random.default_rng(0)
    drawn = random.normal(size=(3, 2, 4, 2, 5))
    drawn[1, 0, 1] = np.nan
    drawn[:, 1, 2] = 0
    drawn[:, 1, 3] = 2 * drawn[:, 0, 3]
    found = agreement(drawn.mean(axis=1), np.linalg.norm(drawn, axis=-1))
    lengths = np.linalg.norm(drawn, axis=-1)
    with np.errstate(invalid="ignore"):
        cosines = (drawn[:, 0] * drawn[:, 1]).sum(axis=-1) / lengths.prod(axis=1)
    np.testing.assert_allclose(found[0], np.median(cosines[:, 0], axis=0))
    np.testing.assert_allclose(found[1], np.median(cosines[[0, 2], 1], axis=0))
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(found[3], 1)


def test_opposite_draws_that_disagree_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The query ``(theta_0 - c)^2`` after one step: its derivative changes its sign where ``theta_0 = c``."""
    workload, trajectory, _, theta = one_step(tmp_path)
    asked = (trajectory, workload, [Window(0, 1)], "local")
    middle = float(theta(np.full(12, 0.5))[0])
    turned = Query("turned", lambda model: (model.theta[0] - middle) ** 2)
    found = expected_influence(*asked, [turned], draws=4)
    assert found.metadata["draws_agree"]["0-1"] == pytest.approx([-1])
    assert kinked(found) == [Window(0, 1)]
    assert "unlike, over steps 0-1: training is too kinked there" in caplog.text
    caplog.clear()
    straight = expected_influence(*asked, [Query("straight", lambda model: model.theta[0])], draws=4)
    assert straight.metadata["draws_agree"]["0-1"] == pytest.approx([1])
    assert not kinked(straight)
    still = expected_influence(*asked, [Query("still", lambda model: 0 * model.theta[0])], draws=2)
    assert still.metadata["draws_agree"] == {"0-1": [None]}
    assert not kinked(still)
    assert not kinked(track(*asked))
    assert not caplog.messages


def test_a_training_that_diverges_under_weights_is_refused(tmp_path: Path) -> None:
    workload, trajectory, _, _ = one_step(tmp_path)
    before, after = (float(trajectory.checkpoint(t).parameters["theta"][0]) for t in (0, 1))
    # Half of the weights lead half of the way.
    there = 0.2 * before + 0.8 * after
    query = Query("root", lambda model: torch.sqrt((model.theta[0] - there) / (after - there)))
    with pytest.raises(UnsupportedError, match=r"window 0-1: .* not finite in any pair of draws"):
        expected_influence(trajectory, workload, [Window(0, 1)], "local", [query], draws=4)
    with pytest.raises(InputError, match=r"query 'root' is nan at step 1"):
        query = Query("root", lambda model: torch.sqrt(model.theta[0] - 100))
        expected_influence(trajectory, workload, [Window(0, 1)], "local", [query], draws=4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_draw_is_a_derivative_at_its_weights(kind: Any, tmp_path: Path) -> None:
    """All windows and queries together, in little memory, against one draw at a time."""
    workload = clipped("sgd momentum")
    trajectory = train(workload, tmp_path / "t")
    asked = (trajectory, workload, WINDOWS[:2], kind, sample_losses(workload, [0, 1]))
    budget = 10 * trajectory.checkpoint(9).nbytes
    found = expected_influence(*asked, draws=4, seed=7, dtype=torch.float64, memory_budget=budget)
    again = Expected(draws=4, seed=7, dtype=torch.float64)(*asked)
    uniform = np.random.default_rng(7).random((2, SAMPLES))
    draws = np.array([[track(*asked, weights=w, dtype=torch.float64).scores for w in (u, 1 - u)] for u in uniform])
    for result, (window, query) in product((found, again), product(range(2), range(2))):
        assert result.standard_error is not None and result.degrees_of_freedom is not None
        own = draws[:, :, window, query]
        lengths = np.linalg.norm(own, axis=-1)
        means = own.mean(axis=1)[(lengths <= 3 * np.median(lengths)).all(axis=1)]
        np.testing.assert_allclose(result.scores[window, query], means.mean(axis=0), rtol=1e-9, atol=1e-13)
        assert result.degrees_of_freedom[window, query] == len(means) - 1
        errors = np.abs(means[0] - means[1]) / 2 if len(means) == 2 else np.full(SAMPLES, np.nan)
        np.testing.assert_allclose(result.standard_error[window, query], errors, rtol=1e-7, atol=1e-13)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    for settings in ({"draws": 3}, {"draws": 0}, {"draws": 2.0}, {"seed": -1}):
        with pytest.raises(InputError, match=r"expected an even number of draws, 2 or more"):
            expected_influence(trajectory, workload, [Window(0, 9)], **settings)  # type: ignore[arg-type]
    for weights in (np.ones(SAMPLES - 1), np.ones((2, SAMPLES)), np.full(SAMPLES, np.nan), 0.5):
        with pytest.raises(InputError, match="one finite number for each of the 24 training samples"):
            track(trajectory, workload, [Window(0, 9)], weights=weights)  # type: ignore[arg-type]
