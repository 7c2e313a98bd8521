"""How much faster exact leave-one-out is with two worker processes than with one: ``python benchmarks/workers.py``.

One thread in every process. One worker is this process, as without ``jobs``. Clock seconds, medians, taken in turns;
the first round, in which workers are started and libraries loaded, stands by itself. Loky keeps its workers for the
next call; dask and ray start a cluster of their own for each, unless there is one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dit_mlflow import Effort, leave_one_out, load_workload, parse_windows, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--n-train", type=int, default=1024)
    parser.add_argument("--backends", nargs="+", default=["loky", "dask", "ray"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload = load_workload("projects/mnist", n_train=options.n_train, n_test=64)
    efforts = {"1 worker": Effort()} | {
        f"2 workers, {backend}": Effort(jobs=2, backend=backend) for backend in options.backends
    }
    seconds: dict[str, list[float]] = {name: [] for name in efforts}
    scores: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory")
        windows = parse_windows("1", trajectory)
        for _ in range(options.repetitions + 1):
            for name, effort in efforts.items():
                begun = time.perf_counter()
                scores[name] = leave_one_out(trajectory, workload, windows, effort=effort).scores
                seconds[name].append(time.perf_counter() - begun)
    one = scores["1 worker"]
    rows = {
        name: {
            "first": taken[0],
            "seconds": statistics.median(taken[1:]),
            "times faster": statistics.median(seconds["1 worker"][1:]) / statistics.median(taken[1:]),
            "largest difference": float(np.abs(scores[name] - one).max() / np.abs(one).max()),
        }
        for name, taken in seconds.items()
    }
    print(f"{options.n_train} samples, {trajectory.num_steps} steps of 784-8-1, float64\n")
    print(pd.DataFrame(rows).T.to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
