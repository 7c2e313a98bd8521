"""What of torch is used without being documented still does what it is used for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Dirichlet, Gamma
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from dit_mlflow import torch_internals


def test_the_version_counts_changes_in_place_and_nothing_else() -> None:
    value = torch.zeros(2)
    before = torch_internals.version(value)
    assert torch_internals.version(value.add(1)) == torch_internals.version(value) == before
    value.add_(1)
    assert torch_internals.version(value) == before + 1


class Ours(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value


@pytest.mark.parametrize("kind", [Ours, nn.Identity])
def test_what_was_compiled_is_found(kind: type[nn.Module]) -> None:
    module = kind()
    compiled: Any = torch.compile(module, backend="eager")
    assert dict(compiled.named_children()) == {torch_internals.COMPILED_MODULE: module}
    assert torch_internals.uncompiled(torch.compile(module.forward, backend="eager")) == module.forward
    assert torch_internals.uncompiled(module.forward) is None


def test_a_trace_holds_the_backward_pass_and_values_that_are_read() -> None:
    def function(value: Tensor) -> list[Tensor]:
        leaf = value.clone().requires_grad_()
        with torch_internals.reading_values():
            factor = leaf.sum().item()
        return list(torch.autograd.grad((factor * leaf.detach() * leaf).sum(), [leaf]))

    graph = torch_internals.make_fx(function)(torch.tensor([1.0, 2.0]))
    # The derivative of value * 3, where value came in by the detached one; 3 is a number by now.
    torch.testing.assert_close(graph(torch.tensor([5.0, 7.0])), [torch.tensor([15.0, 21.0])])


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_low_precision_is_widened_also_in_a_trace(narrow: torch.dtype) -> None:
    value, met = torch.tensor([1.0, 1 / 3], dtype=torch.float64), list[torch.dtype]()

    def function(given: Tensor) -> list[Tensor]:
        with torch_internals.widening(torch.float64, met.append):
            return [given.to(narrow).mul_(3) + torch.ones(2, dtype=narrow)]

    expected = [3 * value + 1]
    torch.testing.assert_close(function(value), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch_internals.make_fx(function)(value)(value), expected, rtol=0, atol=0)
    assert set(met) == {narrow}
    assert function(value)[0].dtype == torch.float64


def test_what_operations_make_is_told_and_views_are_not() -> None:
    told = list[int]()
    value = torch.ones(3, 2, requires_grad=True)
    with torch_internals.making(told.append):
        view = value.T[:1]
        assert told == []
        (view * 2).max(dim=1).values.sum().backward()
    # 2 x 3, the largest with its place, their sum; the rest is made by the backward pass.
    assert told[:4] == [12, 4, 8, 4]
    assert len(told) > 4


def test_a_trace_without_values_refuses_what_reads_one() -> None:
    values, elsewhere = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    graph = torch_internals.make_fx(lambda value: [value * elsewhere], values=False)(values)
    torch.testing.assert_close(graph(torch.tensor([5.0, 7.0])), [torch.tensor([15.0, 21.0])])
    for read in (
        lambda value: [value * (2 if value.sum().item() > 0 else 3)],
        lambda value: [value * float(value.numpy()[0])],
    ):
        with pytest.raises((RuntimeError, NotImplementedError, AttributeError)):
            torch_internals.make_fx(read, values=False)(values)


def test_a_module_computes_with_what_is_in_its_slots() -> None:
    module = nn.BatchNorm1d(2).eval()
    weight, mean = torch.full((2,), 3.0), torch.full((2,), 5.0)
    torch_internals.tensor_slots(module, "parameters")["weight"] = weight
    torch_internals.tensor_slots(module, "buffers")["running_mean"] = mean
    assert (module.weight is weight, module.running_mean is mean) == (True, True)
    torch.testing.assert_close(module(torch.zeros(1, 2)), torch.full((1, 2), -15.0), rtol=1e-4, atol=0)


def test_hooks_before_a_forward_pass_are_listed() -> None:
    module = nn.Linear(2, 2)

    def hook(module: nn.Module, args: Any) -> None:
        pass

    module.register_forward_pre_hook(hook)
    assert list(torch_internals.forward_pre_hooks(module)) == [hook]


def test_hooks_of_gradients_are_seen() -> None:
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        parameter = nn.Parameter(torch.ones(2))
        assert not torch_internals.has_gradient_hook(parameter)
        getattr(parameter, name)(lambda gradient: None)
        assert torch_internals.has_gradient_hook(parameter)


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.add(func)
        return func(*args, **(kwargs or {}))


def test_kernels_are_those_that_the_public_functions_call() -> None:
    with Called() as called:
        weight_norm(nn.Linear(2, 2)).weight.sum()
        Gamma(torch.ones(2), torch.ones(2)).sample()
        Dirichlet(torch.ones(2)).sample()
    assert called.functions >= {torch_internals.weight_norm_kernel(), *torch_internals.sampling_kernels()}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_with_the_sampler_that_it_was_given(workers: int) -> None:
    loader = DataLoader(np.arange(3), batch_size=3, num_workers=workers, persistent_workers=workers > 0)  # type: ignore[arg-type, var-annotated]
    assert [batch.tolist() for batch in loader] == [[0, 1, 2]]
    torch_internals.set_sampler(loader, "batch_sampler", [[2, 0], [1]])
    assert [batch.tolist() for batch in loader] == [[2, 0], [1]]


@pytest.mark.parametrize("gradient", [1.0, float("inf")])
def test_a_scaler_tells_a_fused_optimizer_of_infinite_gradients(gradient: float) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler, found = SGD([parameter], fused=True), torch.amp.GradScaler("cpu"), []
    optimizer.register_step_pre_hook(lambda *args: found.append(torch_internals.found_infinite(optimizer)))
    scaler.scale((gradient * parameter).sum()).backward()
    scaler.step(optimizer)
    assert found == [gradient == float("inf")]
    assert not torch_internals.found_infinite(SGD([parameter]))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return 2 * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 2 * gradient


def test_a_function_that_is_differentiated_once_leaves_the_refusing_node() -> None:
    value = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(Once.apply(value).square().sum(), value, create_graph=True)
    assert gradient.grad_fn.name() == torch_internals.REFUSING_NODE


def without_second_derivative(value: Tensor) -> Tensor:
    return nn.functional.ctc_loss(
        value.log_softmax(-1), torch.ones(1, 1, dtype=torch.long), torch.tensor([4]), torch.tensor([1])
    )


@pytest.mark.parametrize("function", [Once.apply, without_second_derivative])
def test_missing_second_derivatives_are_told_in_the_known_words(function: Any) -> None:
    value = torch.rand(4, 1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(value).square().sum(), value, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)) as raised:
        gradient.sum().backward()
    assert any(words in str(raised.value) for words in torch_internals.MISSING_DERIVATIVE)
