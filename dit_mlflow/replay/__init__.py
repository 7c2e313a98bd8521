"""Rebuild every state of a recorded training, under any weights on its samples."""

from dit_mlflow.replay.trajectory import Trajectory, Verification

__all__ = ["Trajectory", "Verification"]
