"""Exact leave-one-out against plain sequential retraining."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import train_again, validation_loss, window_effect
from torch import nn
from torch.optim import SGD, AdamW
from workloads import digits_workload

from dit_mlflow import (
    Effort,
    InputError,
    Window,
    leave_one_out,
    load_workload,
    parse_windows,
    sample_losses,
    track,
    train,
)
from dit_mlflow.retraining import confirm
from dit_mlflow.retraining import retrain as counterfactual
from dit_mlflow.retraining.counterfactuals import Retraining

OPTIMIZERS: dict[str, Any] = {
    "nesterov": partial(SGD, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
}


def side_by_side(prefer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the choice away from the stop-watch."""
    monkeypatch.setattr(Retraining, "_prefer_side_by_side", lambda *arguments: prefer)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", ["local", "final", "cumulative"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_sequential_retraining(
    name: str, kind: Any, batched: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = digits_workload(
        optimizer=lambda model: OPTIMIZERS[name](model.parameters()),
        clip_grad_norm=0.5,
        regularizer=lambda model: 0.01 * sum(p.square().sum() for p in model.parameters()),
    )
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 1), Window(1, 8), Window(2, 9)]
    samples = [0, 5, 11, 23]
    side_by_side(batched, monkeypatch)
    found = leave_one_out(trajectory, workload, windows, kind, samples=samples)
    assert np.isnan(found.scores).sum() == 3 * (workload.num_samples - len(samples))
    for window in windows:
        expected = [window_effect(workload, trajectory, window, kind, j, 0.0) for j in samples]
        np.testing.assert_allclose(found.of(window)[samples], expected, rtol=1e-7, atol=1e-12)


def test_removal_keeps_the_coefficients_of_the_others(tmp_path: Any) -> None:
    """One step of SGD: removal leaves out the sample's own term, divided by the recorded batch size."""
    workload = digits_workload(batch_size=8, epochs=1)
    trajectory = train(workload, tmp_path / "t")
    step = trajectory.step(0)
    sample = int(step.samples[3])
    model = trajectory.checkpoint(0).load_into(workload.build_model()).double()
    inputs, targets = workload.batch(step.samples)
    losses = workload.loss(model, (inputs.double(), targets))
    gradient = torch.autograd.grad(losses.sum() - losses[3], list(model.parameters()))
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), gradient, strict=True):
            parameter -= 0.5 * part / 8
    recorded = train_again(workload, trajectory, lambda t, i: 1.0, until=1)
    expected = validation_loss(workload, model) - validation_loss(workload, recorded)
    found = leave_one_out(trajectory, workload, [Window(0, 1)], samples=[sample]).of(0)[sample]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_chunks_do_not_change_the_numbers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    side_by_side(True, monkeypatch)
    windows = parse_windows("3", trajectory)
    whole = leave_one_out(trajectory, workload, windows, "cumulative")
    monkeypatch.setattr(Retraining, "_chunk_size", lambda *arguments: 5)
    chunked = leave_one_out(trajectory, workload, windows, "cumulative")
    np.testing.assert_allclose(chunked.scores, whole.scores, rtol=1e-9, atol=1e-14)


def test_dropout_follows_the_recorded_masks_or_falls_back(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Batched or not, the numbers are those of the recorded masks."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3))

    workload = digits_workload(model=model, epochs=2)
    trajectory = train(workload, tmp_path / "t", order_seed=3)
    assert trajectory.verify(workload).max_drift == 0
    windows = [Window(0, trajectory.num_steps)]
    samples = [1, 7, 20]
    results = []
    for batched in (True, False):
        side_by_side(batched, monkeypatch)
        results.append(leave_one_out(trajectory, workload, windows, samples=samples).of(0)[samples])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-7)
    estimate = track(trajectory, workload, windows, dtype=torch.float64).of(0)[samples]
    assert np.corrcoef(estimate, results[0])[0, 1] > 0.9


def test_where_draws_differ_side_by_side_samples_are_left_out_one_at_a_time(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Transposed(nn.Module):
        """``vmap`` draws other masks for activations that are not contiguous."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop, self.outer = nn.Linear(64, 6), nn.Dropout(0.4), nn.Linear(6, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.outer(self.drop(torch.tanh(self.inner(images)).T).T)

    workload = digits_workload(model=Transposed)
    trajectory = train(workload, tmp_path / "t")
    side_by_side(True, monkeypatch)
    windows = [Window(0, trajectory.num_steps)]
    found = leave_one_out(trajectory, workload, windows, samples=[1, 7])
    expected = r"control run misses '(inner|outer)\.\w+' .*; random draws differ under vmap\. Retraining one"
    assert [bool(re.search(expected, message)) for message in caplog.messages] == [True] * draws_differ_under_vmap()
    side_by_side(False, monkeypatch)
    np.testing.assert_allclose(
        found.scores, leave_one_out(trajectory, workload, windows, samples=[1, 7]).scores, rtol=1e-7
    )


def draws_differ_under_vmap() -> bool:
    """They do not in torch 2.6."""

    def dropped(values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return nn.functional.dropout(values.T, 0.4)

    values = torch.ones(2, 8, 6)
    return not torch.equal(torch.func.vmap(dropped, randomness="same")(values)[0], dropped(values[0]))


@pytest.mark.parametrize(
    ("dtype", "miss", "holds"),
    [(torch.float64, 1e-9, True), (torch.float64, 1e-6, False), (None, 1e-4, True), (None, 1e-2, False)],
)
def test_the_control_may_miss_the_recorded_run_by_rounding_alone(
    dtype: Any, miss: float, holds: bool, tmp_path: Path
) -> None:
    """By the share ``miss`` of the way that training went."""
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    replay = trajectory.replay(workload, dtype)
    start, *_, recorded = (state.copy() for state in replay.forward(0, 3))
    control = recorded.side_by_side(2).copy()
    for name, value in control.parameters.items():
        value += miss * (recorded.parameters[name] - start.parameters[name])
    steps = [trajectory.step(t) for t in range(3)]
    assert Retraining(replay.training_step, [], 0)._control_holds(control, recorded, start, steps) == holds


def test_rounding_that_training_amplifies_does_not_end_leaving_out_side_by_side(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bias before BatchNorm moves by rounding alone under Adam, which is another one under ``vmap``."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    workload = digits_workload(model=model, optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.01))
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, trajectory.num_steps)]
    results = []
    for batched in (True, False):
        side_by_side(batched, monkeypatch)
        results.append(leave_one_out(trajectory, workload, windows, samples=[1, 7, 20]).of(0)[[1, 7, 20]])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    assert not caplog.messages


def test_samples_outside_a_window_are_exactly_zero(tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    window = Window(4, 5)
    met = trajectory.step(4).samples
    scores = leave_one_out(trajectory, workload, [window]).of(0)
    missed = np.setdiff1d(np.arange(workload.num_samples), met)
    assert (scores[missed] == 0).all()
    assert (scores[met] != 0).all()


@pytest.mark.parametrize("samples", [0, 25, [], [24], [0, 30], [-1], [True, False], [0.5]])
def test_samples_that_do_not_exist_are_refused(samples: Any, tmp_path: Any) -> None:
    workload = digits_workload(epochs=1)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(InputError, match="expected"):
        leave_one_out(trajectory, workload, [Window(0, 1)], samples=samples)


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.float64, "float64"), (torch.float32, "float32"), (None, "recorded")]
)
def test_the_result_says_in_which_dtype_it_was_computed(dtype: Any, said: str, tmp_path: Path) -> None:
    workload = digits_workload(epochs=1)
    trajectory = train(workload, tmp_path / "t")
    found = leave_one_out(trajectory, workload, [Window(0, 1)], samples=[0, 5], dtype=dtype)
    estimate = track(trajectory, workload, [Window(0, 1)])
    for result in (found, confirm(estimate, trajectory, workload, m=2, dtype=dtype)):
        assert (result.metadata["dtype"], result.metadata["num_removed"]) == (said, 2)


@pytest.mark.parametrize("batched", [True, False])
def test_running_statistics_follow_the_counterfactual(
    batched: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed from the loss, a sample still counts in batch statistics; what training makes of the weights differs."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    workload = digits_workload(model=model)
    trajectory = train(workload, tmp_path / "t")
    side_by_side(batched, monkeypatch)
    samples = [2, 19]
    window = Window(2, 8)
    found = leave_one_out(trajectory, workload, [window], "final", samples=samples).of(0)[samples]
    expected = [window_effect(workload, trajectory, window, "final", j, 0.0) for j in samples]
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_cumulative_windows_add_up_to_the_whole_run(tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    parts = leave_one_out(trajectory, workload, parse_windows("4", trajectory), "cumulative", samples=5)
    whole = leave_one_out(trajectory, workload, parse_windows("1", trajectory), "local", samples=5)
    np.testing.assert_allclose(parts.scores.sum(axis=0), whole.scores[0], rtol=1e-9, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "dask", "ray"])
def test_the_numbers_are_the_same_from_every_backend(backend: str, tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    windows = parse_windows("2", trajectory)
    here = leave_one_out(trajectory, workload, windows, samples=9)
    spread = leave_one_out(trajectory, workload, windows, samples=9, effort=Effort(jobs=2, backend=backend))
    np.testing.assert_allclose(spread.scores, here.scores, rtol=1e-9, atol=1e-14)


def test_a_workload_from_a_project_folder_reaches_the_workers(tmp_path: Any) -> None:
    workload = load_workload("projects/mnist", n_train=16, n_validation=16, epochs=2)
    trajectory = train(workload, tmp_path / "t")
    windows = parse_windows("1", trajectory)
    here, spread = (
        leave_one_out(trajectory, workload, windows, effort=Effort(jobs=jobs, backend="loky")) for jobs in (1, 2)
    )
    np.testing.assert_allclose(spread.scores, here.scores, rtol=1e-9, atol=1e-14)


def test_goes_on_from_what_was_finished(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A break after the first part costs the rest alone; another query or dtype starts anew."""
    monkeypatch.setattr("dit_mlflow.retraining.retrain.RETRAININGS_PER_PART", 8)
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    windows = parse_windows("1", trajectory)
    expected = leave_one_out(trajectory, workload, windows).scores
    real, ran = Retraining.run, []

    def counting(self: Retraining, *arguments: Any) -> Any:
        if len(ran) == 1 and not resumed:
            raise KeyboardInterrupt
        ran.append(len(arguments[0].counterfactuals))
        return real(self, *arguments)

    monkeypatch.setattr(Retraining, "run", counting)
    effort, resumed = Effort(folder=tmp_path / "kept"), False
    with pytest.raises(KeyboardInterrupt):
        leave_one_out(trajectory, workload, windows, effort=effort)
    resumed = True
    found = leave_one_out(trajectory, workload, windows, effort=effort).scores
    assert ran == [8, 8, 8]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)
    leave_one_out(trajectory, workload, windows, effort=effort)
    assert ran == [8, 8, 8]
    leave_one_out(trajectory, workload, windows, dtype=None, effort=effort)
    leave_one_out(trajectory, workload, windows, queries=sample_losses(workload, [3]), effort=effort)
    assert len(ran) == 9


def holding(value: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{"9": value})
    return file.getvalue()


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("made by a pickle",)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda data: b"",
        lambda data: data[:-3],
        lambda data: b"no archive" + data,
        lambda data: data.replace(b"NUMPY", b"DUMPY"),
        lambda data: holding(np.array([Code()], dtype=object)),
    ],
    ids=["empty", "cut off", "no archive", "changed", "a pickle"],
)
def test_a_finished_part_that_cannot_be_read_is_made_again(
    damaged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    ask = partial(
        leave_one_out, trajectory, workload, [Window(0, 9)], samples=[0, 5], effort=Effort(folder=tmp_path / "kept")
    )
    expected = ask().scores
    (part,) = (tmp_path / "kept").iterdir()
    whole = part.read_bytes()
    part.write_bytes(damaged(whole))
    np.testing.assert_allclose(ask().scores, expected, rtol=1e-9, atol=1e-14)
    assert not Path("made by a pickle").exists()
    assert len(part.read_bytes()) == len(whole)


def test_a_finished_part_on_a_disk_that_fails_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **settings: Any) -> Any:
        raise OSError("Input/output error")

    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    ask = partial(
        leave_one_out, trajectory, workload, [Window(0, 9)], samples=[0, 5], effort=Effort(folder=tmp_path / "kept")
    )
    expected = ask().scores
    monkeypatch.setattr(np, "load", failing)
    np.testing.assert_allclose(ask().scores, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("setting", [{"backend": "threads"}, {"jobs": 0}])
def test_effort_that_cannot_be_made_is_refused(setting: Any) -> None:
    with pytest.raises(InputError, match="expected"):
        Effort(**setting)


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_backend_starts_as_many_workers_as_asked_for_or_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(f"dit_mlflow.retraining.effort._{backend}", started.append)
    for jobs in (None, 3):
        Effort(jobs=jobs, backend=backend).configured()
    assert started == [1, 3]


@pytest.mark.parametrize("way", ["side by side", "one by one", "control misses"])
def test_progress_counts_every_step_once(way: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    counted: list[int] = []
    totals: list[int] = []

    @contextmanager
    def bar(total: int, title: str) -> Iterator[Any]:
        totals.append(total)
        yield SimpleNamespace(update=counted.append)

    monkeypatch.setattr(counterfactual, "progress_bar", bar)
    side_by_side(way != "one by one", monkeypatch)
    if way == "control misses":
        monkeypatch.setattr(Retraining, "_control_holds", lambda *arguments: False)
    leave_one_out(trajectory, workload, [Window(0, trajectory.num_steps)], samples=[0, 5, 11])
    assert totals == [3 * trajectory.num_steps]
    assert sum(counted) == totals[0]
    # It moves on while the work goes on, not at its end.
    assert len(counted) >= trajectory.num_steps


def test_a_loss_that_cannot_run_side_by_side_is_said_once_in_plain_words(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def branching(model: nn.Module, batch: Any) -> Any:
        found = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return found if found.detach().sum() > 0 else -found

    workload = digits_workload(loss=branching, epochs=1)
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 1), Window(1, 3)]
    found = leave_one_out(trajectory, workload, windows, samples=[0, 5])
    leave_one_out(trajectory, workload, windows, samples=[1])
    assert [entry.message for entry in caplog.records] == [
        "this model cannot be retrained side by side; retraining one after the other instead"
    ]
    for window in windows:
        expected = [window_effect(workload, trajectory, window, "local", j, 0.0) for j in (0, 5)]
        np.testing.assert_allclose(found.of(window)[[0, 5]], expected, rtol=1e-8, atol=1e-12)
