"""A function of tensors as the graph of all operations that it runs, those of its backward passes among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dit_mlflow.torch_internals import make_fx, reading_values

Function = Callable[..., list[Tensor]]


def traced(function: Function, inputs: Sequence[Tensor], roots: bool = False, functional: bool = True) -> Function:
    """``function``, of tensors as ``inputs`` are, such that autograd follows every operation that it ran.

    A backward pass inside ``function`` is part of the graph as it ran: through ``detach``, hooks and autograd functions
    whose backward is not the derivative of their forward, the derivative of the result is that of its values.
    Random draws are made anew by each call. Python does not run again: branches are those taken here, and numbers that
    are no tensors, or were read out of one (``.item()``), stay as they are.

    Args:
        function: of the inputs, to a list of tensors.
        inputs: to run it with.
        functional: take the work in place out, which autograd often refuses. Random masks of tensors that are not
            contiguous are then drawn in another order.
        roots: give square roots the derivative 0 at 0, where it is infinite: an optimizer divides by them.

    Cost: the function, two to four times, and 0.1 to 0.3 ms an operation.
    """

    def with_values(*values: Tensor) -> list[Tensor]:
        with reading_values():
            return function(*values)

    recorded = make_fx(with_values)(*inputs)
    # What works in place cannot be differentiated where values before it are still needed.
    graph = make_fx(torch.func.functionalize(recorded, remove="mutations"))(*inputs) if functional else recorded
    for node in list(graph.graph.nodes):
        _below_autograd(node)
        if roots and node.target is torch.ops.aten.sqrt.default:
            node.target = _root
        if roots and node.target is torch.ops.aten.pow.Tensor_Scalar and node.args[1] == 0.5:
            node.target, node.args = _root, node.args[:1]
    graph.recompile()
    return graph


def _below_autograd(node: fx.Node) -> None:
    """Take out of an operation what only tells autograd not to follow."""
    aten = torch.ops.aten
    if node.target in _PASSED_THROUGH:
        node.replace_all_uses_with(_tensor_argument(node, 0))
        node.graph.erase_node(node)
    elif node.target is aten.copy.default and _same(node, _tensor_argument(node, 1)):
        node.replace_all_uses_with(_tensor_argument(node, 1))
        node.graph.erase_node(node)
    elif node.target is aten.embedding.default:
        # Its values do not depend on these: they tell its backward pass to leave a row out, or to scale it.
        node.args = node.args[:2]
        node.kwargs = {}


def _root(value: Tensor) -> Tensor:
    zero = value == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, value).sqrt())


def _same(node: fx.Node, source: fx.Node) -> bool:
    """Whether a copy has dtype and shape of its source."""
    one, other = node.meta.get("val"), source.meta.get("val")
    return (
        isinstance(one, Tensor) and isinstance(other, Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
    )


def _tensor_argument(node: fx.Node, place: int) -> Any:
    return node.args[place]


_PASSED_THROUGH = (torch.ops.aten.detach.default, torch.ops.aten.detach_copy.default, torch.ops.aten.alias.default)
