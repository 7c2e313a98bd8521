"""SOURCE against dense matrix exponentials, the sweep that it tends to, and the influence function at a minimum."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from oracles import train_again
from scipy.linalg import expm
from torch import nn
from torch.utils.data import TensorDataset
from workloads import datasets, digits_model, digits_workload

from dit_mlflow import (
    InputError,
    Trajectory,
    UnsupportedError,
    Window,
    Workload,
    parse_windows,
    sample_losses,
    track,
    train,
)
from dit_mlflow.methods.newton_step import InfluenceFunction
from dit_mlflow.methods.source import Source

DECAY = 0.05


def groups(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.1}],
        momentum=0.5,
        weight_decay=DECAY,
    )


def in_double(**changes: Any) -> Workload:
    train_set, validation_set = (TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in datasets())
    sets: dict[str, Any] = {"train_set": train_set, "validation_set": validation_set}
    return digits_workload(**({"model": lambda: digits_model().double()} | sets | changes))


def unrolled(workload: Workload, trajectory: Trajectory, windows: list[Window], kind: str, segments: int) -> np.ndarray:
    """With dense Hessians, matrix exponentials and explicit products, on states of a plain loop; two per segment."""
    steps = trajectory.num_steps
    names, shapes = zip(*((n, p.shape) for n, p in workload.build_model().named_parameters()), strict=True)  # type: ignore
    rates = np.concatenate([np.full(s.numel(), 2 * (0.5 if n[0] == "0" else 0.1)) for n, s in zip(names, shapes)])  # noqa: B905

    def losses_at(flat: torch.Tensor, data: Any) -> torch.Tensor:
        parts = flat.split([s.numel() for s in shapes])
        given = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(workload.build_model(), given, (data.tensors[0],))
        return nn.functional.cross_entropy(outputs, data.tensors[1], reduction="none")

    def state(t: int) -> torch.Tensor:
        model = train_again(workload, trajectory, lambda step, i: 1.0, t)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    bounds = [k * steps // segments for k in range(segments + 1)]
    derivative = torch.autograd.functional
    curves, own, shares = [], [], []
    for a, b in pairwise(bounds):
        states = [state(t) for t in (a + (b - a) // 4, a + 3 * (b - a) // 4)]
        share = np.zeros(24)
        for t in range(a, b):
            share[trajectory.step(t).samples] += 1 / 8 / (b - a)
        weights = torch.from_numpy(share)
        hessians = [derivative.hessian(lambda x, w=weights: w @ losses_at(x, workload.train_set), x) for x in states]
        curves.append(sum(hessians).numpy() / 2 + DECAY * np.eye(len(rates)))  # type: ignore[union-attr]
        found = [derivative.jacobian(lambda x: losses_at(x, workload.train_set), x) for x in states]
        own.append(sum(found).numpy() / 2)  # type: ignore[union-attr]
        shares.append(share)

    def influence(until: int, lo: int, hi: int) -> np.ndarray:
        query = derivative.jacobian(lambda x: losses_at(x, workload.validation_set).mean(), state(until)).numpy()
        adjoint, total = query, np.zeros(24)
        for t in reversed(range(lo, until)):
            k = max(k for k, bound in enumerate(bounds[:-1]) if bound <= t)
            # Of a step's flow: the integral of exp(-s D H) D, by the exponential of a block matrix.
            size = len(rates)
            block = np.zeros((2 * size, 2 * size))
            block[:size, :size] = -np.diag(rates) @ curves[k]
            block[:size, size:] = np.diag(rates)
            whole = expm(block)
            if t < hi:
                total += shares[k] * (own[k] @ (adjoint @ whole[:size, size:]))
            adjoint = adjoint @ whole[:size, :size]
        return total

    of = {
        "local": lambda w: influence(w.end, w.start, w.end),
        "final": lambda w: influence(steps, w.start, w.end),
        "cumulative": lambda w: influence(w.end, 0, w.end) - (influence(w.start, 0, w.start) if w.start else 0),
    }
    return np.stack([of[kind](window) for window in windows])


@pytest.mark.parametrize("kind", ["local", "final", "cumulative"])
def test_it_is_the_flow_with_dense_matrices(kind: str, tmp_path: Any) -> None:
    workload = in_double(model=lambda: nn.Sequential(nn.Linear(64, 1), nn.Tanh(), nn.Linear(1, 3)).double(),
                         optimizer=groups, epochs=4)  # fmt: skip
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 4), Window(4, 9)]
    found = Source(segments=2, tolerance=1e-10)(trajectory, workload, windows, kind)
    assert found.kind == kind
    expected = unrolled(workload, trajectory, windows, kind, segments=2)
    np.testing.assert_allclose(found.scores[:, 0], expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


def test_final_windows_add_up_and_queries_are_answered_one_like_many(tmp_path: Any) -> None:
    workload = in_double(optimizer=groups)
    trajectory = train(workload, tmp_path / "t")
    queries = sample_losses(workload, [1, 4])
    parts = Source()(trajectory, workload, [Window(0, 2), Window(2, 7), Window(7, 9)], "final", queries).scores
    for kind in ("final", "local", "cumulative"):
        whole = Source()(trajectory, workload, None, kind, queries).scores[0]
        np.testing.assert_allclose(parts.sum(axis=0), whole, rtol=1e-2, atol=1e-3 * np.abs(whole).max())
    for row, query in zip(whole, queries, strict=True):
        np.testing.assert_allclose(Source()(trajectory, workload, queries=[query]).of(0), row, rtol=1e-9)


def test_segments_of_one_step_tend_to_the_sweep(tmp_path: Any) -> None:
    """The flow over a step differs from the step by its rate, to first order."""
    errors = []
    for rate in (0.05, 0.005):
        workload = in_double(
            optimizer=lambda model, rate=rate: torch.optim.SGD(model.parameters(), lr=rate, weight_decay=DECAY),
            regularizer=lambda model: 0.02 * sum(p.square().sum() for p in model.parameters()),
        )
        trajectory = train(workload, tmp_path / str(rate))
        windows = parse_windows("2", trajectory)
        expected = track(trajectory, workload, windows, "final").scores
        found = Source(segments=9, states=1, tolerance=1e-10)(trajectory, workload, windows, "final").scores
        errors.append(np.abs(found - expected).max() / np.abs(expected).max())
    assert errors[0] < 0.05
    assert 8 < errors[0] / errors[1] < 12


def test_at_a_minimum_it_is_the_influence_function(tmp_path: Any) -> None:
    """A flow for ever: ``(1 - exp(-tau H)) / H`` is the inverse."""
    workload = in_double(
        model=lambda: nn.Linear(64, 3).double(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.2),
        regularizer=lambda model: 0.1 * sum(p.square().sum() for p in model.parameters()),
        batch_size=24,
        epochs=600,
    )
    trajectory = train(workload, tmp_path / "t")
    expected = InfluenceFunction(damping=1e-12, tolerance=1e-10)(trajectory, workload)
    assert expected.metadata["damping"] == 1e-12
    found = Source(segments=1, states=1, tolerance=1e-9)(trajectory, workload)
    np.testing.assert_allclose(found.of(0), expected.of(0), rtol=1e-5, atol=1e-7 * np.abs(expected.of(0)).max())


@pytest.mark.parametrize(
    ("used", "changes"),
    [
        ("SGD and clipped gradients", {"clip_grad_norm": 1.0}),
        ("Adam", {"optimizer": lambda model: torch.optim.Adam(model.parameters())}),
        ("maximize=True", {"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, maximize=True)}),
    ],
)
def test_other_optimizers_are_refused(used: str, changes: dict[str, Any], tmp_path: Any) -> None:
    workload = digits_workload(epochs=1, **changes)
    with pytest.raises(UnsupportedError, match=used):
        Source()(train(workload, tmp_path / "t"), workload)


def test_a_flow_that_overflows_is_refused(tmp_path: Any) -> None:
    workload = in_double(
        regularizer=lambda model: -5 * sum(p.square().sum() for p in model.parameters()), epochs=13,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=2.0),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="cannot follow the flow"):
        Source(segments=1)(train(workload, tmp_path / "t"), workload)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="segments=0, states=2"):
        Source(segments=0)
