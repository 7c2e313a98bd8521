"""Ctrl-C at a terminal ends a job at once, in any phase, and keeps what is done; until then, something moves."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dit_mlflow.tracking import load_trajectory

ENDS = 2.0
"""Seconds."""

PATIENCE = 100


@dataclass(frozen=True)
class Ended:
    """A job that was interrupted: seconds to its first sign of life and from the signal to the end; what it wrote."""

    code: int
    first: float
    took: float
    said: str


def interrupted(arguments: list[str], sign: str, environment: dict[str, str]) -> Ended:
    """Runs ``dit-mlflow`` at a terminal, and sends it SIGINT when it has written ``sign``."""
    own, its = pty.openpty()
    command = [sys.executable, "-m", "dit_mlflow.cli", *arguments]
    # A new terminal has no columns, and bars no room.
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    begun = time.monotonic()
    # Where the tests run in the background of a shell, they ignore the signal.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env={**os.environ, **environment})
    finally:
        signal.signal(signal.SIGINT, kept)
    os.close(its)
    said, first, sent = b"", 0.0, 0.0
    try:
        while job.poll() is None and time.monotonic() - begun < PATIENCE:
            if not select.select([own], [], [], 0.05)[0]:
                continue
            try:
                said += os.read(own, 65536)
            except OSError:  # The terminal is closed.
                break
            first = first or time.monotonic() - begun
            if not sent and sign.encode() in said:
                sent = time.monotonic()
                job.send_signal(signal.SIGINT)
        code = job.wait(30)
        return Ended(code, first, time.monotonic() - sent, said.decode(errors="replace"))
    finally:
        job.kill()
        job.wait()
        os.close(own)


def test_while_libraries_are_loaded_it_moves_and_ends(tmp_path: Path) -> None:
    ended = interrupted(["influence"], "loading 1/5", {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"})
    assert ended.code == 1
    assert ended.first < 2
    assert ended.took < ENDS
    assert "Aborted!" in ended.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sign", "trained"),
    [
        # The bars of the work itself, which come a second after it has begun.
        (["train", "--epochs", "2000"], "training:", "FAILED"),
        (["influence", "--epochs", "40"], "retraining, steps", "FINISHED"),
    ],
    ids=["recording", "retraining"],
)
def test_in_the_middle_it_ends_and_keeps_what_is_done(
    store: str, arguments: list[str], sign: str, trained: str
) -> None:
    ended = interrupted(arguments, sign, {"MLFLOW_TRACKING_URI": store})
    assert ended.code == 1, ended.said
    assert ended.first < 2
    assert ended.took < ENDS
    statuses = {run.data.tags["dit.kind"]: run for run in MlflowClient().search_runs(["0", "1"])}
    assert statuses["training"].info.status == trained
    assert statuses.get("influence", statuses["training"]).info.status == "FAILED"
    # What was recorded until then can be used.
    assert load_trajectory(statuses["training"].info.run_id).num_steps > 0
