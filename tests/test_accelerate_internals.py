"""What of accelerate is used without being documented still does what it is used for."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim import SGD
from torch.utils.data import DataLoader
from workloads import digits_model, digits_workload, sample_losses

from dit_mlflow import Trajectory, TrajectoryRecorder, accelerate_internals


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


def test_a_recorder_looks_through_the_wrapper_of_an_optimizer(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = Accelerator(cpu=True).prepare(SGD(model.parameters(), lr=0.1))
    workload = digits_workload()
    with TrajectoryRecorder(model, optimizer, tmp_path / "t", workload) as recorder:
        for batch in recorder.watch(DataLoader(workload.train_set, batch_size=8)):
            optimizer.zero_grad()
            sample_losses(model, batch).mean().backward()
            optimizer.step()
    trajectory = Trajectory.open(tmp_path / "t")
    assert trajectory.num_steps == 3
    assert trajectory.manifest.optimizer.name == "SGD"
    assert trajectory.verify(workload).max_drift == 0
