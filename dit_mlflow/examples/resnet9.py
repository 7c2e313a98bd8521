"""A small residual network with BatchNorm for 32 x 32 images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from dit_mlflow.errors import WorkloadError

SHAPE = (3, 32, 32)


class Residual(nn.Module):
    """Two convolutions around which the input passes: ``x + f(x)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.body(inputs)


def resnet9(classes: int = 10, width: int = 64) -> Callable[[], nn.Module]:
    """Makes networks ``[B, 3072] -> [B, classes]`` (``[B]`` for two classes): eight convolutions and a linear layer.

    Each convolution is followed by BatchNorm and has no bias of its own. With ``width`` 64 it has 6.6 million
    parameters; they grow with its square.

    Raises:
        WorkloadError: no width.
    """
    if width < 1:
        raise WorkloadError(f"width is {width}; expected 1 or more")
    return partial(_resnet9, 1 if classes == 2 else classes, width)


def _resnet9(outputs: int, width: int) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Unflatten(1, SHAPE),
        _convolution(3, width),
        *(_convolution(width, 2 * width), nn.MaxPool2d(2), Residual(2 * width)),
        *(_convolution(2 * width, 4 * width), nn.MaxPool2d(2)),
        *(_convolution(4 * width, 8 * width), nn.MaxPool2d(2), Residual(8 * width)),
        *(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(8 * width, outputs)),
    ]
    if outputs == 1:
        layers.append(nn.Flatten(0))
    return nn.Sequential(*layers)


def _convolution(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
