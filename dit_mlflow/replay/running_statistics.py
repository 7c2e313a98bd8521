"""Running statistics, made differentiable, and other buffers, which must not carry influence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.dynamics import Buffers, Parameters
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.without_graph import without_graph


def running_statistics(model: nn.Module) -> frozenset[str]:
    """Names of the floating buffers that BatchNorm and InstanceNorm layers of ``model`` keep."""
    return frozenset(
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if isinstance(module, _NORMALISATIONS)
        for key in ("running_mean", "running_var")
        if getattr(module, key) is not None
    )


_NORMALISATIONS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


class DifferentiableStatistics(TorchFunctionMode):
    """Inside it, ``batch_norm`` and ``instance_norm`` can be differentiated in their running statistics.

    PyTorch's kernels have no derivative in them. Here ordinary operations do the normalisation in evaluation, and, in
    place, the update in training:

    ``running = (1 - momentum) * running + momentum * statistic of the layer's input``

    Calls whose running statistics are missing or need no gradient go to PyTorch's kernels.

    Args:
        always: running statistics need a gradient, which they do not say under ``vmap``.
        written_out: do all of the normalisation, and that of ``layer_norm``, by ordinary operations, which have every
            derivative. That of the kernels is wrong from the third on (torch 2.13, without an error), which a penalty
            on gradients needs.
    """

    def __init__(self, always: bool = False, written_out: bool = False) -> None:
        super().__init__()
        self._always = always
        self._written_out = written_out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _BELOW:
            func, args, kwargs = _BELOW[func](*args, **(kwargs or {}))
        if func is F.layer_norm and self._written_out:
            return layer_norm(*args, **(kwargs or {}))
        if func not in (F.batch_norm, F.instance_norm):
            return func(*args, **(kwargs or {}))
        given = inspect.signature(func).bind(*args, **(kwargs or {}))
        given.apply_defaults()
        mean = given.arguments["running_mean"]
        followed = mean is not None and (self._always or mean.requires_grad)
        return _normalised(followed, self._written_out, func, *given.args)


_Call = tuple[Callable[..., Tensor], Sequence[Any], Mapping[str, Any]]


def _layer_norm(input: Tensor, normalized_shape: Any, *rest: Any, cudnn_enable: bool = True, **named: Any) -> _Call:
    return F.layer_norm, (input, normalized_shape, *rest[:3]), named


def _batch_norm(
    input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, *rest: Any, **named: Any
) -> _Call:
    # Training, momentum, eps, and whether cuDNN may be used, or its names.
    own = dict(zip(("training", "momentum", "eps"), rest, strict=False)) | named
    own.pop("cudnn_enabled", None)
    return F.batch_norm, (input, running_mean, running_var, weight, bias), own


_BELOW: Mapping[Any, Callable[..., _Call]] = {torch.layer_norm: _layer_norm, torch.batch_norm: _batch_norm}
"""What ``torch.nn.functional`` calls, as calls of that."""


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.layer_norm` in ordinary operations; of halves, torch's kernel."""
    if input.dtype in _HALVES:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return _scaled(_standardised(input, list(range(-len(normalized_shape), 0)), eps), weight, bias)


def _standardised(input: Tensor, dims: list[int], eps: float) -> Tensor:
    variance, mean = torch.var_mean(input, dim=dims, correction=0, keepdim=True)
    return (input - mean) * torch.rsqrt(variance + eps)


def _scaled(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


_HALVES = (torch.float16, torch.bfloat16)


def _normalised(
    followed: bool,
    written_out: bool,
    norm: Callable[..., Tensor],
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    shape = (1, -1, *(1 for _ in range(input.dim() - 2)))
    by_channel = [part if part is None else part.view(shape) for part in (weight, bias)]
    over = [*([0] if norm is F.batch_norm else []), *range(2, input.dim())]
    if followed:
        assert mean is not None and variance is not None
        if not training:
            return _scaled((input - mean.view(shape)) * torch.rsqrt(variance + eps).view(shape), *by_channel)
        new_variance, new_mean = torch.var_mean(input, dim=over)
        if norm is F.instance_norm:
            new_variance, new_mean = new_variance.mean(dim=0), new_mean.mean(dim=0)
        mean.mul_(1 - momentum).add_(new_mean, alpha=momentum)
        variance.mul_(1 - momentum).add_(new_variance, alpha=momentum)
        mean = variance = None
    if training and mean is None and written_out and input.dtype not in _HALVES:
        return _scaled(_standardised(input, over, eps), *by_channel)
    return norm(input, mean, variance, weight, bias, training, momentum, eps)


class BuffersApart:
    """Finds buffers that a sweep does not follow, although their updates depend on the parameters.

    A running mean of the inputs, a counter or a schedule do not depend on the parameters and are constants for
    influence; a code book or the vectors of spectral norm are not.

    Args:
        followed: names of the buffers that the sweep follows.
        buffers_after: ``(parameters, buffers, record)`` -> the buffers after the step's forward passes.
    """

    def __init__(
        self, followed: Container[str], buffers_after: Callable[[Parameters, Buffers, StepRecord], Buffers]
    ) -> None:
        self._followed = followed
        self._buffers_after = buffers_after
        self._harmless: set[str] = set()

    def check(self, before: State, after: Buffers, record: StepRecord) -> None:
        """Raise :class:`UnsupportedError` if the step changed such a buffer, from ``before`` to ``after``.

        A changed buffer passes if the step's forward passes leave the same values with perturbed parameters.
        Cost: two forward passes, once for each buffer that changes.
        """
        for name, value in before.buffers.items():
            if name in self._followed or name in self._harmless or not value.is_floating_point():
                continue
            if torch.equal(value, after[name]):
                continue
            other = {key: _perturbed(tensor) for key, tensor in before.parameters.items()}
            left, expected = (
                without_graph(partial(self._buffers_after, parameters, before.buffers, record))[name]
                for parameters in (other, before.parameters)
            )
            if not torch.equal(left, expected):
                raise UnsupportedError(
                    f"buffer {name!r} changes in training (step {record.index}) with the model's parameters, so a "
                    "sample has influence through it, but its update cannot be differentiated. A sweep follows the "
                    "running statistics of BatchNorm and InstanceNorm; leave_one_out follows all buffers"
                )
            self._harmless.add(name)


def _perturbed(tensor: Tensor) -> Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
    return tensor + 0.1 * noise
