"""A disk that takes no more does not stop training; what could be saved is there, and the loss is said once."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import resource
import stat
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import processes
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import InputError, Trajectory, TrajectoryError, TrajectoryRecorder, train
from dit_mlflow.recording import writer
from dit_mlflow.trajectory import tensor_file


def run_loop(folder: Path, steps: int, at: dict[int, object] | None = None) -> tuple[nn.Module, TrajectoryRecorder]:
    """Train for some steps; before step ``t`` call ``at[t]``."""
    torch.manual_seed(0)
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with TrajectoryRecorder(model, optimizer, folder, checkpoint_every=2) as recorder:
        while recorder.num_steps < steps:
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
                if at and recorder.num_steps in at:
                    at.pop(recorder.num_steps)()  # type: ignore[operator]
                optimizer.zero_grad()
                sample_losses(model, batch).mean().backward()
                optimizer.step()
    return model, recorder


def test_training_goes_on_and_what_was_kept_is_written_when_the_disk_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    folder, away = tmp_path / "t", tmp_path / "away"

    def break_it() -> None:
        folder.rename(away)
        folder.write_text("a file where the folder was")

    def mend_it() -> None:
        folder.unlink()
        away.rename(folder)

    with caplog.at_level(logging.WARNING, logger="dit_mlflow"):
        model, recorder = run_loop(folder, 30, {9: break_it, 21: mend_it})
    assert recorder.failure is None
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "Training goes on" in caplog.records[0].message
    assert "no step is missing" in caplog.records[1].message
    trajectory = Trajectory.open(folder)
    assert (trajectory.num_steps, trajectory.complete) == (30, True)
    assert trajectory.verify(digits_workload()).max_drift == 0.0
    undisturbed, _ = run_loop(tmp_path / "u", 30)
    for one, other in zip(model.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_disk_that_stays_away_ends_the_record_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(writer, "UNWRITTEN_BYTES", 20_000)
    folder, away = tmp_path / "t", tmp_path / "away"

    def break_it() -> None:
        folder.rename(away)
        folder.write_text("a file where the folder was")

    with caplog.at_level(logging.WARNING, logger="dit_mlflow"):
        _, recorder = run_loop(folder, 300, {9: break_it})
    assert recorder.num_steps == 300
    assert isinstance(recorder.failure, OSError)
    assert len(caplog.records) == 1
    saved = Trajectory.open(away)
    assert 7 <= saved.num_steps <= 9
    assert not saved.complete
    assert saved.verify(digits_workload()).max_drift == 0.0


SPACE = 60_000


@pytest.fixture
def nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk on which a trajectory may take :data:`SPACE` bytes."""
    real = tensor_file._put_in_place

    def put_in_place(temporary: Path, path: Path) -> None:
        taken = sum(file.stat().st_size for file in path.parent.iterdir())
        if taken > SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(temporary, path)

    monkeypatch.setattr(tensor_file, "_put_in_place", put_in_place)


@pytest.mark.usefixtures("nearly_full")
@pytest.mark.parametrize("whole", [True, False])
def test_of_a_first_write_that_does_not_fit_the_steps_are_kept(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All is written at once, at the end, as in any training of a few seconds: steps first, then states that fit."""
    if not whole:
        monkeypatch.setitem(globals(), "SPACE", 20_000)
    with caplog.at_level(logging.WARNING, logger="dit_mlflow"):
        _, recorder = run_loop(tmp_path / "t", 90)
    saved = Trajectory.open(tmp_path / "t")
    assert recorder.num_steps == 90
    assert saved.epoch_ends == (*range(3, saved.num_steps, 3), saved.num_steps)
    assert saved.verify(digits_workload()).max_drift == 0.0
    files = {path.name: path.stat().st_size for path in (tmp_path / "t").iterdir()}
    assert files.keys() == {*saved.manifest.files, "manifest.json"}, "nothing else takes space"
    assert sum(files.values()) <= SPACE
    assert f"holds {saved.num_steps} steps and could not be written further" in caplog.records[0].message
    if whole:
        assert recorder.failure is None
        assert (saved.complete, saved.num_steps) == (True, 90)
        assert saved.checkpoint_steps[-1] == 90 and len(saved.checkpoint_steps) > 2
        assert "of the last 45 states of the trajectory" in caplog.text
    else:
        assert isinstance(recorder.failure, OSError)
        assert not saved.complete and 10 < saved.num_steps <= 90
        assert saved.checkpoint_steps == (0,)


def test_what_the_manifest_lists_stays_where_the_last_sync_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new manifest is in place when the folder that holds its name cannot be synced."""
    real, manifest = os.fsync, tmp_path / "t" / "manifest.json"

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode) and manifest.is_file() and "steps-" in manifest.read_text():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(file)

    monkeypatch.setattr(tensor_file.os, "fsync", fsync)
    run_loop(tmp_path / "t", 9)
    saved = Trajectory.open(tmp_path / "t")
    assert (saved.num_steps, saved.complete) == (9, True)
    saved.check_record()


def train_on_a_full_disk(folder: Path) -> str:
    """What it said on the way to its end, which is that of a disk without any space."""
    writer.FLUSH_BYTES = 200_000
    # No file may grow beyond this: real failing writes, in the middle of a file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    limit, steps = resource.getrlimit(resource.RLIMIT_FSIZE), iter(range(1000))

    def optimizer(model: nn.Module) -> Adam:
        made = Adam(model.parameters())
        made.register_step_post_hook(
            lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1])) if next(steps) == 57 else None
        )
        return made

    workload = digits_workload(epochs=20, optimizer=optimizer)
    with redirect_stderr(StringIO()) as said:
        try:
            train(workload, folder, checkpoint_every=1)
        except TrajectoryError as error:
            return f"{said.getvalue()}; raised: {error}"
    return said.getvalue()


def test_a_full_disk_in_the_middle_of_a_file(tmp_path: Path) -> None:
    said = processes.answer(train_on_a_full_disk, tmp_path / "t")
    assert said.count("Training goes on") == 1 and "raised: the trajectory could not be written" in said, said
    saved = Trajectory.open(tmp_path / "t")
    assert not saved.complete and saved.num_steps > 20
    assert not list((tmp_path / "t").glob("*.part"))
    saved.verify(digits_workload(optimizer=None))


def train_without_handles(folder: Path) -> tuple[bool, str]:
    """Whether the record is whole, and what was said: no file can be opened from step 9 to step 21."""
    writer.FLUSH_SECONDS = 0.0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    at = {
        9: lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1, most)),
        21: lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
    }
    with redirect_stderr(StringIO()) as said:
        _, recorder = run_loop(folder, 30, at)
    return recorder.failure is None, said.getvalue()


def test_file_handles_that_are_used_up_for_a_while(tmp_path: Path) -> None:
    whole, said = processes.answer(train_without_handles, tmp_path / "t")
    assert whole
    assert [said.count("Training goes on"), said.count("no step is missing")] == [1, 1], said
    saved = Trajectory.open(tmp_path / "t")
    assert (saved.num_steps, saved.complete) == (30, True)
    assert saved.verify(digits_workload()).max_drift == 0.0


def train_until_handles_end_at_a_manifest(folder: Path) -> int:
    """Steps in the first manifest that lists some; from when it is in place on, no file can be opened."""
    writer.FLUSH_SECONDS = 0.0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    real, listed = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        found = real(self, target)
        if target.name == "manifest.json" and not listed and (steps := json.loads(target.read_text())["num_steps"]):
            listed.append(steps)
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, most))
        return found

    Path.replace = replace  # type: ignore[assignment]
    with redirect_stderr(StringIO()):
        run_loop(folder, 30)
    return int(listed[0])


def test_what_a_manifest_lists_stays_where_handles_end_as_it_comes_in_place(tmp_path: Path) -> None:
    listed = processes.answer(train_until_handles_end_at_a_manifest, tmp_path / "t")
    saved = Trajectory.open(tmp_path / "t")
    assert saved.num_steps == listed
    assert saved.verify(digits_workload()).max_drift == 0.0


def test_a_folder_that_cannot_be_written_is_known_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = digits_model()
    with (
        pytest.raises(OSError, match="file"),
        TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "file" / "t"),
    ):
        raise AssertionError("training was reached")


def test_a_folder_that_is_moved_is_said_and_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    folder = tmp_path / "t"
    _, recorder = run_loop(folder, 12, {5: lambda: folder.rename(tmp_path / "away")})
    assert isinstance(recorder.failure, FileNotFoundError)
    assert "manifest.json, which was written before, is gone" in str(recorder.failure)
    assert caplog.text.count("could not be written further") == 1
    assert not folder.exists()


def test_of_two_recorders_that_resume_one_trajectory_the_later_leaves_it_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = run_loop(tmp_path / "t", 4)
    recorders = []
    for rate in (0.1, 0.2):
        trained = copy.deepcopy(model)
        optimizer = SGD(trained.parameters(), lr=rate)
        recorder = TrajectoryRecorder(trained, optimizer, tmp_path / "t", resume=True)
        recorders.append((recorder.__enter__(), trained, optimizer))
    for recorder, trained, optimizer in [*recorders, *recorders]:
        for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
            optimizer.zero_grad()
            sample_losses(trained, batch).mean().backward()
            optimizer.step()
        recorder.checkpoint()
    for recorder, *_ in recorders:
        recorder.__exit__(None, None, None)
    assert "another recorder writes there too" in caplog.text
    trajectory = Trajectory.open(tmp_path / "t")
    assert [trajectory.step(t).hyperparameters[0]["lr"] for t in range(trajectory.num_steps)] == [0.1] * 12
    assert trajectory.verify(digits_workload()).max_drift == 0
    assert recorders[0][0].failure is None and isinstance(recorders[1][0].failure, TrajectoryError)


def test_a_file_in_place_of_the_folder_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "t").touch()
    model = digits_model()
    with pytest.raises(InputError, match="t is no folder"):
        TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "t")


def test_our_own_loop_says_that_the_trajectory_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    steps = []

    def losses(model: nn.Module, batch: object) -> torch.Tensor:
        steps.append(None)
        if len(steps) == 12:
            (tmp_path / "t").rename(tmp_path / "away")
            (tmp_path / "t").write_text("")
        return sample_losses(model, batch)

    with pytest.raises(TrajectoryError, match=r"could not be written to .*ends earlier than training"):
        train(digits_workload(loss=losses, epochs=10), tmp_path / "t")
    assert len(steps) >= 30
