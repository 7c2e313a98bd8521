"""Which scores predict the effect of leaving out many samples?

``python benchmarks/removal.py`` trains projects/mnist for each seed, retrains it without random parts of the samples,
and holds the summed scores of methods against the real changes: the linear datamodeling score (Spearman over the
parts), for the whole run and for ``local`` windows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd

from dit_mlflow import load_workload, parse_windows, train
from dit_mlflow.evaluation import datamodeling_score
from dit_mlflow.evaluation.figures import LDS
from dit_mlflow.methods import Method, method
from dit_mlflow.methods.dit import Expected
from dit_mlflow.retraining import train_on_subsets

METHODS: dict[str, Method] = {
    "dit": method("dit"),
    "expected, 4 draws": Expected(draws=4),
    "expected, 16 draws": Expected(draws=16),
    "tracin": method("tracin"),
}


def measure(
    reference: str, settings: dict[str, str], seed: int, count: str, removed: float, subsets: int
) -> list[dict[str, object]]:
    """A row for each method and window: LDS, its interval over subsets, and the method's CPU seconds in trainings."""
    workload = load_workload(reference, **settings)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        # Timed when all that is loaded on first use is there.
        train(workload, Path(folder) / "first", init_seed=seed, order_seed=seed)
        begun = time.process_time()
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        training = time.process_time() - begun
        for windows in (parse_windows("1", trajectory), parse_windows(count, trajectory)):
            real = train_on_subsets(trajectory, workload, windows, subsets=subsets, share=1 - removed)
            for name, scored in METHODS.items():
                begun = time.process_time()
                found = scored(trajectory, workload, windows)
                cost = (time.process_time() - begun) / training
                for position, window in enumerate(windows):
                    score = datamodeling_score(found.of(position), real, window).values
                    where = "whole run" if len(windows) == 1 else "windows"
                    figures = {key: score.get(key) for key in (LDS.leaf, f"{LDS.leaf}_low", f"{LDS.leaf}_high")}
                    rows.append(
                        {"of": where, "window": str(window), "method": name, "seed": seed, **figures, "trainings": cost}
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="projects/mnist")
    parser.add_argument(
        "--set", nargs="+", default=["model=dnn"], metavar="NAME=VALUE", help="settings of the workload"
    )
    parser.add_argument("--windows", default="5")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--removed", type=float, default=0.5, help="share of the samples that a part leaves out")
    parser.add_argument("--subsets", type=int, default=100)
    options = parser.parse_args()
    settings = dict(option.split("=", 1) for option in options.set)
    rows = [
        row
        for seed in range(options.seeds)
        for row in measure(options.workload, settings, seed, options.windows, options.removed, options.subsets)
    ]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.3f"))
    print()
    print(
        table.groupby(["of", "method"], sort=False)[[LDS.leaf, "trainings"]]
        .agg(["median", "min"])
        .to_string(float_format="%.2f")
    )


if __name__ == "__main__":
    main()
