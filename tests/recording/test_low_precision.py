"""Training in low precision is refused before long work, unless the user insists."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference
from plain_loop import Loss, Net, assert_replays, record, whole
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import Trajectory, TrajectoryError, TrajectoryRecorder, UnsupportedError, Workload, track
from dit_mlflow.trajectory import REPLAY_TOLERANCE


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Inside(Net):
    """Chooses its precision itself."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(inputs)


def under_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[0])
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch[1], reduction="none")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_low_precision_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    model = digits_model()
    model[2].to(dtype)
    with pytest.raises(UnsupportedError, match=rf"'2.weight' is in {str(dtype)[6:]}.*low_precision=True"):
        TrajectoryRecorder(model, SGD(model.parameters(), lr=0.5), tmp_path / "t")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (digits_model(), under_autocast),
        (Inside(), sample_losses),
        (torch.compile(Net(), backend="eager"), under_autocast),
        (compiled_in_place(Net()), under_autocast),
        (nn.DataParallel(digits_model()), under_autocast),
    ],
    ids=["around the model", "inside the model", "compiled", "compiled in place", "parallel"],
)
def test_autocast_is_refused_at_the_first_forward_pass(model: nn.Module, loss: Loss, tmp_path: Path) -> None:
    def never(value: Tensor) -> None:
        raise AssertionError("the forward pass was made")

    with pytest.raises(UnsupportedError, match=r"under torch\.autocast \(bfloat16\).*low_precision=True"):
        record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5), loss=loss, step=never)


def test_evaluation_under_autocast_is_nobodys_business(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        with torch.no_grad():
            under_autocast(model, datasets()[1].tensors)
        under_autocast(copy.deepcopy(model).eval(), datasets()[1].tensors)
        for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
            optimizer.zero_grad()
            sample_losses(model, batch).mean().backward()
            optimizer.step()
    assert_replays(Trajectory.open(tmp_path / "t"), digits_workload(), model)


def test_watching_for_autocast_leaves_no_trace_in_models_and_their_copies(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        assert len(pickle.dumps(copy.deepcopy(model))) < 10_000
        for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
            sample_losses(model, batch).mean().backward()
            optimizer.step()
            assert not any(module._forward_pre_hooks for module in model.modules())


def test_autocast_that_the_user_insists_on_replays_and_is_exact_in_float64(tmp_path: Path) -> None:
    model = digits_model()
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5), loss=under_autocast, low_precision=True)
    workload = digits_workload(loss=under_autocast)
    assert_replays(trajectory, workload, model)
    exact = track(trajectory, workload, whole(trajectory), dtype=torch.float64).of(0)
    expected = finite_difference(workload, trajectory, whole(trajectory)[0], "local", range(24), 1e-5)
    assert np.abs(exact - expected).max() < 1e-6 * np.abs(expected).max()
    rounded = track(trajectory, workload, whole(trajectory)).of(0)
    assert 1e-3 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.3
    with pytest.raises(TrajectoryError, match="misses the checkpoint"):
        trajectory.verify(digits_workload())


def test_low_precision_that_the_user_insists_on_replays(tmp_path: Path) -> None:
    model = digits_model().bfloat16()
    sets = [TensorDataset(data.tensors[0].bfloat16(), data.tensors[1]) for data in datasets()]
    optimizer = SGD(model.parameters(), lr=0.5)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t", low_precision=True) as recorder:
        for batch in recorder.watch(DataLoader(sets[0], batch_size=8)):
            optimizer.zero_grad()
            sample_losses(model, batch).mean().backward()
            optimizer.step()
    workload = Workload(lambda: digits_model().bfloat16(), sample_losses, *sets)
    trajectory = Trajectory.open(tmp_path / "t")
    assert_replays(trajectory, workload, model)
    rounded, exact = (track(trajectory, workload, whole(trajectory), dtype=d).of(0) for d in (None, torch.float64))
    assert 1e-3 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.3


def test_a_disabled_grad_scaler_is_a_step_in_float32(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(loss: Tensor) -> None:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    assert_replays(record(tmp_path / "t", model, optimizer, step=step), digits_workload(optimizer=None), model)


def test_grad_scaler_is_refused_at_its_first_step(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu")

    def step(loss: Tensor) -> None:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match=r"stepped by a GradScaler.*low_precision=True"):
        record(tmp_path / "t", model, optimizer, step=step)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("discards", [True, False])
def test_steps_that_a_scaler_skips(fused: bool, discards: bool, tmp_path: Path) -> None:
    model = digits_model()
    optimizer = Adam(model.parameters(), lr=0.02, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)
    skipped = 0
    torch.manual_seed(1)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t", low_precision=True) as recorder:
        for _ in range(3):
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8, shuffle=True)):
                optimizer.zero_grad()
                scaler.scale(16 * sample_losses(model, batch).mean()).backward()
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                if scaler.get_scale() < scale:
                    skipped += 1
                    if discards:
                        recorder.discard()
    trajectory = Trajectory.open(tmp_path / "t")
    workload = digits_workload(coefficients=lambda batch: torch.full((8,), 2.0), optimizer=None)
    assert 0 < skipped < 9
    assert trajectory.num_steps == 9 - skipped
    if discards or fused:
        assert trajectory.verify(workload).max_drift <= REPLAY_TOLERANCE
    else:
        with pytest.raises(TrajectoryError, match=r"a GradScaler skips\), call recorder\.discard\(\)"):
            trajectory.verify(workload)
