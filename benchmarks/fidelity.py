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

from dit_mlflow import leave_one_out, load_workload, parse_windows, track, train
from dit_mlflow.evaluation import correlations
from dit_mlflow.evaluation.figures import JACCARD_30, PEARSON, SPEARMAN


def measure(
    reference: str, settings: dict[str, str], seed: int, windows: str, kinds: list[str], samples: int | None
) -> list[dict[str, object]]:
    """Rows of correlations, one per kind and window, and for the whole run."""
    workload = load_workload(reference, **settings)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        whole = parse_windows("1", trajectory)
        chosen = [*parse_windows(windows, trajectory), *whole]
        for kind in kinds:
            estimate = track(trajectory, workload, chosen, kind, dtype=torch.float64)  # type: ignore[arg-type]
            truth = leave_one_out(trajectory, workload, chosen, kind, samples=samples)  # type: ignore[arg-type]
            for position, window in enumerate(chosen):
                values = correlations(estimate.of(position), truth.of(position)).values
                name = "whole run" if position == len(chosen) - 1 else str(window)
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
        grouped = table.groupby(["kind", "window"], sort=False)[[SPEARMAN.leaf, PEARSON.leaf, JACCARD_30.leaf]]
        print(grouped.agg(["median", "min"]).to_string(float_format="%.3f"))
        windows = table[table["window"] != "whole run"]
        overall = windows.groupby("kind", sort=False)[SPEARMAN.leaf].agg(["median", "min", "count"])
        print("\nSpearman over windows and seeds:")
        print(overall.to_string(float_format="%.3f"))


if __name__ == "__main__":
    main()
