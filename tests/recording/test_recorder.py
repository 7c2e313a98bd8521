"""The recorder sees everything and changes nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import (
    DataLoader,
    Dataset,
    TensorDataset,
)
from workloads import SAMPLES, datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import (
    InputError,
    Trajectory,
    TrajectoryError,
    TrajectoryRecorder,
    UnsupportedError,
    Workload,
    WorkloadError,
    train,
)
from dit_mlflow.recording.folder import CLAIM, claimed


class Augmented(Dataset[Any]):
    """Draws from all three generators for every sample."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.data[index]
        noise = random.random() + float(np.random.rand()) + torch.rand(1)  # noqa: NPY002
        return inputs + 0.1 * noise, target


def own_loop(recorder: TrajectoryRecorder | None, model: nn.Module, optimizer: Any, data: Any) -> None:
    """A user's loop: dropout, augmentation, a scheduler, evaluation between epochs."""
    loader = DataLoader(data, batch_size=8, shuffle=True)
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=9)
    for _ in range(3):
        model.train()
        for inputs, targets in recorder.watch(loader) if recorder else loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scheduler.step()
            if recorder:
                recorder.log(loss=loss)
        model.eval()
        torch.rand(4)


def noisy_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


def seed_everything() -> None:
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    random.seed(11)


def test_recording_changes_no_bit_of_training(tmp_path: Path) -> None:
    results = []
    for record in (False, True):
        seed_everything()
        model = noisy_model()
        optimizer = Adam(model.parameters(), lr=0.01)
        data = Augmented(datasets()[0])
        if record:
            with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
                own_loop(recorder, model, optimizer, data)
        else:
            own_loop(None, model, optimizer, data)
        results.append((model.state_dict(), torch.get_rng_state(), random.random(), np.random.rand()))  # noqa: NPY002
    (plain, *plain_random), (recorded, *recorded_random) = results
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    assert torch.equal(plain_random[0], recorded_random[0])
    assert plain_random[1:] == recorded_random[1:]


def test_own_loop_with_random_draws_and_a_scheduler_replays_bit_for_bit(tmp_path: Path) -> None:
    seed_everything()
    model, data = noisy_model(), Augmented(datasets()[0])
    optimizer = Adam(model.parameters(), lr=0.01)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        own_loop(recorder, model, optimizer, data)
    workload = digits_workload(model=noisy_model, train_set=data, optimizer=None)
    trajectory = Trajectory.open(tmp_path / "t")
    assert trajectory.complete
    assert trajectory.verify(workload).max_drift == 0
    rates = [trajectory.step(t).hyperparameters[0]["lr"] for t in range(9)]
    assert len(set(rates)) == 9
    assert all(trajectory.step(t).loss is not None for t in range(9))


def test_checkpoints_stand_at_squares_and_at_the_end(tmp_path: Path) -> None:
    workload = digits_workload(epochs=4)
    assert train(workload, tmp_path / "a").checkpoint_steps == (0, 1, 4, 9, 12)
    assert train(workload, tmp_path / "b", checkpoint_every=5).checkpoint_steps == (0, 5, 10, 12)
    assert train(workload, tmp_path / "c", checkpoint_every=0).checkpoint_steps == (0, 12)


def test_modes_frozen_parameters_and_absent_gradients_are_noted(tmp_path: Path) -> None:
    model = noisy_model()
    model[0].bias.requires_grad_(False)
    model[2].eval()
    optimizer = SGD(model.parameters(), lr=0.1)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t", checkpoint_every=1) as recorder:
        for inputs, targets in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    step = Trajectory.open(tmp_path / "t").step(1)
    assert step.evaluation_mode == {"2"}
    assert step.no_gradient == {"0.bias"}
    workload = digits_workload(model=noisy_model)
    assert Trajectory.open(tmp_path / "t").verify(workload).max_drift == 0


def test_loss_may_be_logged_before_or_after_the_step(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for number, batch in enumerate(recorder.watch(DataLoader(datasets()[0], batch_size=8))):
            sample_losses(model, batch).mean().backward()
            if number == 0:
                recorder.log(loss=10.0)
            optimizer.step()
            if number == 1:
                recorder.log(loss=torch.tensor(11.0, requires_grad=True))
    trajectory = Trajectory.open(tmp_path / "t")
    assert [trajectory.step(t).loss for t in range(3)] == [10.0, 11.0, None]


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (torch.optim.Rprop, "Rprop is not supported: its step depends on the gradient's sign alone"),
        (torch.optim.LBFGS, "LBFGS is not supported: it evaluates the loss several times per step"),
        (torch.optim.SparseAdam, "SparseAdam is not supported: .* use dense ones with Adam"),
    ],
)
def test_optimizers_without_a_derivative_are_refused_by_name(optimizer: Any, reason: str, tmp_path: Path) -> None:
    model = nn.Linear(64, 3, bias=False)
    with pytest.raises(UnsupportedError, match=reason):
        TrajectoryRecorder(model, optimizer(model.parameters()), tmp_path / "t")


class Decaying(SGD):
    """Its step is that of its base, and something before and after it."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for value in self.param_groups[0]["params"]:
                value.mul_(0.99)
            super().step()
            for value in self.param_groups[0]["params"]:
                value.add_(0.001)


def test_the_step_of_a_subclass_is_one_step(tmp_path: Path) -> None:
    SGD(digits_model().parameters(), lr=0.1).register_step_pre_hook(lambda *_: None)
    workload = digits_workload(optimizer=lambda model: Decaying(model.parameters(), lr=0.3))
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.num_steps == 9
    assert trajectory.verify(workload).max_drift == 0


class TwoSteps(SGD):
    def first_step(self) -> None:
        with torch.no_grad():
            for value in self.param_groups[0]["params"]:
                value.sub_(0.1 * value.grad)


def test_a_loop_that_never_calls_step_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = digits_model()
    optimizer = TwoSteps(model.parameters(), lr=0.1)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for batch in recorder.watch(DataLoader(digits_workload().train_set, batch_size=24)):
            sample_losses(model, batch).mean().backward()
            optimizer.first_step()
    assert "no step was recorded: TwoSteps.step() was never called" in caplog.text


def test_misuse_is_named(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(TrajectoryError, match=r"without a batch from recorder\.watch"),
        TrajectoryRecorder(model, optimizer, tmp_path / "a"),
    ):
        optimizer.step()
    with pytest.raises(TrajectoryError, match="already holds a trajectory"):
        TrajectoryRecorder(model, optimizer, tmp_path / "a")
    with pytest.raises(InputError, match="checkpoint_every is 'often'"):
        TrajectoryRecorder(model, optimizer, tmp_path / "b", checkpoint_every="often")
    with pytest.raises(TrajectoryError, match="not parameters of the recorded model"):
        TrajectoryRecorder(digits_model(), optimizer, tmp_path / "b")
    with (
        pytest.raises(TrajectoryError, match="parameters changed between"),
        TrajectoryRecorder(model, optimizer, tmp_path / "b") as recorder,
    ):
        model[0].weight.data.add_(1)
        for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
            sample_losses(model, batch).mean().backward()
            optimizer.step()


class OwnGenerator(Dataset[Any]):
    """Augmentation from a generator that nobody else knows."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(3)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        inputs, target = datasets()[0][index]
        return inputs + 0.1 * float(self.random.standard_normal()), target


def test_data_with_a_generator_of_its_own_is_not_disturbed(tmp_path: Path) -> None:
    results = []
    for directory in (None, tmp_path / "t"):
        torch.manual_seed(0)
        model = digits_model()
        optimizer = SGD(model.parameters(), lr=0.1)
        loader = DataLoader(OwnGenerator(), batch_size=8)
        recorder = TrajectoryRecorder(model, optimizer, directory) if directory else None
        if recorder:
            recorder.__enter__()
        for batch in recorder.watch(loader) if recorder else loader:
            optimizer.zero_grad()
            sample_losses(model, batch).mean().backward()
            optimizer.step()
        if recorder:
            recorder.__exit__(None, None, None)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
    assert Trajectory.open(tmp_path / "t").manifest.dataset is None


def test_numbers_of_other_libraries_are_stored_as_numbers(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = Adam(model.parameters(), lr=torch.tensor(0.01), betas=(0.9, 0.99))
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for number, batch in enumerate(recorder.watch(DataLoader(datasets()[0], batch_size=8))):
            sample_losses(model, batch).mean().backward()
            optimizer.param_groups[0]["lr"] = np.float32(0.5) / (number + 1)
            optimizer.step()
    trajectory = Trajectory.open(tmp_path / "t")
    assert [trajectory.step(t).hyperparameters[0]["lr"] for t in range(2)] == [0.5, 0.25]
    assert trajectory.step(0).hyperparameters[0]["betas"] == (0.9, 0.99)


def test_settings_changed_in_place_are_noted(tmp_path: Path) -> None:
    model = digits_model()
    rate, betas = torch.tensor(0.5), [0.9, 0.99]
    optimizer = Adam(model.parameters(), lr=rate)
    optimizer.param_groups[0]["betas"] = betas
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
            sample_losses(model, batch).mean().backward()
            optimizer.step()
            rate.mul_(0.5)
            betas[0] /= 2
    steps = [Trajectory.open(tmp_path / "t").step(t).hyperparameters[0] for t in range(3)]
    assert [step["lr"] for step in steps] == [0.5, 0.25, 0.125]
    assert [step["betas"] for step in steps] == [(0.9, 0.99), (0.45, 0.99), (0.225, 0.99)]


@pytest.mark.parametrize("value", [nn.Tanh, 10**5000, "half \ud83d of a pair"], ids=["class", "digits", "half"])
def test_settings_that_cannot_be_stored_are_refused_before_training(value: object, tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    workload = digits_workload(reference="some:where", settings={"activation": value})
    with (
        pytest.raises(WorkloadError, match="cannot be stored as JSON"),
        TrajectoryRecorder(model, optimizer, tmp_path / "t", workload),
    ):
        raise AssertionError("training was reached")
    endless = digits_workload(reference="some:where", settings={"clip": float("inf")})
    with TrajectoryRecorder(model, optimizer, tmp_path / "u", endless):
        pass
    stored = Trajectory.open(tmp_path / "u").manifest.workload
    assert stored is not None
    assert stored.settings == {"clip": float("inf")}


def test_groups_added_in_training_are_refused_and_the_record_is_kept(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    with (
        pytest.raises(UnsupportedError, match="add_param_group"),
        TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder,
    ):
        for number, batch in enumerate(recorder.watch(DataLoader(datasets()[0], batch_size=8))):
            model.zero_grad()
            sample_losses(model, batch).mean().backward()
            if number == 2:
                optimizer.add_param_group({"params": model[2].parameters()})
            optimizer.step()
    trajectory = Trajectory.open(tmp_path / "t")
    assert (trajectory.num_steps, trajectory.complete) == (2, False)


def test_a_batch_left_behind_by_break_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = digits_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for _ in range(3):
            for number, batch in enumerate(recorder.watch(DataLoader(datasets()[0], batch_size=8))):
                if number == 2:
                    break
                optimizer.zero_grad()
                sample_losses(model, batch).mean().backward()
                optimizer.step()
    warnings = [record.getMessage() for record in caplog.records if "two passes over the loader" in record.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith("step 2 ") and "recorder.discard()" in warnings[0]


def test_without_any_state_to_compare_with_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workload = digits_workload()
    with pytest.raises(KeyboardInterrupt):
        interrupted(workload, tmp_path / "t")
    trajectory = Trajectory.open(tmp_path / "t")
    assert trajectory.checkpoint_steps == (0,) and trajectory.num_steps > 0
    assert trajectory.verify(workload).drift == {}
    assert "cannot check whether the workload is the recorded one" in caplog.text


def interrupted(workload: Workload, folder: Path) -> None:
    model = workload.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TrajectoryRecorder(model, optimizer, folder, checkpoint_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(DataLoader(datasets()[0], batch_size=8))):
            if number == 2:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            sample_losses(model, batch).mean().backward()
            optimizer.step()


def test_a_recorder_is_entered_once(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    recorder = TrajectoryRecorder(model, optimizer, tmp_path / "t")

    def steps() -> None:
        with recorder:
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
                optimizer.zero_grad()
                sample_losses(model, batch).mean().backward()
                optimizer.step()

    steps()
    with pytest.raises(TrajectoryError, match="has been entered before"):
        steps()
    assert Trajectory.open(tmp_path / "t").verify(digits_workload()).max_drift == 0
    assert Trajectory.open(tmp_path / "t").num_steps == 3


def test_of_two_recorders_in_a_new_folder_one_begins(tmp_path: Path) -> None:
    recorders = []
    for _ in range(2):
        model = digits_model()
        recorders.append(TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "t"))
    with recorders[0]:
        with pytest.raises(TrajectoryError, match="already holds a trajectory"):
            recorders[1].__enter__()
        assert Trajectory.open(tmp_path / "t").checkpoint_steps == (0,)


def test_a_claim_holds_as_long_as_its_process(tmp_path: Path) -> None:
    model = digits_model()
    late = TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "t")
    with claimed(tmp_path / "t"), pytest.raises(TrajectoryError, match="another recorder begins in"):
        late.__enter__()
    # As a kill leaves it.
    (tmp_path / "t" / CLAIM).touch()
    model = digits_model()
    with TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "t", resume=True):
        assert not (tmp_path / "t" / CLAIM).exists()
    assert Trajectory.open(tmp_path / "t").complete


def test_what_was_recorded_is_kept_where_the_interpreter_ends_without_leaving_the_block(tmp_path: Path) -> None:
    script = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from dit_mlflow import TrajectoryRecorder
torch.manual_seed(0)
model = nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder = TrajectoryRecorder(model, optimizer, sys.argv[1])
recorder.__enter__()
for (x,) in recorder.watch(DataLoader(TensorDataset(torch.randn(10, 3)), 2)):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "t"], check=True, timeout=120)
    kept = Trajectory.open(tmp_path / "t")
    assert not kept.complete
    assert [kept.step(t).samples.tolist() for t in range(kept.num_steps)] == [[k, k + 1] for k in range(0, 10, 2)]


def test_complex_parameters_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match=r"parameter '0\.weight' is complex \(complex64\)"):
        TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "t")


def test_parameters_that_share_their_memory_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    for tied in (lambda: nn.Parameter(model[0].weight), lambda: nn.Parameter(model[0].weight.data)):
        model[1].weight = tied()
        with pytest.raises(UnsupportedError, match=r"'0\.weight' and '1\.weight' share memory"):
            TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "t")
    model[1].weight = model[0].weight
    TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "t")
