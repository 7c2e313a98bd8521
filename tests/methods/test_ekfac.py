"""Influence functions with Kronecker-factored eigenbases, against plain loops over samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from workloads import digits_workload

from dit_mlflow import Workload, train
from dit_mlflow.methods.fisher import InfluenceFunctionEkfac


class Convolutions(nn.Module):
    """Convolutions with stride, padding and dilation; an activation in place; a layer called twice; a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 2, dilation=2, bias=False)
        self.shared = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found = nn.functional.relu(self.first(inputs.reshape(-1, 1, 8, 8)), inplace=True)
        found = self.second(found).flatten(2).mT
        found = self.shared(torch.tanh(self.shared(found)))
        return self.last(self.norm(found).mean(dim=1))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """The second layer is the first one's transpose; the third sees its rows in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(64, 4, bias=False)
        self.swapped = nn.Linear(4, 4)
        self.last = nn.Linear(64, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.swapped(torch.tanh(self.encode(inputs)).flip(0)).flip(0)
        return self.last(found @ self.encode.weight)  # type: ignore[no-any-return]


def gradients_of(workload: Workload, model: nn.Module, sample: int | None) -> dict[str, Tensor]:
    batch = workload.batch([sample]) if sample is not None else workload.validation_set.tensors  # type: ignore
    value = workload.loss(model, (batch[0].double(), batch[1])).mean()
    found = torch.autograd.grad(value, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def by_hand(
    workload: Workload, model: nn.Module, blocks: dict[str, list[tuple[list[Tensor], list[Tensor]]]], damping: float
) -> np.ndarray:
    """Scores where ``blocks[layer][sample]`` lists the layer's inputs and output gradients, call and position alike."""
    n = workload.num_samples
    own = [gradients_of(workload, model, i) for i in range(n)]
    query = gradients_of(workload, model, None)
    solved = {}
    for layer, samples in blocks.items():
        bias = [f"{layer}.bias"] if f"{layer}.bias" in query else []

        def matrix(part: dict[str, Tensor], layer: str = layer, bias: list[str] = bias) -> Tensor:
            return torch.cat([part[f"{layer}.weight"].flatten(1), *(part[name][:, None] for name in bias)], dim=1)

        left = sum(torch.outer(g, g) for _, gs in samples for g in gs)
        right = sum(torch.outer(a, a) for inputs, _ in samples for a in inputs)
        basis = torch.kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])  # type: ignore[arg-type]
        eigenvalues = torch.stack([(basis.T @ matrix(part).flatten()) ** 2 for part in own]).mean(dim=0)
        fisher = basis @ torch.diag(eigenvalues + damping * eigenvalues.mean()) @ basis.T
        solution = torch.linalg.solve(fisher, matrix(query).flatten()).reshape(matrix(query).shape)
        solved[f"{layer}.weight"] = (solution[:, :-1] if bias else solution).reshape(query[f"{layer}.weight"].shape)
        solved |= dict.fromkeys(bias, solution[:, -1])
    for name in query.keys() - solved.keys():
        diagonal = torch.stack([part[name] ** 2 for part in own]).mean(dim=0)
        solved[name] = query[name] / (diagonal + damping * diagonal.mean())
    return np.array([float(sum((part[name] * solved[name]).sum() for name in query)) / n for part in own])  # type: ignore


def rows_of(workload: Workload, model: nn.Module, layers: list[str]) -> dict[str, list[Any]]:
    """Inputs and output gradients, one sample at a time, of layers whose patches are read one by one."""
    blocks: dict[str, list[Any]] = {name: [] for name in layers}
    for sample in range(workload.num_samples):
        seen: dict[str, list[Any]] = {name: [] for name in layers}
        hooks = [
            dict(model.named_modules())[name].register_forward_hook(
                lambda _, given, output, to=seen[name]: to.append((given[0].detach(), output)) or output.clone()
            )
            for name in layers
        ]
        inputs, targets = workload.batch([sample])
        loss = workload.loss(model, (inputs.double(), targets)).sum()
        for hook in hooks:
            hook.remove()
        for name in layers:
            module = dict(model.named_modules())[name]
            found = torch.autograd.grad(loss, [output for _, output in seen[name]], retain_graph=True)
            every_a, every_g = [], []
            for (given, output), gradient in zip(seen[name], found, strict=True):
                for a, g in positions(module, given[0], output[0], gradient[0]):
                    every_a.append(a if module.bias is None else torch.cat([a, torch.ones(1, dtype=a.dtype)]))
                    every_g.append(g)
            blocks[name].append((every_a, every_g))
    return blocks


def positions(module: nn.Module, given: Tensor, output: Tensor, gradient: Tensor) -> Any:
    if isinstance(module, nn.Linear):
        yield from zip(given.reshape(-1, given.shape[-1]), gradient.reshape(-1, gradient.shape[-1]), strict=True)
        return
    (pad, _), (stride, _), (dilation, _), (side, _) = (
        getattr(module, name) for name in ("padding", "stride", "dilation", "kernel_size")
    )
    padded = nn.functional.pad(given, (pad,) * 4)
    reach = dilation * (side - 1) + 1
    for y in range(output.shape[1]):
        for x in range(output.shape[2]):
            top, left = y * stride, x * stride
            patch = padded[:, top : top + reach : dilation, left : left + reach : dilation]
            yield patch.flatten(), gradient[:, y, x]


@pytest.mark.parametrize(
    ("model", "layers", "diagonal"),
    [
        (Convolutions, ["first", "second", "shared", "last"], ["norm.weight", "norm.bias"]),
        (Tied, ["last"], ["encode.weight", "swapped.weight", "swapped.bias"]),
    ],
)
def test_it_is_the_factored_newton_step(model: Any, layers: list[str], diagonal: list[str], tmp_path: Any) -> None:
    workload = digits_workload(model=model)
    trajectory = train(workload, tmp_path / "t")
    found = InfluenceFunctionEkfac(damping=0.3)(trajectory, workload)
    final = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).double()
    expected = by_hand(workload, final, rows_of(workload, final, layers), 0.3)
    assert found.metadata["diagonal"] == diagonal
    np.testing.assert_allclose(found.of(0), expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())


def test_it_is_exact_where_the_fisher_matrix_is_diagonal_in_the_basis(tmp_path: Any) -> None:
    """One output, inputs along the axes: the gradients are orthogonal, and the whole Fisher matrix can be inverted."""
    inputs, targets = torch.eye(6).repeat(2, 1), torch.linspace(-1, 1, 12)
    data = torch.utils.data.TensorDataset(inputs, targets)

    def squares(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0])[:, 0] - batch[1]) ** 2

    workload = digits_workload(
        model=lambda: nn.Linear(6, 1, bias=False), loss=squares, train_set=data, validation_set=data, batch_size=4
    )
    trajectory = train(workload, tmp_path / "t")
    found = InfluenceFunctionEkfac(damping=1e-2)(trajectory, workload)
    model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).double()
    own = torch.stack([gradients_of(workload, model, i)["weight"].flatten() for i in range(12)])
    fisher = own.T @ own / 12
    fisher += 1e-2 * fisher.trace() / 6 * torch.eye(6)
    expected = own @ torch.linalg.solve(fisher, gradients_of(workload, model, None)["weight"].flatten()) / 12
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-3, atol=1e-7)


class Idle(nn.Module):
    """A layer that the loss hardly knows."""

    def __init__(self, dead: bool) -> None:
        super().__init__()
        self.used = nn.Linear(64, 3)
        self.dead = nn.Linear(64, 3) if dead else None

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.used(inputs)
        return found if self.dead is None else found + 0 * self.dead(inputs)


def test_layers_without_a_gradient_do_not_count(tmp_path: Any) -> None:
    scores = []
    for dead in (True, False):
        workload = digits_workload(model=lambda dead=dead: Idle(dead))
        scores.append(InfluenceFunctionEkfac()(train(workload, tmp_path / str(dead)), workload).of(0))
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-8)
    assert np.abs(scores[0]).max() > 0
