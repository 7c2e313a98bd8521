"""Trace a function of tensors: a graph of all operations that it runs, including those of its backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from dit_mlflow.torch_internals import make_fx, reading_values

Function = Callable[..., list[Tensor]]

Attempt = Literal["kept", "anew", "as it ran"]

ATTEMPTS: tuple[Attempt, ...] = ("kept", "anew", "as it ran")
"""Which trace to take: one that is kept; a new one; a new one with its work in place, which draws as training did."""

TRACES_KEPT = 256
"""Of steps, and of queries: one for each shape of a batch (and mode of the model) that was met."""


def traced(function: Function, inputs: Sequence[Tensor], roots: bool = False, functional: bool = True) -> Function:
    """``function`` as a graph in which autograd differentiates every operation that it ran.

    The graph contains the operations of a backward pass inside ``function``. So its derivative is that of the values,
    also through ``detach``, hooks and autograd functions whose backward is not the derivative of their forward.
    Each call draws new random numbers. Python code does not run again: branches are those taken here, and numbers that
    are not tensors, or were read out of one (``.item()``), are constants.

    Args:
        function: tensors -> a list of tensors.
        inputs: to trace it with; calls take tensors of the same shapes and dtypes.
        roots: replace square roots by :func:`root`, for an optimizer, which divides by them.
        functional: remove operations in place, which autograd often refuses. Random masks of tensors that are not
            contiguous are then drawn in another order.

    Cost: two to four calls of ``function``, and 0.1 to 0.3 ms per operation.
    """

    def with_values(*values: Tensor) -> list[Tensor]:
        with reading_values():
            return function(*values)

    recorded = make_fx(with_values)(*inputs)
    for node in reversed(recorded.graph.nodes):
        # It raised, and what was done in its place follows (RecordedDtype).
        if node.op == "call_function" and not node.users and "val" not in node.meta:
            recorded.graph.erase_node(node)
        # A tensor made within, of numbers alone, which may be worked on in place.
        if node.op == "get_attr":
            with recorded.graph.inserting_after(node):
                copied = recorded.graph.call_function(torch.ops.aten.lift_fresh_copy.default, (node,))
            node.replace_all_uses_with(copied, lambda user, copied=copied: user is not copied)
    recorded.recompile()
    # What works in place cannot be differentiated where values before it are still needed.
    graph = make_fx(torch.func.functionalize(recorded, remove="mutations"))(*inputs) if functional else recorded
    for node in list(graph.graph.nodes):
        _below_autograd(node)
        if roots and node.target is torch.ops.aten.sqrt.default:
            node.target = root
        if roots and node.target is torch.ops.aten.pow.Tensor_Scalar and node.args[1] == 0.5:
            node.target, node.args = root, node.args[:1]
    graph.recompile()
    return graph


def _below_autograd(node: fx.Node) -> None:
    """Remove operations, and arguments, that only stop or change a gradient."""
    source: Any = None
    if node.target in _PASSED_THROUGH:
        source = node.args[0]
    elif node.target is torch.ops.aten.copy.default:
        # It has no derivative.
        if _alike(node, node.args[1]):
            source = node.args[1]
        elif isinstance(made := node.meta.get("val"), Tensor):
            node.target, node.args, node.kwargs = copied, (node.args[1], made.shape, made.dtype), {}
    elif node.target is torch.ops.aten.slice_scatter.default and _is_complex(node):
        node.target = put
    elif node.target is torch.ops.aten.embedding.default:
        # The values do not depend on the other arguments: these make the backward pass omit or scale a row.
        node.args, node.kwargs = node.args[:2], {}
    if source is not None:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def root(value: Tensor) -> Tensor:
    """The square root, with the derivative 0 at 0, where it is infinite."""
    zero = value == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, value).sqrt())


def copied(value: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """``value`` as it is in a tensor of another shape or dtype."""
    return value.to(dtype).expand(shape)


def put(
    value: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """``torch.slice_scatter``, which has no derivative where values are complex."""
    if step != 1:
        return torch.slice_scatter(value, source, dim, start, end, step)
    first, last, _ = slice(start, end).indices(value.shape[dim])
    return torch.cat([value.narrow(dim, 0, first), source, value.narrow(dim, last, value.shape[dim] - last)], dim)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _alike(node: fx.Node, source: Any) -> bool:
    """Whether a copy has the dtype and shape of its source."""
    one, other = node.meta.get("val"), source.meta.get("val")
    return (
        isinstance(one, Tensor) and isinstance(other, Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
    )


_PASSED_THROUGH = (torch.ops.aten.detach.default, torch.ops.aten.detach_copy.default, torch.ops.aten.alias.default)


class Traces:
    """Traces that are kept, one for each key and shape of the inputs: at most :data:`TRACES_KEPT`."""

    def __init__(self) -> None:
        self._kept: dict[object, Function] = {}

    def of(
        self, key: object, function: Function, inputs: Sequence[Tensor], attempt: Attempt, roots: bool = False
    ) -> Function:
        """A trace of ``function``: the kept one, if there is one and the attempt allows it."""
        key = (key, tuple((value.shape, value.dtype) for value in inputs))
        if attempt != "kept" or key not in self._kept:
            if len(self._kept) >= TRACES_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = traced(function, inputs, roots, functional=attempt != "as it ran")
        return self._kept[key]


def alike(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether they are the same but for rounding; what is 0 in theory is rounding alone."""
    largest = [float(value.abs().max()) if value.numel() else 0.0 for value in others]
    overall = max(largest, default=0.0)

    def near(one: Tensor, other: Tensor, own: float) -> bool:
        eps = torch.finfo(other.dtype).eps
        return bool(((one.detach() - other.detach()).abs() <= max(eps**0.5 * own, 100 * eps * overall)).all())

    return all(map(near, ones, others, largest))


def near(one: Tensor, other: Tensor, way: float, longest: float) -> bool:
    """Whether the ends of a step are the same but for rounding.

    Args:
        way: how far the step moved it.
        longest: the longest way of any tensor; what is 0 in theory moves by rounding alone.
    """
    eps = torch.finfo(other.dtype).eps
    allowed = eps**0.5 * max(way, eps**0.5 * longest) + 8 * eps * float(other.abs().max())
    return bool(((one - other).abs() <= allowed).all())


def followed(value: Tensor) -> Tensor:
    """A copy that is no leaf: what works in place on it is followed."""
    return value.clone().requires_grad_().clone() if value.is_floating_point() else value.clone()
