"""Ground truth: train again as recorded, without a sample or a group of samples, or on a subset of them."""

from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.groups import Groups, leave_groups_out
from dit_mlflow.retraining.leave_one_out import confirm, leave_one_out
from dit_mlflow.retraining.subsets import Subsets, train_on_subsets

__all__ = ["Effort", "Groups", "Subsets", "confirm", "leave_groups_out", "leave_one_out", "train_on_subsets"]
