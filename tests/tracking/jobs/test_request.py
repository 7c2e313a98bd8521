"""What is given on the command line, as estimators and groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset
from workloads import datasets, digits_workload

from dit_mlflow import InputError
from dit_mlflow.methods.dit import Dit
from dit_mlflow.methods.removal import Removal
from dit_mlflow.tracking.jobs.request import Request, parse_groups


def test_without_a_share_one_sample_at_a_time_is_asked_about() -> None:
    assert Request(removed=0, dtype="float64", memory_mb=3).method(digits_workload()) == Dit(torch.float64, 3 * 2**20)
    assert Request(removed=0, compile="never").method(digits_workload()) == Dit(compile="never")


def test_a_share_asks_about_removals() -> None:
    asked = Request(removed=0.25, trainings=8, dtype="float64").method(digits_workload())
    assert isinstance(asked, Removal)
    assert (asked.removed, asked.trainings, asked.dtype, asked.compile) == (0.25, 8, torch.float64, "auto")
    # By default too; of few samples, of two.
    few = digits_workload(train_set=TensorDataset(*(tensor[:8] for tensor in datasets()[0].tensors)))
    assert [Request().method(workload).removed for workload in (digits_workload(), few)] == [0.1, 0.25]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(removed=1.0), r"removed=1\.0 of 24 samples"),
        (Request(removed=-0.1), r"removed=-0\.1"),
        (Request(removed=0.1, trainings=7), "trainings=7"),
        (Request(compile="yes"), "compile='yes'; expected 'auto'"),
        (Request(dtype="half"), "dtype='half'; expected one of recorded, float32, float64"),
    ],
)
def test_bad_values_are_named(request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message):
        request_.method(digits_workload())


def test_groups_of_labels() -> None:
    targets = datasets()[0].tensors[1].tolist()
    expected = {f"label {label}": [i for i, target in enumerate(targets) if target == label] for label in range(3)}
    assert parse_groups("label", digits_workload()) == expected
    assert parse_groups("", digits_workload()) is None


def test_groups_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_text("group,sample_index,note\n07,3,x\nb,5,\n07,11,y\n")
    assert parse_groups(str(path), digits_workload()) == {"07": [3, 11], "b": [5]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group\na\n", "has the columns group; expected sample_index among them"),
        ("group,sample_index\na,24\n", r"group 'a' holds \[24\]; expected one or more indices within 0 … 23"),
        ("group,sample_index\na,1.5\n", r"group 'a' holds \[1\.5\]"),
        ("group,sample_index\n", "there are no groups"),
        ("", "cannot be read"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_files_of_groups_that_cannot_be_used_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "groups.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        parse_groups(str(path), digits_workload())


def test_of_two_samples_no_share_can_be_asked_about_and_the_message_names_the_share_that_came() -> None:
    two = digits_workload(train_set=TensorDataset(*(tensor[:2] for tensor in datasets()[0].tensors)))
    with pytest.raises(InputError, match=r"removed=0\.1 of 2 samples.*removed=0 and leave_one_out tell"):
        Request().method(two)
