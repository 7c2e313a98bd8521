"""Running statistics of normalisation layers, updated and used by operations that autograd can follow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


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

    PyTorch's kernels update them, and normalise by them, without a derivative. Here the update in training is

    ``running = (1 - momentum) * running + momentum * statistic of the layer's input``

    in place, by ordinary operations, and so is the normalisation in evaluation. Calls without running statistics, or
    whose running statistics need no gradient, are PyTorch's own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is F.instance_norm:
            return _instance_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is None or running_var is None or not running_mean.requires_grad:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return _normalise(input, running_mean, running_var, weight, bias, eps)
    over = [0, *range(2, input.dim())]
    variance, mean = torch.var_mean(input, dim=over)
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(variance, alpha=momentum)
    return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is None or running_var is None or not running_mean.requires_grad:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        return _normalise(input, running_mean, running_var, weight, bias, eps)
    variance, mean = torch.var_mean(input, dim=list(range(2, input.dim())))
    running_mean.mul_(1 - momentum).add_(mean.mean(dim=0), alpha=momentum)
    running_var.mul_(1 - momentum).add_(variance.mean(dim=0), alpha=momentum)
    return F.instance_norm(input, None, None, weight, bias, True, momentum, eps)


def _normalise(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    shape = (1, -1, *(1 for _ in range(input.dim() - 2)))
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    normalised = (input - mean.view(shape)) * scale.view(shape)
    return normalised if bias is None else normalised + bias.view(shape)
