"""What is trained: model, data, and loss per sample; how it is found and how its samples look."""

from dit_mlflow.workload.consent import comes_with_package, load_recorded
from dit_mlflow.workload.projects import WorkloadReference, load_workload
from dit_mlflow.workload.workload import Batch, Plan, Workload, to_like

__all__ = [
    "Batch",
    "Plan",
    "Workload",
    "WorkloadReference",
    "comes_with_package",
    "load_recorded",
    "load_workload",
    "to_like",
]
