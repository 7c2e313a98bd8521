"""Watch a training loop and write its record."""

from dit_mlflow.recording.loop import train
from dit_mlflow.recording.recorder import TrajectoryRecorder

__all__ = ["TrajectoryRecorder", "train"]
