"""Does trust, from a few retrainings, rank settings as the full ground truth does, and are its intervals right?

``python benchmarks/trust.py`` trains projects/mnist with several models, optimizers and learning rates, and for every
kind and window takes the full ground truth, the figures of :func:`dit_mlflow.evaluation.trust`, and 20 draws of its
random samples from the full ground truth.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats

from dit_mlflow import leave_one_out, load_workload, parse_windows, track, train
from dit_mlflow.evaluation import correlation_intervals, correlations, trust
from dit_mlflow.evaluation.figures import SLOPE_RATIO, SMOOTHNESS, SPEARMAN, SPREAD_RATIO, TRUST_SPEARMAN

SETTINGS = [
    {"model": model, "optimizer": optimizer, "lr": lr}
    for model, optimizer, rates in (
        ("logreg", "sgd", (0.003, 0.03, 0.3)),
        ("dnn", "sgd", (0.0005, 0.01, 0.03, 0.1, 0.3)),
        ("dnn", "adam", (0.001, 0.01)),
    )
    for lr in rates
]
KINDS = ("local", "final", "cumulative")
DRAWS = 20
TRUSTED = "trust_"
"""Prefix of the columns with trust's figures."""


def measure(setting: dict[str, object], seed: int, samples: int, n_train: int) -> list[dict[str, object]]:
    """A row per kind and window: figures of the full ground truth, of trust, and the coverage of its intervals."""
    workload = load_workload("projects/mnist", **setting, n_train=n_train)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        windows = [*parse_windows("5", trajectory), *parse_windows("1", trajectory)]
        for kind in KINDS:
            estimate = track(trajectory, workload, windows, kind, dtype=torch.float64)  # type: ignore[arg-type]
            truth = leave_one_out(trajectory, workload, windows, kind)  # type: ignore[arg-type]
            trusted = trust(estimate, trajectory, workload, samples)
            for k, figures in enumerate(trusted):
                full = correlations(estimate.of(k), truth.of(k)).values
                if not full:
                    continue
                known = estimate.scores[k, 0].std() / truth.scores[k, 0].std()
                rows.append(
                    {**setting, "seed": seed, "kind": kind, "window": k}
                    | {"full": full[SPEARMAN.leaf], "full_spread": known}
                    | {TRUSTED + name: value for name, value in figures.values.items()}
                    | held(estimate.of(k), truth.of(k), samples)
                )
    return rows


def held(estimate: np.ndarray, truth: np.ndarray, samples: int) -> dict[str, float]:
    """Share of draws whose interval contains the correlation over all samples, and its median width."""
    full = correlations(estimate, truth).values[SPEARMAN.leaf]
    intervals = []
    for draw in range(DRAWS):
        chosen = np.random.default_rng(draw).choice(len(truth), size=samples, replace=False)
        found = correlation_intervals(estimate[chosen], truth[chosen], resamples=1000, names=(SPEARMAN.leaf,))
        if found:
            intervals.append(found[SPEARMAN.leaf])
    return {
        "held": float(np.mean([low <= full <= high for low, high in intervals])),
        "width": float(np.median([high - low for low, high in intervals])),
    }


def rank(table: pd.DataFrame, figure: str) -> float:
    """Spearman correlation of a figure of trust with the full ground truth's, over the rows."""
    known = table[[figure, "full"]].dropna()
    return float(stats.spearmanr(known[figure], known["full"]).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--n-train", type=int, default=128)
    options = parser.parse_args()
    started = time.perf_counter()
    rows = [
        row
        for setting in SETTINGS
        for seed in range(options.seeds)
        for row in measure(setting, seed, options.samples, options.n_train)
    ]
    table = pd.DataFrame(rows)
    # How far slope is from 1, on either side, and both figures of linearity together.
    slope = table[TRUSTED + SLOPE_RATIO.leaf].clip(lower=1e-3)
    table["trust_slope"] = np.minimum(slope, 1 / slope)
    table["trust_linearity"] = table["trust_slope"] * table[TRUSTED + SMOOTHNESS.leaf]
    figures = (TRUSTED + TRUST_SPEARMAN.leaf, TRUSTED + SMOOTHNESS.leaf, "trust_slope", "trust_linearity")
    settings = ["model", "optimizer", "lr", "kind"]
    print(f"{len(table)} rows, {options.samples} of {options.n_train} samples, {time.perf_counter() - started:.0f} s\n")
    columns = ["full", *figures, "full_spread", TRUSTED + SPREAD_RATIO.leaf, "held"]
    shown = table.groupby(settings, sort=False)[columns].mean()
    print(shown.to_string(float_format="%.3f"))
    ranked = {
        name: {figure: rank(part, figure) for figure in figures}
        for name, part in [
            ("all rows", table),
            *((kind, table[table["kind"] == kind]) for kind in KINDS),
            *((model, table[table["model"] == model]) for model in ("logreg", "dnn")),
            ("means of settings", shown.reset_index()),
        ]
    }
    print("\nSpearman correlation with the full ground truth's Spearman:")
    print(pd.DataFrame(ranked).T.to_string(float_format="%.3f"))
    print(
        f"\nintervals that hold the full figure: {table['held'].mean():.3f}, median width {table['width'].median():.3f}"
    )
    for low, high in ((-1, 0.9), (0.9, 0.99), (0.99, 1.01)):
        part = table[(table["full"] >= low) & (table["full"] < high)]
        print(f"  full Spearman in [{low}, {high}): {part['held'].mean():.3f} of {len(part)} rows")


if __name__ == "__main__":
    main()
