"""Logs the trained model as a LoggedModel."""

from __future__ import annotations

import warnings
from typing import Any

import mlflow
import torch
from torch import Tensor, nn

from dit_mlflow.told import logger_of
from dit_mlflow.workload import Workload, floating_one, to_like

MODEL_NAME = "model"

logger = logger_of(__name__)


def log_model(model: nn.Module, workload: Workload) -> str | None:
    """Log a trained model in the active run, as an exported graph, which loads without pickle.

    Returns:
        The model's id; ``None`` if it cannot be exported, with a warning: the trajectory holds the weights anyway.

    Cost: one export, some seconds.
    """
    example = _inputs(model, workload)
    if example is None:
        logger.warning("the model is not logged: MLflow exports models that are called with tensors alone")
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logged = mlflow.pytorch.log_model(
                model,
                name=MODEL_NAME,
                input_example=example,
                serialization_format="pt2",
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
            )
    except Exception as error:  # Any kind: export fails in many ways.
        logger.warning("the model is not logged: it cannot be exported (%s: %s)", type(error).__name__, error)
        return None
    return str(logged.model_id)


def _inputs(model: nn.Module, workload: Workload) -> Any:
    """The arguments with which the workload's loss calls the model, for two samples; ``None`` unless only tensors."""
    seen: list[tuple[Any, Any]] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    # Two samples: an export treats a size of 1 as a constant.
    indices = range(min(2, workload.num_samples))
    batch = to_like(workload.collate(workload.train_set, indices), floating_one(model.parameters()).device, None)
    try:
        with torch.no_grad():
            workload.sample_losses(model, batch, len(indices))
    finally:
        hook.remove()
    args, kwargs = seen[0] if seen else ((), {})
    if not args or kwargs or not all(isinstance(value, Tensor) for value in args):
        return None
    arrays = [value.cpu().numpy() for value in args]
    return arrays[0] if len(arrays) == 1 else arrays
