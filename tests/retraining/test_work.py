"""What retrainings cost, as counted, and banks of them that grow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset
from workloads import digits_workload

from dit_mlflow import InputError, Query, Window, Workload, mean_validation_loss, removal_influence, train
from dit_mlflow.influence.question import Question
from dit_mlflow.retraining import Effort, Subsets, train_on_subsets
from dit_mlflow.retraining.counterfactuals import Retraining
from dit_mlflow.retraining.work import time_of_one


def branching(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss that ``vmap`` cannot follow."""
    found = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return found if found.detach().sum() > 0 else -found


def wide(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def asked(workload: Workload, folder: Path) -> Question:
    trajectory = train(workload, folder)
    return Question.of(trajectory, workload, [Window(0, trajectory.num_steps)], "local", None)


def test_small_networks_share_most_of_a_step_and_large_ones_nothing(tmp_path: Path) -> None:
    costs = [
        time_of_one(asked(digits_workload(model=partial(wide, width)), tmp_path / str(width)))
        for width in (8, 64, 1024)
    ]
    assert 0 < costs[0] < costs[1] / 2 < costs[1] < 0.5
    assert costs[2] == 1


def test_what_does_not_run_side_by_side_costs_a_training(tmp_path: Path) -> None:
    assert time_of_one(asked(digits_workload(loss=branching), tmp_path / "t")) == 1


def test_what_torch_makes_copy_by_copy_costs_a_training(tmp_path: Path) -> None:
    class Renormed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found = self.layer(inputs)
            for _ in range(40):
                found = torch.renorm(found, 2, 0, 5.0)
            return found

    assert time_of_one(asked(digits_workload(model=Renormed), tmp_path / "t")) == 1


def test_no_stop_watch_decides_what_a_retraining_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = asked(digits_workload(), tmp_path / "t")
    usual, time_step = time_of_one(question), Retraining._time_step

    def stalled(self: Retraining, start: Any, step: Any, copies: int | None) -> float:
        return time_step(self, start, step, copies) + 60 * (copies is not None)

    monkeypatch.setattr(Retraining, "_time_step", stalled)
    assert time_of_one(question) == usual


def test_memory_for_few_copies_makes_each_dearer(tmp_path: Path) -> None:
    question = asked(digits_workload(), tmp_path / "t")
    few, many = (time_of_one(question, effort=Effort(memory_budget=bytes_)) for bytes_ in (100_000, 2**30))
    assert 2 * many < few < 1


def test_the_same_cost_at_every_call(tmp_path: Path) -> None:
    question = asked(digits_workload(), tmp_path / "t")
    assert len({time_of_one(question) for _ in range(3)}) == 1


@pytest.mark.parametrize("kind", ["local", "final"])
def test_a_bank_that_grows_is_the_bank_made_at_once(tmp_path: Path, kind: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 2), Window(2, 4), Window(0, trajectory.num_steps)]
    grow = partial(train_on_subsets, trajectory, workload, kind=kind, share=0.7, seed=3)
    at_once: Subsets = grow(windows[1:], subsets=11)
    grown: Subsets = grow(windows[1:], subsets=11, known=grow(windows, subsets=4))
    assert np.array_equal(grown.kept, at_once.kept)
    np.testing.assert_allclose(grown.changes, at_once.changes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("other", [{"seed": 4}, {"share": 0.6}, {"subsets": 5}, {"windows": [Window(0, 2)]}])
def test_a_bank_of_other_subsets_or_windows_does_not_grow(tmp_path: Path, other: dict[str, Any]) -> None:
    workload = digits_workload()
    settings: dict[str, Any] = {"windows": [Window(2, 4)], "subsets": 3, "share": 0.7, "seed": 3}
    grow = partial(train_on_subsets, train(workload, tmp_path / "t"), workload)
    known = grow(**(settings | other))
    with pytest.raises(InputError, match=r"known has . subsets in windows .*; expected fewer than"):
        grow(**(settings | {"subsets": 5}), known=known)


def test_a_query_without_a_value_in_the_first_steps_costs_the_same(tmp_path: Path) -> None:
    workload = digits_workload()
    question = asked(workload, tmp_path / "t")
    loss = mean_validation_loss(workload)
    late = Query("late", lambda model: torch.log(0.8 - loss(model)))  # The loss falls from 1.0 to 0.6.
    assert time_of_one(replace(question, queries=(late,))) == time_of_one(question)


def noise(loss: Any = None) -> Workload:
    """Labels that inputs say nothing of: at this rate, nothing foretells removals."""
    random = np.random.default_rng(0)
    inputs = torch.from_numpy(random.normal(size=(90, 64))).float()
    targets = torch.from_numpy(random.integers(3, size=90))
    return digits_workload(
        **({} if loss is None else {"loss": loss}),
        model=lambda: nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)),
        train_set=TensorDataset(inputs[:60], targets[:60]),
        validation_set=TensorDataset(inputs[60:], targets[60:]),
        optimizer=lambda model: SGD(model.parameters(), lr=0.7),
        batch_size=12,
        epochs=8,
    )


def test_a_bank_grows_where_the_first_retrainings_are_foretold_badly_and_more_cost_little(tmp_path: Path) -> None:
    trajectory = train(noise(), tmp_path / "t")
    windows = [Window(0, trajectory.num_steps), Window(2, 3)]
    found = removal_influence(trajectory, noise(), windows)
    banks = {window: found.metadata["bank"][str(window)][0] for window in windows}
    assert banks[windows[0]]["retrainings"] == found.metadata["spent"]["retrainings"] == 512
    assert banks[windows[1]]["order"] > 0.9
    assert banks[windows[1]]["retrainings"] == 32


def test_it_does_not_grow_where_each_costs_a_training(tmp_path: Path) -> None:
    workload = noise(branching)
    trajectory = train(workload, tmp_path / "t")
    found = removal_influence(trajectory, workload, [Window(0, trajectory.num_steps)], trainings=8)
    (bank,) = found.metadata["bank"].values()
    assert bank[0]["order"] < 0.9
    assert bank[0]["retrainings"] == found.metadata["spent"]["retrainings"] == 16
    assert found.metadata["spent"]["leave_one_out"] == 0
    assert "leave_one_out" not in bank[0]["coefficients"]


def test_leave_one_out_of_what_costs_more_than_a_quarter_of_the_budget_is_for_poor_windows(tmp_path: Path) -> None:
    trajectory = train(noise(), tmp_path / "t")
    windows = [Window(0, trajectory.num_steps), Window(2, 3)]
    # Room for few copies, so that each costs a sixth of a training.
    found = removal_influence(trajectory, noise(), windows, effort=Effort(memory_budget=100_000))
    parts = {window: found.metadata["bank"][str(window)][0]["coefficients"] for window in windows}
    assert [("leave_one_out" in parts[window]) for window in windows] == [True, False]
    assert found.metadata["spent"]["leave_one_out"] == 60
