"""Derivatives of scalars with respect to a training state, as flat vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.torch_internals import GRAPH_IS_GONE


@dataclass(frozen=True, eq=False)
class Flat:
    """The layout of named tensors that are joined to one vector of :attr:`size` elements.

    An elementwise operation on the vector is one call, however many tensors there are.

    Attributes:
        shapes: shape by name, in order.
    """

    shapes: Mapping[str, torch.Size]

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The elements of each tensor in the vector, by name."""
        ends = accumulate(self.lengths)
        return {name: slice(end - n, end) for name, n, end in zip(self.shapes, self.lengths, ends, strict=True)}

    @property
    def size(self) -> int:
        return sum(self.lengths)

    @cached_property
    def lengths(self) -> list[int]:
        return [shape.numel() for shape in self.shapes.values()]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join ``[*shape]`` each, in order, to ``[size]``."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def join_rows(self, tensors: Sequence[Tensor], rows: int) -> Tensor:
        """Join ``[rows, *shape]`` each, in order, to ``[rows, size]``."""
        return torch.cat([tensor.reshape(rows, -1) for tensor in tensors], dim=1)

    def split_rows(self, flat: Tensor) -> list[Tensor]:
        """Split ``[rows, size]`` into views ``[rows, *shape]``, in order."""
        parts = flat.split(self.lengths, dim=1)
        return [part.view(len(flat), *shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]


@dataclass(eq=False)
class Adjoint:
    """``lambda``: derivatives of ``A`` scalars with respect to ``s_t``.

    Attributes:
        parameters: ``[A, N]``, with respect to the parameters that the step follows.
        buffers: ``[A, M]``, with respect to the buffers that the step follows.
        optimizer: ``[A, size]`` by key of the optimizer's state, as the step names the keys; an absent key means 0.
    """

    parameters: Tensor
    buffers: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.parameters)

    def append(self, other: Adjoint) -> Adjoint:
        """The rows of both adjoints, those of ``self`` first."""
        both = (self, other)
        sizes = {key: value.shape[1] for adjoint in both for key, value in adjoint.optimizer.items()}

        def stacked(key: str, size: int) -> Tensor:
            return torch.cat([a.optimizer.get(key, a.parameters.new_zeros((a.rows, size))) for a in both])

        return Adjoint(
            torch.cat([self.parameters, other.parameters]),
            torch.cat([self.buffers, other.buffers]),
            {key: stacked(key, size) for key, size in sizes.items()},
        )

    def keep(self, rows: list[int]) -> Adjoint:
        """Only the given rows."""
        optimizer = {key: value[rows] for key, value in self.optimizer.items()}
        return Adjoint(self.parameters[rows], self.buffers[rows], optimizer)


def grad_or_zeros(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros for inputs that no output depends on.

    Not by ``materialize_grads``, whose zeros require a gradient in torch 2.6.

    Raises:
        UnsupportedError: the loss or the query takes derivatives of its own, and keeps no graph of them.
    """
    try:
        found = torch.autograd.grad(outputs, inputs, cotangents, retain_graph, allow_unused=True)
    except RuntimeError as error:
        if GRAPH_IS_GONE in str(error):
            raise UnsupportedError(
                "a loss or a query takes derivatives of its own (forces, a penalty) and frees their graph, so that it "
                "cannot be differentiated in turn; take them with create_graph=True, in evaluation mode too "
                "(create_graph=self.training does not)"
            ) from error
        raise
    return [torch.zeros_like(value) if part is None else part for value, part in zip(inputs, found, strict=True)]


def vector_jacobian(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], rows: int, batched: bool
) -> list[Tensor]:
    """``cotangents^T d outputs / d inputs``, ``[A, *input shape]`` each, for ``A = rows`` cotangents ``[A, *shape]``.

    The result is 0 for inputs that no output depends on, and constant outputs add 0.
    Cost: ``A`` backward passes, in one vectorised pass if ``batched``.
    """
    moving = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    if not moving:
        return [value.new_zeros((rows, *value.shape)) for value in inputs]
    outputs, cotangents = zip(*moving, strict=True)
    if rows > 1 and batched:
        # Some operations have a second derivative that does not run under vmap (GroupNorm, in torch 2.13).
        with suppress(RuntimeError):
            found = torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
            return [
                value.new_zeros((rows, *value.shape)) if part is None else part
                for value, part in zip(inputs, found, strict=True)
            ]
    each = [grad_or_zeros(outputs, inputs, [cotangent[row] for cotangent in cotangents], True) for row in range(rows)]
    if rows == 1:
        return [part.unsqueeze(0) for part in each[0]]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]
