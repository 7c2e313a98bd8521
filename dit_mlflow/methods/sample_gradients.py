"""Gradients of a scalar of each training sample, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dit_mlflow.methods.snapshot import LOSSES_PER_PASS, Snapshot
from dit_mlflow.replay.adjoint import grad_or_zeros
from dit_mlflow.replay.dynamics import Parameters
from dit_mlflow.workload.batches import Batch, tensors_of, with_tensors
from dit_mlflow.workload.without_graph import without_graph

GRADIENTS_IN_MEMORY = 2**28
"""Bytes of single samples' gradients in memory at once."""

Output = Callable[[nn.Module, Batch, Tensor], Tensor]
"""``(model, batch, labels [B]) -> [B]``: one scalar per sample."""


def sample_gradients(snapshot: Snapshot, output: Output, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Values ``[B]`` of ``output`` and its gradients ``[B, P]`` by the trained parameters, over the training set.

    Args:
        snapshot: the model, in evaluation mode.
        output: a scalar of each sample, which must not depend on other samples.
        labels: passed to ``output`` with the samples, ``[n]``.

    Cost: a forward and a backward pass for each sample, side by side under ``torch.func.vmap`` if model and batches
    allow it, otherwise one after the other. Memory: :data:`GRADIENTS_IN_MEMORY` bytes of gradients, and the passes.
    """
    size = snapshot.dynamics.workload.num_samples
    one = sum(value.nbytes for value in snapshot.trained.values())
    at_once = max(1, min(LOSSES_PER_PASS, GRADIENTS_IN_MEMORY // one))
    for indices in np.array_split(np.arange(size), -(-size // at_once)):
        yield _rows(snapshot, output, indices, labels[torch.from_numpy(indices).to(labels.device)])


def squares(snapshot: Snapshot) -> np.ndarray:
    """``|d l_i / d p|^2`` of every trained parameter ``p`` and training sample, ``[parameters, n]``.

    Cost: as :func:`sample_gradients`.
    """
    workload, sizes = snapshot.dynamics.workload, [value.numel() for value in snapshot.trained.values()]

    def loss(model: nn.Module, batch: Batch, labels: Tensor) -> Tensor:
        return workload.sample_losses(model, batch, len(labels))

    found = [
        torch.stack([part.double().square().sum(dim=1) for part in rows.split(sizes, dim=1)])
        for _, rows in sample_gradients(snapshot, loss, torch.zeros(workload.num_samples))
    ]
    return torch.cat(found, dim=1).cpu().numpy()


def norms(snapshot: Snapshot) -> np.ndarray:
    """``|grad l_i|`` of every training sample, ``[n]``; cost as :func:`sample_gradients`."""
    return np.sqrt(squares(snapshot).sum(axis=0))


def _rows(snapshot: Snapshot, output: Output, indices: np.ndarray, labels: Tensor) -> tuple[Tensor, Tensor]:
    batch = snapshot.batch(indices)
    fixed = {name: value.detach() for name, value in snapshot.parameters.items()}
    expected = without_graph(lambda: snapshot.evaluate(lambda model: output(model, batch, labels), snapshot.parameters))

    def value(moved: Parameters, label: Tensor, *sample: Tensor) -> Tensor:
        single = with_tensors(batch, [tensor.unsqueeze(0) for tensor in sample])
        return snapshot.evaluate(lambda model: output(model, single, label.unsqueeze(0)), {**fixed, **moved})[0]

    trained = {name: fixed[name] for name in snapshot.trained}
    side_by_side = torch.func.vmap(
        torch.func.grad_and_value(value), in_dims=(None, *[0] * (1 + len(tensors_of(batch))))
    )
    try:
        gradients, values = side_by_side(trained, labels, *tensors_of(batch))
    except (RuntimeError, ValueError, NotImplementedError):
        return expected, _one_by_one(snapshot, output, indices, labels)
    # Values differ if a batch holds tensors that are not one row per sample.
    if values.shape != expected.shape or not torch.allclose(values, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        return expected, _one_by_one(snapshot, output, indices, labels)
    return expected, torch.cat([part.reshape(len(part), -1) for part in gradients.values()], dim=1)


def _one_by_one(snapshot: Snapshot, output: Output, indices: np.ndarray, labels: Tensor) -> Tensor:
    def row(index: int, label: Tensor) -> Tensor:
        single = snapshot.batch(np.array([index]))
        (value,) = snapshot.evaluate(lambda model: output(model, single, label.unsqueeze(0)), snapshot.parameters)
        return torch.cat([part.flatten() for part in grad_or_zeros(value, list(snapshot.trained.values()))])

    return torch.stack([row(index, label) for index, label in zip(indices, labels, strict=True)])
