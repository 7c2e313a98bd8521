"""How right an estimate is about the samples that it ranks first; by default on projects/mnist.

``python benchmarks/standing_out.py`` prints a table for each model, against exact leave-one-out over the whole run: for
rankings by the estimate of the whole run, by the mean of estimates over windows, and by the whole run's with exact
scores of those that stand out, as influence runs rank them.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from dit_mlflow import leave_one_out, load_workload, parse_windows, track, train
from dit_mlflow.explanation.ranking import best_known, extreme_samples
from dit_mlflow.explanation.truth import NAMED


def measure(reference: str, settings: dict[str, str], seed: int, windows: str) -> list[dict[str, object]]:
    """A row for each ranking and side: the exact first among its own, and whether the sign of its first is right."""
    workload = load_workload(reference, **settings)
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        whole = parse_windows("1", trajectory)
        estimate = track(trajectory, workload, whole)
        parts = track(trajectory, workload, parse_windows(windows, trajectory))
        exact = leave_one_out(trajectory, workload, whole)
    checked = [sample for side in extreme_samples(estimate, NAMED) for sample in side]
    known = np.full_like(exact.scores, np.nan)
    known[..., checked] = exact.scores[..., checked]
    rankings = {
        "whole run": estimate.of(0),
        "mean of windows": parts.scores[:, 0].mean(axis=0),
        "standing out exact": best_known(estimate, replace(exact, scores=known)).of(0),
    }
    truth = exact.of(0)
    return [
        {
            "ranking": name,
            "side": side,
            "seed": seed,
            "first": len(set(np.argsort(sign * scores)[-NAMED:]) & set(np.argsort(sign * truth)[-NAMED:])),
            "right": bool(sign * truth[np.argmax(sign * scores)] > 0),
        }
        for name, scores in rankings.items()
        for side, sign in (("harmful", -1), ("helpful", 1))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="projects/mnist")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the workload")
    parser.add_argument("--models", nargs="+", default=["logreg", "dnn"])
    parser.add_argument("--windows", default="5")
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    given = dict(option.split("=", 1) for option in options.set)
    for model in options.models:
        rows = [
            row
            for seed in range(options.seeds)
            for row in measure(options.workload, {"model": model, **given}, seed, options.windows)
        ]
        grouped = pd.DataFrame(rows).groupby(["side", "ranking"], sort=False)
        table = pd.DataFrame(
            {
                f"of the exact first {NAMED}, mean": grouped["first"].mean(),
                "each seed": grouped["first"].agg(lambda found: " ".join(map(str, found))),
                "first has the right sign": grouped["right"].sum().astype(str) + f" of {options.seeds}",
            }
        )
        print(f"\n{model}\n{table.to_string(float_format='%.2f')}")


if __name__ == "__main__":
    main()
