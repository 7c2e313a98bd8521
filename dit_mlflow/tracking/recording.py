"""Record a training loop straight into an MLflow run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from torch import nn
from torch.optim import Optimizer

from dit_mlflow.tracking.artifacts import log_trajectory
from dit_mlflow.trajectory import TrajectoryRecorder, Workload


@contextmanager
def record_trajectory(
    model: nn.Module,
    optimizer: Optimizer,
    workload: Workload | None = None,
    run_id: str | None = None,
    **options: Any,
) -> Iterator[TrajectoryRecorder]:
    """Record what happens in the ``with`` block as ``trajectory/`` of a run.

    Args:
        model, optimizer, workload: see :class:`dit_mlflow.TrajectoryRecorder`.
        run_id: the run; default: the active one, or a new one.
        options: further arguments of :class:`dit_mlflow.TrajectoryRecorder`.
    """
    run_id = run_id or (mlflow.active_run() or mlflow.start_run()).info.run_id
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "trajectory"
        try:
            with TrajectoryRecorder(model, optimizer, folder, workload, **options) as recorder:
                yield recorder
        finally:
            log_trajectory(folder, run_id)
