"""Before, in and after the recorder's with block: nothing that was recorded is lost."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import Trajectory, TrajectoryError, TrajectoryRecorder
from dit_mlflow.recording import writer
from dit_mlflow.recording.recorded_model import RecordedModel


class Made:
    """A recorder, not yet entered, and what it records."""

    def __init__(self, folder: Path | str, **settings: Any) -> None:
        self.model = digits_model()
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        self.recorder = TrajectoryRecorder(self.model, self.optimizer, folder, **settings)

    def steps(self, dataset: Dataset[Any] | None = None) -> None:
        """Three of them."""
        for batch in self.recorder.watch(DataLoader(dataset or datasets()[0], batch_size=8)):
            self.optimizer.zero_grad()
            sample_losses(self.model, batch).mean().backward()
            self.optimizer.step()


class Closing(Dataset[tuple[Tensor, Tensor]]):
    """Cannot be read any longer once its file is closed."""

    error: BaseException | None = None

    def __len__(self) -> int:
        return len(datasets()[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.error is not None:
            raise self.error
        return datasets()[0][index]


@pytest.mark.parametrize("error", [OSError("the file is closed"), KeyboardInterrupt()])
def test_data_that_cannot_be_read_at_the_end_cost_no_step(
    error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, made = Closing(), Made(tmp_path / "t")
    try:
        with made.recorder:
            made.steps(data)
            data.error = error
    except KeyboardInterrupt:
        pass
    kept = Trajectory.open(tmp_path / "t")
    assert (kept.num_steps, kept.complete) == (3, isinstance(error, OSError))
    assert ("cannot be read sample by sample (OSError: the file is closed)" in caplog.text) == kept.complete
    assert kept.verify(digits_workload()).max_drift == 0


def test_a_last_state_that_cannot_be_taken_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path / "t", checkpoint_every=0)
    with pytest.raises(MemoryError), made.recorder:
        made.steps()
        monkeypatch.setattr(RecordedModel, "snapshot", fail)
    kept = Trajectory.open(tmp_path / "t")
    assert (kept.num_steps, kept.complete) == (3, False)


def fail(*_: object) -> None:
    raise MemoryError


def test_a_loop_outside_of_the_block_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Made(tmp_path / "t")
    with pytest.raises(TrajectoryError, match="iterated before the recorder is entered"):
        made.steps()
    with made.recorder:
        made.steps()
    assert "after its with block" not in caplog.text
    made.steps()
    made.steps()
    assert caplog.text.count("what is trained now is not part of the trajectory") == 1
    made.recorder.checkpoint()
    made.recorder.__exit__(ValueError, ValueError(), None)
    with pytest.raises(TrajectoryError, match="was entered and left"), made.recorder.one_step():
        pass
    trajectory = Trajectory.open(tmp_path / "t")
    assert (trajectory.num_steps, trajectory.complete) == (3, True)
    assert not made.recorder._step.has_batches


def test_leaving_a_block_that_was_not_entered_does_nothing(tmp_path: Path) -> None:
    Made(tmp_path / "t").recorder.__exit__(None, None, None)
    assert not (tmp_path / "t").exists()


def test_a_current_folder_that_changes_in_training_does_not_split_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    made = Made("t")
    with made.recorder:
        made.steps()
        made.recorder.checkpoint()
        monkeypatch.chdir("elsewhere")
        made.steps()
    assert not any((tmp_path / "elsewhere").iterdir())
    monkeypatch.chdir(tmp_path)
    trajectory = Trajectory.open("t")
    monkeypatch.chdir("elsewhere")
    assert trajectory.num_steps == 6
    assert trajectory.verify(digits_workload()).max_drift == 0


@pytest.mark.parametrize("trains", [False, True])
def test_a_forked_process_writes_nothing(trains: bool, tmp_path: Path) -> None:
    """It leaves the block when the other has long left it."""
    made = Made(tmp_path / "t")
    read, write = os.pipe()
    with made.recorder:
        made.steps()
        made.recorder.checkpoint()
        process = os.fork()
        if process == 0:
            signal.alarm(30)  # A wait for a thread that stayed in the other would not end.
            os.close(write)
            os.read(read, 1)  # Until the other has closed its end.
            try:
                if trains:
                    made.steps()
                made.recorder.__exit__(None, None, None)
                os._exit(0)
            except TrajectoryError as error:
                os._exit(1 if "in another process" in str(error) else 2)
            finally:
                os._exit(3)
        made.steps()
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "t").iterdir())
    os.close(read)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == int(trains)
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "t").iterdir()) == before
    trajectory = Trajectory.open(tmp_path / "t")
    assert (trajectory.num_steps, trajectory.complete) == (6, True)


def test_a_recorder_made_before_a_fork_is_entered_after_it(tmp_path: Path) -> None:
    made = Made(tmp_path / "t")
    process = os.fork()
    if process == 0:
        signal.alarm(30)
        try:
            with made.recorder:
                made.steps()
            os._exit(0)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    trajectory = Trajectory.open(tmp_path / "t")
    assert trajectory.complete
    assert trajectory.num_steps > 0


@pytest.mark.parametrize("offset", range(2))
def test_an_interrupt_within_the_recorders_own_lines_loses_no_step(
    offset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at lines that hand a step over; the lines around the optimizer's step are the loop's."""
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    before = sys.gettrace()
    at, reached = offset, True
    while reached:
        reached = False
        lines = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal lines, reached
            if frame.f_code.co_filename != writer.__file__ or reached:
                return None
            if event == "line":
                lines += 1
                if lines > at:  # noqa: B023
                    reached = True
                    raise KeyboardInterrupt
            return trace

        made = Made(tmp_path / str(at))
        with suppress(KeyboardInterrupt), made.recorder:
            made.steps()
            sys.settrace(trace)
            try:
                made.steps()
            finally:
                sys.settrace(before)
        trajectory = Trajectory.open(tmp_path / str(at))
        assert trajectory.num_steps == made.recorder.num_steps
        assert trajectory.verify(digits_workload()).max_drift == 0
        at += 11
    assert at > 100
