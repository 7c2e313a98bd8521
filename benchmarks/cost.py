"""Cost of recording, influence and ground truth on projects/mnist, as multiples of plain training.

``python benchmarks/cost.py`` prints a table. Figures are CPU seconds of this process (all threads), medians of several
repetitions that take turns, divided by the plain loop's. The plain loop is PyTorch's own, on batches drawn beforehand.
Influence and leave-one-out start from a recorded trajectory on disk: reading and replay are included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import pandas as pd
import torch
from measure import Work, cpu_seconds, medians, plain_training

from dit_mlflow import leave_one_out, load_workload, parse_windows, track, train


def measure(model: str, repetitions: int, ground_truth: bool) -> dict[str, float]:
    """Median CPU seconds of each kind of work."""
    workload = load_workload("projects/mnist", model=model)
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "t")
        one, five, many = (parse_windows(text, trajectory) for text in ("1", "5", "epochs"))
        work: dict[str, Work] = {
            "plain training": plain_training(workload, trajectory),
            "replay": lambda: sum(1 for _ in trajectory.states(workload, 0, trajectory.num_steps)),
            "1 window": lambda: track(trajectory, workload, one),
            "5 local windows": lambda: track(trajectory, workload, five),
            "21 local windows": lambda: track(trajectory, workload, many),
            "21 final windows": lambda: track(trajectory, workload, many, "final"),
            "21 cumulative windows": lambda: track(trajectory, workload, many, "cumulative"),
            "1 window, float64": lambda: track(trajectory, workload, one, dtype=torch.float64),
        }
        if ground_truth:
            work["256 leave-one-out"] = lambda: leave_one_out(trajectory, workload, one)
        seconds = medians(work, repetitions)
        recorded = []
        for repetition in range(repetitions):
            target = Path(folder) / f"recorded-{repetition}"
            recorded.append(cpu_seconds(lambda target=target: train(workload, target)))  # type: ignore[misc]
    return {
        **seconds,
        "train() with loader and record": statistics.median(recorded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["logreg", "dnn", "cnn"])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    columns = {name: measure(name, options.repetitions, ground_truth=name != "cnn") for name in options.models}
    seconds = pd.DataFrame(columns)
    print("plain training, CPU seconds:", seconds.loc["plain training"].round(3).to_dict())
    print((seconds / seconds.loc["plain training"]).drop("plain training").to_string(float_format="%.1f", na_rep="-"))


if __name__ == "__main__":
    main()
