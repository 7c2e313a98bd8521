"""Ground truth: train again as recorded, without a sample or on a part of them."""

from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.leave_one_out import confirm, leave_one_out
from dit_mlflow.retraining.subsets import Subsets, train_on_subsets

__all__ = ["Effort", "Subsets", "confirm", "leave_one_out", "train_on_subsets"]
