"""What of accelerate is used without being documented still does what it is used for."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.optim import SGD
from torch.utils.data import DataLoader

from dit_mlflow import accelerate_internals


def test_what_is_wrapped_is_found() -> None:
    model = torch.nn.Linear(1, 1)
    loader, optimizer = DataLoader(torch.arange(3.0)[:, None]), SGD(model.parameters())
    wrapped = Accelerator(cpu=True).prepare(loader, optimizer)
    found = accelerate_internals.torch_loader(wrapped[0])
    assert type(found) is DataLoader
    assert accelerate_internals.torch_optimizer(wrapped[1]) is optimizer
    # The wrapper iterates it, and no other.
    found.collate_fn = lambda samples: samples[0] + 1
    assert [batch.tolist() for batch in wrapped[0]] == [[1.0], [2.0], [3.0]]
    assert accelerate_internals.torch_loader(loader) is loader
    assert accelerate_internals.torch_optimizer(optimizer) is optimizer
