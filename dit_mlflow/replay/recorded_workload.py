"""Whether a workload is the one that was trained, as far as its parts tell without a replay."""

from __future__ import annotations

from torch import nn

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.replay.optimizers import describe_optimizer
from dit_mlflow.trajectory.manifest import Manifest
from dit_mlflow.workload.workload import Workload


def check_recorded(workload: Workload, model: nn.Module, manifest: Manifest) -> None:
    """Hold a workload and a ``model`` that it built against what was recorded.

    Raises:
        TrajectoryError: parameters, buffers, the optimizer or the number of samples are others.
    """
    _check_model(model, manifest)
    _check_optimizer(workload, model, manifest)
    if manifest.num_samples not in (None, workload.num_samples):
        raise TrajectoryError(
            f"the trajectory was recorded on {manifest.num_samples} training samples; the workload's "
            f"train_set has {workload.num_samples}"
        )


def _check_model(model: nn.Module, manifest: Manifest) -> None:
    buffers = dict(model.named_buffers())
    if odd := sorted(buffers.keys() ^ manifest.model.buffers.keys()):
        raise TrajectoryError(
            f"the workload's model ({type(model).__name__}) is not the recorded one ({manifest.model.name}): "
            f"buffer {odd[0]!r} is in {'the workload' if odd[0] in buffers else 'the record'} only"
        )
    recorded = {name: layout.shape for name, layout in manifest.model.parameters.items()}
    given = {name: tuple(value.shape) for name, value in model.named_parameters()}
    if recorded == given:
        return
    name = next(name for name in [*recorded, *given] if recorded.get(name) != given.get(name))
    raise TrajectoryError(
        f"the workload's model ({type(model).__name__}) is not the recorded one ({manifest.model.name}): "
        f"parameter {name!r} has shape {given.get(name, 'none')}, recorded {recorded.get(name, 'none')}"
    )


def _check_optimizer(workload: Workload, model: nn.Module, manifest: Manifest) -> None:
    if workload.optimizer is None:
        return
    given, recorded = describe_optimizer(workload.optimizer(model), model), manifest.optimizer
    if given.name != recorded.name:
        raise TrajectoryError(
            f"the workload's optimizer is {given.name}; the trajectory was recorded with {recorded.name}"
        )
    if [set(group) for group in given.groups] != [set(group) for group in recorded.groups]:
        raise TrajectoryError(
            f"the workload's optimizer has other parameter groups than the recorded one: "
            f"{[len(group) for group in given.groups]} parameters, recorded {[len(group) for group in recorded.groups]}"
        )
