"""Groups left out together, against plain training without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles import train_again, validation_loss
from torch.optim import SGD
from workloads import digits_workload

from dit_mlflow import Checks, InputError, Trajectory, Window, Workload, explain, leave_groups_out, train

GROUPS = {"first": [0, 1, 2, 3], "one": [5], "overlapping": [3, 5, 5, 11, 17]}
WINDOWS = [Window(0, 4), Window(3, 9)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trajectory, Workload]:
    workload = digits_workload(optimizer=lambda model: SGD(model.parameters(), lr=0.3, momentum=0.5))
    return train(workload, tmp_path_factory.mktemp("groups") / "t"), workload


@pytest.mark.parametrize("kind", ["local", "final", "cumulative"])
def test_changes_are_those_of_plain_training_without_the_group(
    recorded: tuple[Trajectory, Workload], kind: Any
) -> None:
    trajectory, workload = recorded
    table = leave_groups_out(trajectory, workload, WINDOWS, GROUPS, kind)

    def value(group: list[int], first: int, last: int, until: int) -> float:
        def weight(t: int, i: int) -> float:
            return 0.0 if i in group and first <= t < last else 1.0

        return validation_loss(workload, train_again(workload, trajectory, weight, until))

    def effect(group: list[int], window: Window) -> float:
        if kind == "cumulative":
            changes = (value(group, 0, t, t) - value([], 0, t, t) for t in (window.end, window.start))
            return next(changes) - next(changes)
        until = window.end if kind == "local" else trajectory.num_steps
        return value(group, window.start, window.end, until) - value([], 0, 0, until)

    expected = [effect(group, window) for group in GROUPS.values() for window in WINDOWS]
    np.testing.assert_allclose(table["change"], expected, rtol=1e-7, atol=1e-12)
    assert table["group"].tolist() == [name for name in GROUPS for _ in WINDOWS]
    assert table["samples"].tolist() == [4, 4, 1, 1, 4, 4]
    assert table[["window_start", "window_end"]].to_numpy().tolist() == [[0, 4], [3, 9]] * 3


def test_an_explanation_has_sums_and_exact_effects(recorded: tuple[Trajectory, Workload]) -> None:
    trajectory, workload = recorded
    found = explain(trajectory, workload, WINDOWS, method="dit", groups=GROUPS, checks=Checks(ground_truth=None))
    table = found.groups
    assert table is not None
    whole = Window(0, 9)
    assert table["window"].tolist() == ["0-4", "3-9", "0-9"] * 3
    exact = leave_groups_out(trajectory, workload, [*WINDOWS, whole], GROUPS)
    np.testing.assert_allclose(table["exact"], exact["change"])
    sums = [
        found.scores.of(window)[sorted(set(group))].sum() for group in GROUPS.values() for window in (*WINDOWS, whole)
    ]
    np.testing.assert_allclose(table["predicted"], sums)
    # A group of one is leave-one-out.
    assert found.truth.leave_one_out is not None
    np.testing.assert_allclose(table.loc[table["group"] == "one", "exact"], found.truth.leave_one_out.scores[:, 0, 5])
    again = explain(trajectory, workload, WINDOWS, method="dit", groups=GROUPS, truth=found.truth)
    assert again.groups is not None
    np.testing.assert_allclose(again.groups["exact"], table["exact"])


def test_an_index_outside_is_told_with_the_bounds(recorded: tuple[Trajectory, Workload]) -> None:
    trajectory, workload = recorded
    with pytest.raises(InputError, match=r"group 'outside' holds .*; expected one or more indices within 0 … 23$"):
        leave_groups_out(trajectory, workload, WINDOWS, {"inside": [0, 23], "outside": [0, 24]})


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"empty": []},
        {"outside": [0, 24]},
        {"negative": [-1]},
        {"mask": [True, False]},
        {"table": [[0, 1], [2, 3]]},
        {"names": ["a"]},
    ],
)
def test_bad_groups_are_refused_before_any_work(recorded: tuple[Trajectory, Workload], groups: Any) -> None:
    trajectory, workload = recorded
    with pytest.raises(InputError, match="expected"):
        leave_groups_out(trajectory, workload, WINDOWS, groups, dtype=torch.float64)
    with pytest.raises(InputError, match="expected"):
        explain(trajectory, workload, WINDOWS, groups=groups)
