"""Which scores foretell what leaving out many samples does?

``python benchmarks/removal.py`` trains projects/mnist for each seed, retrains it without random shares of the samples,
and holds the summed scores of methods against the real changes, for the whole run and for ``local`` windows: LDS (the
Spearman correlation over the retrainings), and the slope of real on foretold changes. ``removal`` has a bank of its
own; all methods are judged by other retrainings. Cost is CPU time, in trainings.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd
from scipy import stats

from dit_mlflow import Influence, Window, load_workload, parse_windows, train
from dit_mlflow.evaluation import datamodeling_score
from dit_mlflow.evaluation.figures import LDS
from dit_mlflow.methods import Method, method
from dit_mlflow.methods.dit import Expected
from dit_mlflow.methods.removal import Removal
from dit_mlflow.retraining import train_on_subsets

METHODS: dict[str, Method] = {
    "dit": method("dit"),
    "expected, 4 draws": Expected(draws=4),
    "leave_one_out": method("leave_one_out"),
    "tracin": method("tracin"),
}
JUDGES = 7
"""Added to the seed of the retrainings that judge, so that they are none of those that a blend was fitted to."""


def measure(
    reference: str, settings: dict[str, str], seed: int, count: str, shares: list[float], subsets: int
) -> list[dict[str, object]]:
    """A row for each share, method and window."""
    workload = load_workload(reference, **settings)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        # Timed when all that is loaded on first use is there.
        train(workload, Path(folder) / "first", init_seed=seed, order_seed=seed)
        begun = time.process_time()
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        training = time.process_time() - begun

        def scored(of: Method, windows: list[Window]) -> tuple[Influence, float]:
            begun = time.process_time()
            return of(trajectory, workload, windows), (time.process_time() - begun) / training

        for windows in (parse_windows("1", trajectory), parse_windows(count, trajectory)):
            known = {name: scored(of, windows) for name, of in METHODS.items()}
            for share in shares:
                removal = Removal(removed=share, seed=seed)
                exact, cost_of_exact = known["leave_one_out"]
                informed, cost = scored(removal.informed_by(exact), windows)
                found = {
                    **known,
                    "removal": scored(removal, windows),
                    "removal, leave-one-out known": (informed, cost + cost_of_exact),
                }
                judges = train_on_subsets(
                    trajectory, workload, windows, subsets=subsets, share=1 - share, seed=seed + JUDGES
                )
                for name, (scores, cost) in found.items():
                    for place, window in enumerate(windows):
                        own = scores.of(place)
                        lds = datamodeling_score(own, judges, window).values.get(LDS.leaf)
                        slope = stats.linregress(~judges.kept @ own, judges.changes[place, 0]).slope
                        of = "whole run" if len(windows) == 1 else "windows"
                        rows.append(
                            {
                                "of": of,
                                "removed": share,
                                "method": name,
                                "seed": seed,
                                "window": str(window),
                                "lds": lds,
                                "slope": slope,
                                "trainings": cost,
                            }
                        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="projects/mnist")
    parser.add_argument(
        "--set", nargs="+", default=["model=dnn"], metavar="NAME=VALUE", help="settings of the workload"
    )
    parser.add_argument("--windows", default="5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.02, 0.1, 0.5], help="shares that are left out")
    parser.add_argument("--subsets", type=int, default=100, help="retrainings that judge")
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
        table.groupby(["of", "removed", "method"], sort=False)
        .agg(median=("lds", "median"), worst=("lds", "min"), slope=("slope", "median"), trainings=("trainings", "mean"))
        .to_string(float_format="%.2f")
    )


if __name__ == "__main__":
    main()
