"""The paper's small networks, and a residual one for 32 x 32 images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from dit_mlflow.errors import WorkloadError

NetworkName = Literal["logreg", "dnn", "cnn"]


def network(name: NetworkName, shape: Sequence[int], classes: int = 2, hidden: int = 8) -> Callable[[], nn.Module]:
    """Makes networks ``[B, product of shape] -> [B]``, logits of class 1, for two classes; ``[B, classes]`` for more.

    Args:
        name: ``logreg`` one linear layer; ``dnn`` one hidden layer with ReLU; ``cnn`` 3x3 convolutions of 32 and 64
            channels, each with ReLU and 2x2 max pooling, then a linear layer.
        shape: ``[features]``, or ``[channels, height, width]`` of images, which come flattened.
        classes: 2 or more.
        hidden: width of the ``dnn``'s hidden layer.

    Raises:
        WorkloadError: a hidden layer of no width.
    """
    if hidden < 1:
        raise WorkloadError(f"hidden is {hidden}; expected 1 or more")
    return partial(_network, name, tuple(shape), 1 if classes == 2 else classes, hidden)


def _network(name: NetworkName, shape: Sequence[int], outputs: int, hidden: int) -> nn.Module:
    features = math.prod(shape)
    if name == "logreg":
        layers: list[nn.Module] = [nn.Linear(features, outputs)]
    elif name == "dnn":
        layers = [nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    else:
        channels, height, width = shape
        layers = [
            nn.Unflatten(1, (channels, height, width)),
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), outputs),
        ]
    if outputs == 1:
        layers.append(nn.Flatten(0))
    return nn.Sequential(*layers)


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
