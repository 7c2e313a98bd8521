"""Losses that take derivatives of their own (forces, penalties), in every method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import window_effect
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import SGD
from workloads import digits_workload, sample_losses

from dit_mlflow import Trajectory, Window, leave_one_out, track, train
from dit_mlflow.methods import method

METHODS = [
    "tracin",
    "dvemb",
    "source",
    "influence_function",
    "influence_function_ekfac",
    "influence_function_datainf",
    "grad_dot",
    "grad_norm",
    "trak",
    "mirrored_influence",
    "representer_points",
]


def forces(graph: Callable[[nn.Module], bool], **kept: bool) -> Callable[[nn.Module, Any], Tensor]:
    """The graph of a force, where it is wanted, is that of the usual losses of potentials."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs = batch[0].detach().clone().requires_grad_()
        energy = model(inputs).logsumexp(dim=1)
        (force,) = torch.autograd.grad(energy, inputs, torch.ones_like(energy), create_graph=graph(model), **kept)
        return energy.square() + force.square().sum(dim=1)

    return loss


def penalised_by_parameters(model: nn.Module, batch: Any) -> Tensor:
    losses = sample_losses(model, batch)
    slopes = torch.autograd.grad(losses.mean(), [*model.parameters()], create_graph=True)
    return losses + 0.1 * torch.stack([slope.square().sum() for slope in slopes]).sum()


def forces_by_torch_func(model: nn.Module, batch: Any) -> Tensor:
    def energy(inputs: Tensor) -> Tensor:
        return functional_call(model, dict(model.named_parameters()), (inputs[None],)).logsumexp(dim=1)[0]

    return sample_losses(model, batch) + 0.1 * vmap(grad(energy))(batch[0]).square().sum(dim=1)


def trained(loss: Callable[[nn.Module, Any], Tensor], folder: Path) -> tuple[Any, Trajectory]:
    workload = digits_workload(loss=loss, optimizer=lambda model: SGD(model.parameters(), lr=0.05), epochs=1)
    return workload, train(workload, folder)


@pytest.mark.parametrize("kept", [{}, {"retain_graph": True}], ids=["freed", "kept"])
def test_forces_whose_graph_is_kept_in_training_alone_have_all_of_their_gradient(
    kept: dict[str, bool], tmp_path: Path
) -> None:
    """Without ``retain_graph``, autograd raises an error there; with it, a part of the gradient was left out."""
    workload, trajectory = trained(forces(lambda model: True), tmp_path / "always")
    other, recorded = trained(forces(lambda model: model.training, **kept), tmp_path / "training")
    window = Window(0, trajectory.num_steps)
    expected, found = track(trajectory, workload, [window]), track(recorded, other, [window])
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-7)
    for name in METHODS:
        expected, found = method(name)(trajectory, workload), method(name)(recorded, other)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("loss", [penalised_by_parameters, forces_by_torch_func])
def test_every_method_takes_derivatives_inside_a_loss(loss: Any, tmp_path: Path) -> None:
    workload, trajectory = trained(loss, tmp_path / "t")
    window = Window(0, trajectory.num_steps)
    found = leave_one_out(trajectory, workload, [window], samples=[0, 5]).of(window)[[0, 5]]
    expected = [window_effect(workload, trajectory, window, "local", j, 0.0) for j in (0, 5)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    for name in METHODS:
        assert np.isfinite(method(name)(trajectory, workload).scores).all(), name
