"""The undocumented names of accelerate that ``dit_mlflow`` uses, all in this file.

Seen in accelerate 1.10.0 and 1.15.0. If one goes, ``tests/test_accelerate_internals.py`` fails, and training
is refused before a parameter changes, since the recorder gets a wrapper instead of what it wraps.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def torch_loader(loader: Any) -> Any:
    """The torch loader inside a loader of accelerate's (``base_dataloader``)."""
    return getattr(loader, "base_dataloader", loader)


def torch_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps and takes hooks, inside accelerate's wrappers (``optimizer``)."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
