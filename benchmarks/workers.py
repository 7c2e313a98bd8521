"""How much faster exact leave-one-out is with two worker processes than with one: ``python benchmarks/workers.py``.

One thread in every process. One worker is this process, as without ``jobs``. Clock seconds, medians, taken in turns;
the first round, in which workers load libraries, stands by itself. The cluster stands ready: what dask and ray need to
start one of their own is told apart. Below joblib, ray starts new processes in every call, which load libraries again.
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
    parser.add_argument("--n-train", type=int, default=680)
    parser.add_argument("--backends", nargs="+", default=["loky", "dask", "ray"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload = load_workload("projects/mnist", n_train=options.n_train, n_test=64)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory")
        windows = parse_windows("1", trajectory)
        for backend in options.backends:
            efforts = (Effort(jobs=1), Effort(jobs=2, backend=backend))
            seconds: tuple[list[float], list[float]] = ([], [])
            scores = [np.empty(0), np.empty(0)]
            begun = time.perf_counter()
            with efforts[1].configured():
                start = time.perf_counter() - begun
                for _ in range(options.repetitions + 1):
                    for turn, effort in enumerate(efforts):
                        begun = time.perf_counter()
                        scores[turn] = leave_one_out(trajectory, workload, windows, effort=effort).scores
                        seconds[turn].append(time.perf_counter() - begun)
            one, two = (statistics.median(taken[1:]) for taken in seconds)
            rows[backend] = {
                "start": start,
                "first": seconds[1][0],
                "1 worker": one,
                "2 workers": two,
                "times faster": one / two,
                "largest difference": float(np.abs(scores[1] - scores[0]).max() / np.abs(scores[0]).max()),
            }
    print(f"{options.n_train} samples, {trajectory.num_steps} steps of 784-8-1, float64\n")
    print(pd.DataFrame(rows).T.to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
