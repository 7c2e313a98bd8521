"""Paths that are none, and errors of other libraries that quote passwords."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from torch import nn
from torch.optim import SGD

from dit_mlflow import DitError, Influence, Trajectory, TrajectoryRecorder, Window, load_workload
from dit_mlflow.errors import masked_errors
from dit_mlflow.tracking import load_influence

NO_PATHS: tuple[Any, ...] = ("a\0b", b"abc", 3, None, "x" * 5000, "a\ud83d")
SCORES = Influence(np.zeros((1, 1, 2)), (Window(0, 1),), ("loss",), np.arange(2), "local", "dit")
MODEL = nn.Linear(2, 1)


@pytest.mark.parametrize("path", NO_PATHS, ids=range(len(NO_PATHS)))
@pytest.mark.parametrize(
    "function",
    [
        Trajectory.open,
        Influence.load,
        SCORES.save,
        load_workload,
        lambda path: TrajectoryRecorder(MODEL, SGD(MODEL.parameters(), 0.1), path),
    ],
)
def test_what_can_be_no_path_is_named(function: Callable[[Any], Any], path: Any) -> None:
    with pytest.raises(DitError, match=r"is no path|expected a str"):
        function(path)


def test_what_can_be_no_run_is_named() -> None:
    with pytest.raises(DitError, match="source is a bytes"):
        load_influence(b"abc")  # type: ignore[arg-type]


class Stubborn(Exception):
    def __str__(self) -> str:
        return "sftp://me:S3cr3t@host"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MlflowException("no answer of postgresql://me:S3cr3t@host/db"), MlflowException),
        (OSError(28, "No space", "/mnt/ftp://me:S3cr3t@host/x"), OSError),
        (ValueError("sftp://me:S3cr3t@host", 3), ValueError),
        (KeyError("plain"), KeyError),
        (Stubborn(), DitError),
    ],
)
def test_errors_of_stores_keep_their_kind_and_lose_their_passwords(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised, masked_errors():
        try:
            raise RuntimeError("within sftp://me:S3cr3t@host")
        except RuntimeError:
            raise error from Stubborn()
    assert "S3cr3t" not in "".join(traceback.format_exception(raised.value, chain=True)).replace(
        "".join(traceback.format_tb(raised.tb)), ""
    )
