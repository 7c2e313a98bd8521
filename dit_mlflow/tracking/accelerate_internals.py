"""What of accelerate is used without being documented, each name here and nowhere else in ``dit_mlflow``.

All were seen in accelerate 1.10.0 and 1.15.0. ``tests/tracking/test_accelerate_internals.py`` fails when one goes; in
use, training is then refused before a parameter changes, since the recorder gets a wrapper and not what is in it.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def torch_loader(loader: Any) -> Any:
    """The loader of torch's that one of accelerate's iterates inside (``base_dataloader``)."""
    return getattr(loader, "base_dataloader", loader)


def torch_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps, and that hooks can be set on, in what accelerate has wrapped (``optimizer``)."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
