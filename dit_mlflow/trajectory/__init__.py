"""Record, store, verify and rebuild training trajectories."""

from dit_mlflow.trajectory.loop import train
from dit_mlflow.trajectory.projects import load_recorded, load_workload
from dit_mlflow.trajectory.recorder import TrajectoryRecorder
from dit_mlflow.trajectory.state import REPLAY_TOLERANCE, State
from dit_mlflow.trajectory.trajectory import Trajectory, Verification
from dit_mlflow.trajectory.workload import Batch, Plan, Workload, to_like

__all__ = [
    "REPLAY_TOLERANCE",
    "Batch",
    "Plan",
    "State",
    "Trajectory",
    "TrajectoryRecorder",
    "Verification",
    "Workload",
    "load_recorded",
    "load_workload",
    "to_like",
    "train",
]
