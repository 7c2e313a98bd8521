"""The record of a training: its format, and what can be read from it without a replay."""

from dit_mlflow.trajectory.record import Record
from dit_mlflow.trajectory.state import REPLAY_TOLERANCE, State

__all__ = [
    "REPLAY_TOLERANCE",
    "Record",
    "State",
]
