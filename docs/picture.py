"""Draw the figure of the README: ``python docs/picture.py`` (a minute). The main job logs the same plot on its run."""

from pathlib import Path
from tempfile import TemporaryDirectory

from dit_mlflow import Checks, explain, load_workload, train

workload = load_workload("projects/mnist")
with TemporaryDirectory() as folder:
    trajectory = train(workload, Path(folder) / "trajectory")
    answer = explain(trajectory, workload, windows="5", checks=Checks(ground_truth=None))
answer.plot().savefig(Path(__file__).with_name("influence_over_windows.png"), dpi=110)
print(answer)
