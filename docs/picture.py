"""Draw the figure of the README: ``python docs/picture.py``. The main job logs the same plot on its run."""

from pathlib import Path
from tempfile import TemporaryDirectory

from dit_mlflow import load_workload, parse_windows, track, train
from dit_mlflow.explanation import Gallery
from dit_mlflow.plots import plot_top_samples

workload = load_workload("projects/mnist")
with TemporaryDirectory() as folder:
    trajectory = train(workload, Path(folder) / "trajectory")
    influence = track(trajectory, workload, parse_windows("5", trajectory))
figure = plot_top_samples(influence, Gallery(workload))
figure.savefig(Path(__file__).with_name("influence_over_windows.png"), dpi=110)
