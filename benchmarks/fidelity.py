"""Agreement of DIT with exact leave-one-out, per model, kind, window and seed; by default on projects/mnist.

``python benchmarks/fidelity.py`` prints a table for each model; ``--help`` lists the settings. Every seed trains
with its own weights and batch order. The truth is float64 retraining without each sample, or a choice.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from dit_mlflow import Checks, explain, load_workload, parse_windows, train
from dit_mlflow.evaluation.figures import JACCARD_30, PEARSON, SPEARMAN
from dit_mlflow.explanation import find_truth
from dit_mlflow.influence import check_kind
from dit_mlflow.methods.dit import Dit

FIGURES = [SPEARMAN, PEARSON, JACCARD_30]


def measure(
    reference: str, settings: dict[str, str], seed: int, windows: str, kinds: list[str], samples: int | None
) -> list[dict[str, object]]:
    """Rows of correlations, one per kind and window, and for the whole run."""
    workload = load_workload(reference, **settings)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        chosen = parse_windows(windows, trajectory)
        for kind in map(check_kind, kinds):
            truth = find_truth(trajectory, workload, chosen, kind, Checks(ground_truth=samples))
            method = Dit(dtype=torch.float64)
            found = explain(trajectory, workload, chosen, kind, method=method, checks=Checks(), truth=truth)
            for window, figures in found.measured.items():
                name = "whole run" if window == found.scores.windows[-1] else str(window)
                values = {figure.leaf: figures.values[figure.name] for figure in FIGURES}
                rows.append({"kind": kind, "window": name, "seed": seed, **values})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="projects/mnist")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the workload")
    parser.add_argument("--models", nargs="+", default=["logreg", "dnn"])
    parser.add_argument("--kinds", nargs="+", default=["local", "final", "cumulative"])
    parser.add_argument("--windows", default="5")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--samples", type=int, default=None, help="random samples with ground truth; default all")
    parser.add_argument("--preset", help="of settings; default: the workload's own")
    options = parser.parse_args()
    given = dict(option.split("=", 1) for option in options.set)
    for model in options.models:
        settings = {"model": model, **({"preset": options.preset} if options.preset else {}), **given}
        started = time.perf_counter()
        rows = [
            row
            for seed in range(options.seeds)
            for row in measure(options.workload, settings, seed, options.windows, options.kinds, options.samples)
        ]
        table = pd.DataFrame(rows)
        print(f"\n{model}, {options.seeds} seeds, {time.perf_counter() - started:.0f} s")
        grouped = table.groupby(["kind", "window"], sort=False)[[figure.leaf for figure in FIGURES]]
        print(grouped.agg(["median", "min"]).to_string(float_format="%.3f"))
        windows = table[table["window"] != "whole run"]
        overall = windows.groupby("kind", sort=False)[SPEARMAN.leaf].agg(["median", "min", "count"])
        print("\nSpearman over windows and seeds:")
        print(overall.to_string(float_format="%.3f"))


if __name__ == "__main__":
    main()
