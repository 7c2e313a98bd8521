"""Removal influence against retrainings that it never saw, and its fit and errors against closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset
from workloads import digits_workload

from dit_mlflow import (
    Influence,
    InputError,
    Trajectory,
    UnsupportedError,
    Window,
    Workload,
    expected_influence,
    explain,
    leave_one_out,
    load_workload,
    removal_influence,
    track,
    train,
)
from dit_mlflow.evaluation import datamodeling_score
from dit_mlflow.explanation import Checks
from dit_mlflow.methods import banks, removal
from dit_mlflow.methods.blend import Blend, pooled
from dit_mlflow.methods.removal import Removal
from dit_mlflow.retraining import Subsets, train_on_subsets


def blended(parts: dict[str, np.ndarray], gone: np.ndarray, changes: np.ndarray, error: float = 0.0) -> Blend:
    return Blend.fitted(parts, {name: (np.full(gone.shape[1], error), np.inf) for name in parts}, gone, changes, 0)


def subsets(rows: int, samples: int, size: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.array([np.isin(np.arange(samples), random.choice(samples, size, replace=False)) for _ in range(rows)])


def test_the_blend_finds_the_parts_that_made_the_changes() -> None:
    """2 s + 0.5 t, and a constant that is no sample's."""
    random = np.random.default_rng(0)
    s, t, gone = random.normal(size=60), random.normal(size=60), subsets(32, 60, 12)
    found = blended({"s": s, "t": t, "nothing": random.normal(size=60)}, gone, gone @ (2 * s + 0.5 * t) + 7)
    np.testing.assert_allclose(found.scores, 2 * s + 0.5 * t, atol=1e-12)
    assert found.judged["order"] == pytest.approx(1)
    assert found.judged["size"] == pytest.approx(1)
    assert found.judged["coefficients"] == pytest.approx({"s": 2, "t": 0.5, "nothing": 0}, abs=1e-12)
    assert found.judged["constant"] == pytest.approx(7)
    assert found.errors.max() < 1e-12


def test_no_part_counts_against_itself() -> None:
    """A score that foretells the opposite gets no weight, and what is left is said not to foretell."""
    s, gone = np.random.default_rng(0).normal(size=60), subsets(32, 60, 12)
    found = blended({"s": s}, gone, -(gone @ s))
    assert not found.scores.any()
    assert found.judged["size"] is None or found.judged["size"] < 0.5


def test_removals_that_change_nothing_have_no_score() -> None:
    s, gone = np.random.default_rng(0).normal(size=60), subsets(32, 60, 12)
    found = blended({"s": s}, gone, np.zeros(32))
    assert not found.scores.any()
    assert found.judged["order"] is None


def test_trainings_that_broke_are_left_out_and_too_many_refused() -> None:
    s, gone = np.random.default_rng(0).normal(size=60), subsets(32, 60, 12)
    changes = gone @ s
    changes[:5] = np.nan
    np.testing.assert_allclose(blended({"s": s}, gone, changes).scores, s)
    changes[: 32 - 7] = np.inf
    with pytest.raises(UnsupportedError, match=r"25 of 32 trainings .* not a finite number"):
        blended({"s": s}, gone, changes)


def test_retrainings_that_leave_out_no_sample_of_the_window_are_foretold_to_change_nothing() -> None:
    """Two of 100 samples are in its steps, and none of them in most of 60 shares of ten; 15 shares say too little."""
    s, gone = np.array([1.0, -2.0]), subsets(60, 100, 10)[:, :2]
    some = int(gone.any(axis=1).sum())
    assert 8 <= some < 20
    found = blended({"s": s}, gone, gone @ s)
    assert found.judged["order"] > 0.95
    np.testing.assert_allclose(found.scores, s)
    with pytest.raises(UnsupportedError, match=r"^7 of 15 random shares .* in a step of the window, too few"):
        blended({"s": s}, gone[np.argsort(gone.any(axis=1))[60 - some - 8 : 60 - some + 7]], np.zeros(15))


def test_a_bank_that_grows_is_judged_as_it_is_fitted() -> None:
    """Its folds have fewer retrainings than single samples' corrections ask for."""
    random = np.random.default_rng(0)
    s, own, gone = random.normal(size=12), random.normal(size=12), subsets(72, 12, 3)
    found = blended({"s": s}, gone, gone @ own)
    np.testing.assert_allclose(found.scores - found.scores.mean(), own - own.mean(), atol=0.1)
    assert found.judged["order"] > 0.95


def test_the_standard_error_covers_the_coefficients_and_what_single_samples_do_besides() -> None:
    """Of 200 banks, 95 % of the intervals hold the score; more is allowed to a bootstrap of 24."""
    random = np.random.default_rng(0)
    s, t = random.normal(size=40), random.normal(size=40)
    held = []
    for seed in range(200):
        gone = subsets(24, 40, 10, seed)
        true = s + t + 0.5 * random.normal(size=40)
        found = blended({"s": s, "t": t}, gone, gone @ true)
        half = stats.t.ppf(0.975, found.freedom) * found.errors
        held.append(np.abs(found.scores - true) <= half)
    assert 0.9 < np.mean(held) <= 0.99


def test_a_large_bank_says_of_single_samples_what_no_part_knew() -> None:
    """And 95 % of the intervals hold what it says, also of samples that it says little of."""
    held = []
    for seed in range(30):
        random = np.random.default_rng(seed)
        s, own = random.normal(size=80), random.normal(size=80)
        s[:5] = own[:5] = 0  # In no step.
        others = subsets(200, 80, 12, seed + 1000)
        for rows, better in ((32, 0.0), (150, 0.1)):
            gone = subsets(rows, 80, 12, seed)
            found = blended({"s": s}, gone, gone @ (s + own) + 2 * random.normal(size=rows))
            of_parts, of_blend = (stats.spearmanr(others @ x, others @ (s + own))[0] for x in (s, found.scores))
            assert of_blend > of_parts + better - 1e-9
            assert found.judged["retrainings"] == rows
            assert not found.scores[:5].any()
        assert (found.errors[5:] > 0).all()
        half = stats.t.ppf(0.975, found.freedom) * found.errors
        held.append(np.abs(found.scores - (s + own))[5:] <= half[5:])
    assert 0.92 < np.mean(held) <= 0.99


def test_the_standard_error_covers_what_a_large_bank_does_not_dare_to_add() -> None:
    """Effects of single samples that are small beside noise: most banks show them, by less than one standard error."""
    held = []
    for seed in range(15):
        random = np.random.default_rng(seed)
        s, own, gone = random.normal(size=80), 0.3 * random.normal(size=80), subsets(150, 80, 12, seed)
        found = blended({"s": s}, gone, gone @ (s + own) + 2 * random.normal(size=150))
        half = stats.t.ppf(0.975, found.freedom) * found.errors
        held.append(np.abs(found.scores - (s + own)) <= half)
    assert 0.85 < np.mean(held) <= 0.99


def test_a_large_bank_adds_nothing_where_the_parts_know_all() -> None:
    random = np.random.default_rng(0)
    s, gone = random.normal(size=80), subsets(150, 80, 12)
    found = blended({"s": s}, gone, gone @ s + random.normal(size=150))
    np.testing.assert_allclose(found.scores, s, atol=0.1)


def test_errors_of_few_draws_are_pooled_over_samples() -> None:
    """Two pairs each: variances of one degree of freedom, where all samples have the same true one."""
    random = np.random.default_rng(0)
    draws = random.normal(size=(2, 500))
    own = stats.sem(draws, axis=0)
    part = Influence(
        draws.mean(axis=0)[None, None],
        (Window(0, 1),),
        ("q",),
        np.arange(500),
        "local",
        "expected",
        {},
        own[None, None],
        np.array([[1.0]]),
    )
    errors, freedom = pooled(part, 0, 0)
    assert freedom > 4
    true = np.sqrt(0.5)
    assert np.abs(errors - true).mean() < 0.3 * true < np.abs(own - true).mean()


def digits_3_and_8(rate: float) -> Workload:
    """Some labels flipped, ReLU."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero(np.isin(labels, (3, 8)))
    inputs, targets = torch.from_numpy(images[chosen] / 16).float(), torch.from_numpy(labels[chosen] == 8).long()
    targets[:120:10] = 1 - targets[:120:10]
    return digits_workload(
        model=lambda: nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)),
        train_set=TensorDataset(inputs[:120], targets[:120]),
        validation_set=TensorDataset(inputs[120:220], targets[120:220]),
        optimizer=lambda model: SGD(model.parameters(), lr=rate),
        batch_size=24,
        epochs=10,
    )


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trajectory, Workload]:
    workload = digits_3_and_8(rate=0.2)
    return train(workload, tmp_path_factory.mktemp("usual") / "t"), workload


@pytest.mark.parametrize("removed", [pytest.param(0.05, marks=pytest.mark.slow), 0.1, 0.5])
def test_it_foretells_removals_that_it_never_saw(usual: tuple[Trajectory, Workload], removed: float) -> None:
    """As well as the best of its parts, each of which fails at some share; in size as well as in order."""
    trajectory, workload = usual
    windows = [Window(0, trajectory.num_steps), Window(15, 25)]
    found = removal_influence(trajectory, workload, windows, removed=removed, seed=1)
    others = train_on_subsets(trajectory, workload, windows, subsets=150, share=1 - removed, seed=99)
    parts = track(trajectory, workload, windows), expected_influence(trajectory, workload, windows, draws=4)
    for place, window in enumerate(windows):
        by_parts = [datamodeling_score(part.of(window), others, window).values["lds"] for part in parts]
        by_blend = datamodeling_score(found.of(window), others, window).values["lds"]
        assert by_blend > 0.8
        assert min(by_parts) < by_blend > max(by_parts) - 0.05
        foretold = ~others.kept @ found.of(window)
        assert 0.8 < stats.linregress(foretold, others.changes[place, 0]).slope < 1.25


def test_more_draws_that_cannot_be_made_cost_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = load_workload("projects/digits", n_train=60, optimizer="adamw", lr=0.01, epochs=8)
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, trajectory.num_steps)]
    expected = removal.expected_over

    def diverging(question: Any, engine: Any, of: Any, dtype: str) -> Any:
        if len(of) == 1:
            raise UnsupportedError("training may diverge")
        return expected(question, engine, of, dtype)

    monkeypatch.setattr(removal, "expected_over", diverging)
    found = removal_influence(trajectory, workload, windows, removed=0.5)
    assert found.metadata["draws_agree"][str(windows[0])][0] < 0.5
    assert set(found.metadata["bank"][str(windows[0])][0]["coefficients"]) >= {"dit", "uniform", "beta", "tracin"}


def test_leave_one_out_that_cannot_be_made_costs_no_answer(
    usual: tuple[Trajectory, Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*given: Any, **how: Any) -> Any:
        raise UnsupportedError("whichever sample is left out, training diverges")

    monkeypatch.setattr(banks, "leave_one_out", diverging)
    found = removal_influence(*usual, [Window(0, 4)])
    assert "leave_one_out" not in found.metadata["bank"]["0-4"][0]["coefficients"]
    assert found.metadata["spent"]["leave_one_out"] == 0
    assert np.isfinite(found.scores).all()


def test_where_nothing_foretells_it_says_so(tmp_path: Path) -> None:
    """At this rate even leave-one-out has an LDS of .3, and a blend of .3 to .5."""
    workload = digits_3_and_8(rate=0.5)
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, trajectory.num_steps)]
    found = removal_influence(trajectory, workload, windows, removed=0.05)
    others = train_on_subsets(trajectory, workload, windows, subsets=150, share=0.95, seed=99)
    real = datamodeling_score(found.of(0), others).values["lds"]
    (low, high) = found.metadata["bank"][str(windows[0])][0]["order_interval"]
    assert real < 0.6
    assert low - 0.1 < real < high + 0.1
    assert high < 0.7


def test_the_same_seed_gives_the_same_and_small_networks_take_leave_one_out(
    usual: tuple[Trajectory, Workload],
) -> None:
    trajectory, workload = usual
    windows = [Window(0, 4)]
    one, again, other = (removal_influence(trajectory, workload, windows, seed=seed) for seed in (0, 0, 1))
    # To rounding: a stop-watch says what runs side by side.
    np.testing.assert_allclose(one.scores, again.scores, rtol=0, atol=1e-5 * np.abs(one.scores).max())
    assert np.abs(one.scores - other.scores).max() > 0.01 * np.abs(one.scores).max()
    assert one.metadata["draws_agree"]["0-4"][0] > 0.8
    assert one.metadata["spent"]["sweeps"] == 9
    assert one.metadata["spent"]["leave_one_out"] == 120
    exact = leave_one_out(trajectory, workload, windows, dtype=None)
    told = removal_influence(trajectory, workload, windows, exact=exact)
    np.testing.assert_allclose(one.scores, told.scores, rtol=0, atol=1e-5 * np.abs(one.scores).max())
    assert told.metadata["spent"]["leave_one_out"] == 0


def test_where_opposite_draws_disagree_there_are_more_of_them_and_tracin(tmp_path: Path) -> None:
    """Over the whole run under AdamW, and not in its last third."""
    workload = load_workload("projects/digits", n_train=100, optimizer="adamw", lr=0.01, epochs=8)
    trajectory = train(workload, tmp_path / "t")
    steps = trajectory.num_steps
    whole, last = windows = [Window(0, steps), Window(2 * steps // 3, steps)]
    found = removal_influence(trajectory, workload, windows, removed=0.5)
    agree = found.metadata["draws_agree"]
    assert agree[str(whole)][0] < 0.5 < agree[str(last)][0]
    coefficients = {window: found.metadata["bank"][str(window)][0]["coefficients"] for window in windows}
    assert "tracin" in coefficients[whole]
    assert "tracin" not in coefficients[last]
    assert found.metadata["spent"]["sweeps"] == 9 + 16
    # What is not kinked has the scores that it has alone.
    alone = removal_influence(trajectory, workload, [last], removed=0.5)
    np.testing.assert_allclose(found.of(last), alone.of(last), rtol=0, atol=1e-5 * np.abs(alone.scores).max())


def test_windows_of_few_samples_take_more_retrainings_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of one sample: of 32 shares without two of 24 samples, two have it."""
    workload = digits_workload(batch_size=1, epochs=1)
    trajectory = train(workload, tmp_path / "t")
    first = int(trajectory.step(0).samples[0])
    found = removal_influence(trajectory, workload, [Window(0, 1)])
    assert found.metadata["spent"]["retrainings"] == 512
    exact = leave_one_out(trajectory, workload, [Window(0, 1)]).scores[0, 0, first]
    assert found.scores[0, 0, first] == pytest.approx(exact, rel=0.05)
    monkeypatch.setattr(banks, "time_of_one", lambda *given: 1.0)
    with pytest.raises(UnsupportedError, match="of 32 random shares of the samples"):
        removal_influence(trajectory, workload, [Window(0, 1)])


def test_retrainings_without_a_finite_query_are_told(
    usual: tuple[Trajectory, Workload], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaking(*given: Any, **how: Any) -> Subsets:
        found = train_on_subsets(*given, **how)
        found.changes[0, 0, :3] = np.nan
        return found

    monkeypatch.setattr(banks, "train_on_subsets", breaking)
    monkeypatch.setattr(banks, "time_of_one", lambda *given: 1.0)
    found = removal_influence(*usual, [Window(0, 4)])
    assert found.metadata["bank"]["0-4"][0]["retrainings"] == 29
    assert "3 of 32 trainings without a share of the samples are left out" in caplog.text


def test_a_budget_of_numpys_is_saved(usual: tuple[Trajectory, Workload], tmp_path: Path) -> None:
    trajectory, workload = usual
    found = removal_influence(trajectory, workload, [Window(0, 4)], trainings=np.int64(8), seed=np.int64(1))
    assert Influence.load(found.save(tmp_path)).metadata == found.metadata


def test_the_error_of_a_single_pair_of_draws_is_unknown(usual: tuple[Trajectory, Workload]) -> None:
    trajectory, workload = usual
    whole = Window(0, trajectory.num_steps)
    found = removal_influence(trajectory, workload, [whole], trainings=8, removed=0.5)
    coefficients = found.metadata["bank"][str(whole)][0]["coefficients"]
    assert max(coefficients["uniform"], coefficients["beta"]) > 0
    assert np.isnan(found.standard_error).all()
    text = str(explain(trajectory, workload, [whole], method=Removal(trainings=8, removed=0.5), checks=Checks()))
    assert "where 50 % of the samples go" in text
    assert "nan" not in text


@pytest.mark.parametrize("removed", [0.5, 0.9])
def test_the_bank_leaves_out_as_many_as_were_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: float
) -> None:
    """Half of five samples are two, and nine tenths four."""
    inputs, targets = digits_workload().train_set.tensors
    workload = digits_workload(train_set=TensorDataset(inputs[:5], targets[:5]), batch_size=2)
    made = list[Subsets]()
    monkeypatch.setattr(
        banks, "train_on_subsets", lambda *given, **how: made.append(train_on_subsets(*given, **how)) or made[-1]
    )
    trajectory = train(workload, tmp_path / "t")
    removal_influence(trajectory, workload, [Window(0, trajectory.num_steps)], removed=removed)
    assert (~made[0].kept).sum(axis=1).tolist() == [round(5 * removed)] * 32


@pytest.mark.parametrize(
    "changes",
    [{"removed": 0.0}, {"removed": 1.0}, {"removed": 0.004}, {"removed": "0.1"}, {"trainings": 7}, {"seed": -1}],
)
def test_bad_settings_are_refused_before_any_work(usual: tuple[Trajectory, Workload], changes: dict[str, Any]) -> None:
    trajectory, workload = usual
    (name,) = changes
    with pytest.raises(InputError, match=f"{name}=.*expected"):
        removal_influence(trajectory, workload, [Window(0, 4)], **changes)
