"""Narrow linear layers are the layers that they replace, and no others are replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_mlflow.replay import narrow_layers
from dit_mlflow.replay.narrow_layers import NARROW, NarrowLayers


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_two_derivatives_are_those_of_torch(bias: bool) -> None:
    """Of three layers under ``vmap``, with inputs that they share."""
    random = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((7, 5), (3, 4, 5), (3, 4)))

    def slopes() -> list[Tensor]:
        weight, offset = w.clone().requires_grad_(), b.clone().requires_grad_()
        value = torch.func.vmap(lambda of, by: F.linear(x, of, by if bias else None).tanh().square().sum())(
            weight, offset
        )
        (first,) = torch.autograd.grad(value.sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad((first * w.cos()).sum(), weight)
        return [value, first, second]

    expected = slopes()
    with NarrowLayers():
        found = slopes()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "outputs", "replaced"),
    [((7, 5), NARROW - 1, True), ((7, 5), NARROW, False), ((2, 7, 5), 4, False), ((5,), 4, False)],
)
def test_which_layers_are_replaced(
    shape: tuple[int, ...], outputs: int, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    linear = F.linear
    monkeypatch.setattr(narrow_layers.F, "linear", lambda *given: called.append(given) or linear(*given))
    x, w = torch.randn(shape), torch.randn(outputs, 5)
    torch.testing.assert_close(narrow_layers._linear(x, w), linear(x, w))
    assert bool(called) != replaced
