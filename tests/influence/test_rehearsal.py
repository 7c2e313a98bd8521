"""What cannot be swept shows in two steps, before a long run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import record
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from workloads import digits_model, digits_workload

from dit_mlflow import Trajectory, TrajectoryError, UnsupportedError, train
from dit_mlflow.influence.rehearsal import rehearse
from dit_mlflow.replay.adjoint import Adjoint


class Once(torch.autograd.Function):
    """A hand-written square whose backward pass autograd cannot follow."""

    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        context.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * context.saved_tensors[0]


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return Once.apply(self.linear(inputs))


def apart(model: nn.Module, batch: Any) -> Tensor:
    """Margins, whose backward pass torch does not differentiate."""
    return torch.nn.functional.multi_margin_loss(model(batch[0]), batch[1], reduction="none")


def test_operation_without_a_second_derivative_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be differentiated twice.*multi_margin_loss_backward"):
        rehearse(digits_workload(loss=apart))


def test_an_operation_that_autograd_does_not_differentiate_twice_is_traced() -> None:
    rehearse(digits_workload(model=HandWritten))


def test_a_gradient_that_autograd_takes_for_a_constant_is_refused_by_the_step_itself(tmp_path: Path) -> None:
    """Not by the comparison with differences alone: what looks at single steps makes none."""
    workload = digits_workload(model=HandWritten)
    trajectory = train(workload, tmp_path / "t")
    replay = trajectory.replay(workload)
    step = replay.loss_step
    adjoint = Adjoint(torch.ones(1, step.followed_parameters.size), torch.zeros(1, 0))
    with pytest.raises(UnsupportedError, match=r"cannot be differentiated twice.*once_differentiable"):
        step.pull_back(next(replay.forward(1, 1)), trajectory.step(1), adjoint)


def test_rehearsal_leaves_no_trace_and_passes_what_can_be_swept() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    rehearse(digits_workload())
    assert torch.equal(torch.rand(2), expected)


def test_training_stops_after_the_steps_asked_for(tmp_path: Path) -> None:
    whole = train(digits_workload(), tmp_path / "whole")
    part = train(digits_workload(), tmp_path / "part", max_steps=4)
    assert part.num_steps == 4
    assert part.complete
    state = part.checkpoint(4).parameters
    assert all(torch.equal(state[name], value) for name, value in whole.checkpoint(4).parameters.items())


def test_recorder_refuses_a_workload_that_is_not_what_the_loop_does_at_the_second_step(tmp_path: Path) -> None:
    def smoothed(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.1)

    model = digits_model()
    with pytest.raises(TrajectoryError, match=r"replaying up to step 1 misses the checkpoint"):
        record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5), workload=digits_workload(loss=smoothed))
    assert Trajectory.open(tmp_path / "t").num_steps == 1
