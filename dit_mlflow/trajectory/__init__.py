"""The record of a training: its format, and reading it without a replay."""

from dit_mlflow.trajectory.record import Record
from dit_mlflow.trajectory.state import REPLAY_TOLERANCE, State
from dit_mlflow.trajectory.step_record import Hyperparameters, StepRecord

__all__ = ["REPLAY_TOLERANCE", "Hyperparameters", "Record", "State", "StepRecord"]
