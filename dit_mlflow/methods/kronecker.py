"""The Fisher matrix of a model's layers in Kronecker-factored eigenbases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import debug_unwrap

from dit_mlflow.methods.last_layer import Call, listening
from dit_mlflow.methods.sample_gradients import GRADIENTS_IN_MEMORY
from dit_mlflow.methods.snapshot import Snapshot, Vectors
from dit_mlflow.replay.adjoint import grad_or_zeros

Pass = list[tuple[Tensor, Tensor]]
"""Inputs ``[B, P, I]`` and output gradients ``[B, P, O]`` of a layer, once per call; ``P`` = positions."""

Key = TypeVar("Key")


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear map whose weight, and perhaps bias, training moves: ``G_i = sum_p g_ip a_ip^T``, ``[O, I]``.

    Attributes:
        module: ``nn.Linear`` or ``nn.Conv2d``.
        weight, bias: their parameters' names; with a bias, inputs end in a 1.
    """

    module: nn.Module
    weight: str
    bias: str | None

    @property
    def names(self) -> list[str]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrix(self, vectors: Vectors) -> Tensor:
        """The layer's part of parameter vectors, ``[rows, O, I]``."""
        weight = vectors[self.weight].flatten(2)
        return weight if self.bias is None else torch.cat([weight, vectors[self.bias].unsqueeze(2)], dim=2)

    def vectors(self, matrix: Tensor, like: Vectors) -> Vectors:
        """``[rows, O, I]`` by parameter, in the shape and dtype of ``like``."""
        found = {self.weight: matrix if self.bias is None else matrix[:, :, :-1]}
        if self.bias is not None:
            found[self.bias] = matrix[:, :, -1]
        return {name: part.reshape(like[name].shape).to(like[name]) for name, part in found.items()}

    def rows(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """A call's inputs and output gradients as ``[B, P, I]`` and ``[B, P, O]``, float64."""
        if isinstance(self.module, nn.Conv2d):
            conv = self.module
            assert not isinstance(conv.padding, str)
            inputs = nn.functional.unfold(inputs, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT
            gradients = gradients.flatten(2).mT
        size = len(inputs)
        inputs = inputs.reshape(size, -1, inputs.shape[-1]).double()
        if self.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :, :1])], dim=2)
        return inputs, gradients.reshape(size, -1, gradients.shape[-1]).double()


class Captured:
    """Inputs and output gradients of a snapshot's layers, over the training set.

    Args:
        snapshot: the state.
        weights: ``p``, ``[n]``; output gradients are scaled by their roots.

    Attributes:
        layers: by module name, if their rows were checked to give single samples' gradients; without layers that have
            tied weights or do not see one row per sample.
    """

    def __init__(self, snapshot: Snapshot, weights: np.ndarray) -> None:
        self.snapshot = snapshot
        self.weights = weights
        candidates = _candidates(snapshot)
        with listening({name: layer.module for name, layer in candidates.items()}) as calls:
            _, losses = next(snapshot.batches())
            passes = _passes(candidates, calls, losses, retain_graph=True)
        self.layers = {
            name: candidates[name] for name, found in passes.items() if self._agrees(candidates[name], found, losses)
        }

    def __iter__(self) -> Iterator[dict[str, Pass]]:
        """For each part of the training set, the calls of each layer."""
        with listening({name: layer.module for name, layer in self.layers.items()}) as calls:
            for indices, losses in self.snapshot.batches():
                roots = torch.from_numpy(np.sqrt(self.weights[indices])).to(losses)
                yield _passes(self.layers, calls, losses * roots)
                calls.clear()

    def _agrees(self, layer: Layer, calls: Pass, losses: Tensor) -> bool:
        """Whether the rows of the first and the last sample give those samples' gradients."""
        trained = [self.snapshot.trained[name] for name in layer.names]
        for sample in {0, len(losses) - 1}:
            parts = grad_or_zeros(losses[sample], trained, retain_graph=True)
            expected = layer.matrix({name: part[None] for name, part in zip(layer.names, parts, strict=True)})[0]
            found = torch.stack([gradients[sample].T @ inputs[sample] for inputs, gradients in calls]).sum(dim=0)
            if not torch.allclose(found, expected.double(), rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
                return False
        return True


def _passes(
    layers: Mapping[str, Layer], calls: Sequence[Call], losses: Tensor, retain_graph: bool = False
) -> dict[str, Pass]:
    """The calls by layer, without layers that were not called with one row per sample."""
    # What torch.func was told inside of the loss has no derivative outside.
    odd = {name for name, _, output in calls if debug_unwrap(output) is not output}
    calls = [call for call in calls if call[0] not in odd]
    if not calls:
        return {}
    found = grad_or_zeros(losses.sum(), [output for *_, output in calls], retain_graph=retain_graph)
    passes: dict[str, Pass] = {}
    for (name, inputs, _), gradients in zip(calls, found, strict=True):
        if inputs.dim() > 1 and len(inputs) == len(gradients) == len(losses):
            passes.setdefault(name, []).append(layers[name].rows(inputs, gradients))
        else:
            odd.add(name)
    return {name: rows for name, rows in passes.items() if name not in odd}


def _candidates(snapshot: Snapshot) -> dict[str, Layer]:
    layers = {}
    for name, module in snapshot.dynamics.model.named_modules():
        prefix = f"{name}." if name else ""
        plain = isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
        if plain and f"{prefix}weight" in snapshot.trained:
            bias = f"{prefix}bias" if f"{prefix}bias" in snapshot.trained else None
            layers[name] = Layer(module, f"{prefix}weight", bias)
    return layers


@dataclass(frozen=True, eq=False)
class EigenFactors:
    """``F = (U_O kron U_I) diag(Lambda) (U_O kron U_I)^T`` of one layer.

    Attributes:
        outputs, inputs: ``U_O`` ``[O, O]`` and ``U_I`` ``[I, I]``.
        eigenvalues: ``Lambda``, ``[O, I]``: the second moment of the gradients in that basis.
    """

    outputs: Tensor
    inputs: Tensor
    eigenvalues: Tensor

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """``(F + damping mean(Lambda))^{-1}`` of ``[rows, O, I]``; 0 for a layer without gradients."""
        rotated = self.outputs.T @ matrix.double() @ self.inputs
        return self.outputs @ divided(rotated, self.eigenvalues, damping) @ self.inputs.T


def divided(vectors: Tensor, eigenvalues: Tensor, damping: float) -> Tensor:
    """``vectors / (eigenvalues + damping mean(eigenvalues))``; 0 if all eigenvalues are."""
    mean = eigenvalues.mean()
    return vectors / (eigenvalues + damping * mean) if mean > 0 else torch.zeros_like(vectors)


def eigen_factors(captured: Captured) -> dict[str, EigenFactors]:
    """The factors of every layer. Cost: two passes over the training set, and an eigendecomposition of ``I x I`` and
    ``O x O`` for each layer."""
    moments: dict[tuple[str, int], Tensor] = {}
    for passes in captured:
        for name, calls in passes.items():
            for side, rows in ((side, rows.flatten(0, 1)) for call in calls for side, rows in enumerate(call)):
                _add(moments, (name, side), rows.T @ rows)
    bases = {key: torch.linalg.eigh(moment)[1] for key, moment in moments.items()}
    eigenvalues: dict[str, Tensor] = {}
    for passes in captured:
        for name, calls in passes.items():
            rotated = [(inputs @ bases[name, 0], gradients @ bases[name, 1]) for inputs, gradients in calls]
            _add(eigenvalues, name, _squares(rotated))
    return {name: EigenFactors(bases[name, 1], bases[name, 0], eigenvalues[name]) for name in captured.layers}


def _add(totals: dict[Key, Tensor], key: Key, value: Tensor) -> None:
    totals[key] = totals[key] + value if key in totals else value


def _squares(calls: Pass) -> Tensor:
    """``sum_i G_i^2`` elementwise, ``[O, I]``."""
    (inputs, gradients), *others = calls
    if not others and inputs.shape[1] == 1:
        return gradients[:, 0].square().T @ inputs[:, 0].square()
    at_once = max(1, GRADIENTS_IN_MEMORY // (8 * inputs.shape[2] * gradients.shape[2]))
    total = torch.zeros(gradients.shape[2], inputs.shape[2], dtype=torch.float64, device=inputs.device)
    for start in range(0, len(inputs), at_once):
        part = slice(start, start + at_once)
        total += torch.stack([g[part].mT @ a[part] for a, g in calls]).sum(dim=0).square().sum(dim=0)
    return total


def squares_one_by_one(snapshot: Snapshot, weights: np.ndarray, names: Sequence[str]) -> Vectors:
    """``sum_i p_i (grad l_i)^2`` of some parameters, elementwise, float64. Cost: a backward pass per sample."""
    values = [snapshot.trained[name] for name in names]
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in zip(names, values, strict=True)}
    if not names:
        return total
    for indices, losses in snapshot.batches():
        for weight, loss in zip(weights[indices].tolist(), losses, strict=True):
            found = grad_or_zeros(loss, values, retain_graph=True)
            for name, part in zip(names, found, strict=True):
                total[name] += weight * part.double().square()
    return total
