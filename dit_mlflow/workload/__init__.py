"""What is trained: model, data, and loss per sample; how it is found and how its samples look."""

from dit_mlflow.workload.batches import Batch, floating_one, to_like
from dit_mlflow.workload.consent import comes_with_package, load_recorded
from dit_mlflow.workload.projects import WorkloadReference, load_workload
from dit_mlflow.workload.workload import Optimizers, Plan, Workload

__all__ = [
    "Batch",
    "Optimizers",
    "Plan",
    "Workload",
    "WorkloadReference",
    "comes_with_package",
    "floating_one",
    "load_recorded",
    "load_workload",
    "to_like",
]
