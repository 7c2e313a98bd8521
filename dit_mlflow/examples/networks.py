"""The paper's small networks, for any number of inputs and classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import nn

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
