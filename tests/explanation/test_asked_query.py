"""Queries that users name in a word, against means and outputs computed from the model by hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from workloads import digits_workload

from dit_mlflow import InputError, Trajectory, UnsupportedError, Workload, train
from dit_mlflow.explanation.asked_query import parse_query, read_groups
from dit_mlflow.methods.given_scores import GivenScores


@pytest.fixture(scope="module")
def workload() -> Workload:
    # The classes have names: digit 0 is 'zero', digit 2 is '1', which is also the number of another class.
    names = ("zero", "one", "1")
    return digits_workload(label=lambda index: names[int(digits_workload().train_set[index][1])])


@pytest.fixture(scope="module")
def trajectory(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return train(workload, tmp_path_factory.mktemp("asked") / "t")


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("groups") / "groups.csv"
    path.write_text("sample_index,group\n0,a\n3,a\n5,b: old\n4,http://c:1\n")
    return path


def outputs(workload: Workload, trajectory: Trajectory) -> tuple[torch.nn.Module, np.ndarray, np.ndarray, np.ndarray]:
    """The trained model; logits, labels and losses of the validation samples."""
    model = workload.build_model()
    trajectory.checkpoint(trajectory.num_steps).load_into(model)
    inputs, labels = workload.validation_set.tensors  # type: ignore[attr-defined]
    logits = model(inputs)
    return (
        model,
        logits.detach().numpy(),
        labels.numpy(),
        cross_entropy(logits, labels, reduction="none").detach().numpy(),
    )


CASES = {
    "class:zero": ("mean_validation_loss of class zero", lambda z, y, loss: loss[y == 0].mean()),
    "class:1": ("mean_validation_loss of class 1", lambda z, y, loss: loss[y == 2].mean()),
    "class:2": ("mean_validation_loss of class 1", lambda z, y, loss: loss[y == 2].mean()),
    "group:GROUPS:http://c:1": ("mean_validation_loss of group http://c:1", lambda z, y, loss: loss[4]),
    "group:GROUPS:a": ("mean_validation_loss of group a", lambda z, y, loss: loss[[0, 3]].mean()),
    "sample:4": ("loss of validation sample 4", lambda z, y, loss: loss[4]),
    "logit:one:3": ("logit of class one for validation sample 3", lambda z, y, loss: z[3, 1]),
    "logit:0:3": ("logit of class zero for validation sample 3", lambda z, y, loss: z[3, 0]),
    "margin:3": ("margin of validation sample 3", lambda z, y, loss: z[3, y[3]] - np.delete(z[3], y[3]).max()),
    "probability:3": ("probability of validation sample 3", lambda z, y, loss: np.exp(-loss[3])),
}


@pytest.mark.parametrize("text", CASES)
def test_queries_are_what_they_say(text: str, workload: Workload, trajectory: Trajectory, groups: Path) -> None:
    name, value = CASES[text]
    (found,) = parse_query(text.replace("GROUPS", str(groups)), workload)(trajectory)
    model, logits, labels, losses = outputs(workload, trajectory)
    assert found.name == name
    assert found(model.eval()).item() == pytest.approx(value(logits, labels, losses), rel=1e-5)


@pytest.mark.parametrize("by", ["", "GROUPS"])
def test_the_worst_group_is_that_of_largest_mean_loss(
    by: str, workload: Workload, trajectory: Trajectory, groups: Path
) -> None:
    (found,) = parse_query(f"worst_group:{groups}" if by else "worst_group", workload)(trajectory)
    model, _, labels, losses = outputs(workload, trajectory)
    of = {"group a": losses[[0, 3]], "group b: old": losses[[5]], "group http://c:1": losses[[4]]}
    if not by:
        of = {f"class {name}": losses[labels == number] for number, name in enumerate(("zero", "one", "1"))}
    worst = max(of, key=lambda name: of[name].mean())
    assert found.name == f"mean_validation_loss of {worst}"
    assert found(model.eval()).item() == pytest.approx(of[worst].mean(), rel=1e-5)


def test_without_a_query_the_default_one_is_asked(workload: Workload, trajectory: Trajectory) -> None:
    assert parse_query(" ", workload)(trajectory) is None


REFUSED = {
    "clas:zero": "query='clas:zero' cannot be read; expected class:NAME, group:FILE.csv:NAME, worst_group",
    "class:five": "query='class:five': there is no class 'five'; there are zero, one, 1",
    "class:7": "there is no class '7'",
    "logit:five:3": "there is no class 'five'",
    "group:GROUPS:c": "there is no group 'c'; there are a, b: old, http://c:1",
    "group:none.csv:a": "query='none.csv' cannot be read",
    "worst_group:none.csv": "expected a CSV file",
    "sample:three": "'three' is no index of a validation sample",
    "margin:-1": "'-1' is no index",
    "sample:16": r"queries on validation samples \[16\]: expected indices within 0 … 15",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(
    text: str, workload: Workload, groups: Path
) -> None:
    with pytest.raises(InputError, match=REFUSED[text]):
        parse_query(text.replace("GROUPS", str(groups)), workload)


def test_a_number_is_no_place_among_classes_that_are_numbers_themselves() -> None:
    names = ("1", "7", "4")
    workload = digits_workload(label=lambda index: names[int(digits_workload().train_set[index][1])])
    with pytest.raises(InputError, match="query='class:0': there is no class '0'; there are 1, 7, 4"):
        parse_query("class:0", workload)


def test_what_is_no_table_of_groups_or_labels(workload: Workload, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a CSV file"):
        parse_query(f"group:{'x:' * 3000}a", workload)
    path = tmp_path / "other.csv"
    path.write_text("index,group\n0,a\n")
    with pytest.raises(InputError, match="has the columns index, group; expected sample_index among them"):
        parse_query(f"group:{path}:a", workload)
    with pytest.raises(UnsupportedError, match="have no classes"):
        parse_query("class:zero", digits_workload(outputs=lambda model, batch: model(batch[0])[:, :1].sum()))


def test_groups_called_as_missing_values_are_groups(tmp_path: Path) -> None:
    """Namibia's code, to pandas, is no text."""
    path = tmp_path / "groups.csv"
    path.write_text("sample_index,group\n0,NA\n1,None\n2,b\n3,NA\n")
    assert read_groups(str(path), "groups") == {"NA": [0, 3], "None": [1], "b": [2]}
    path.write_text("sample_index,group\n0,a\n1, \n")
    with pytest.raises(InputError, match="no group in line 3"):
        read_groups(str(path), "groups")


@pytest.mark.parametrize("name", ["groups.zip", "groups.xz", "groups.tar", "groups.csv.gz", "pipe", "endless"])
def test_what_is_no_table_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    elif name == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        read_groups(str(path), "groups")
    with pytest.raises(InputError, match="cannot be read"):
        GivenScores(path)
