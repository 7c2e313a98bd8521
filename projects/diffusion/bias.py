"""Do drawn timesteps decide which samples are influential? Several trainings, compared with exact leave-one-out.

Run from the repository::

    python projects/diffusion/bias.py --seeds 4

Prints two tables in Markdown: how the gradient norm of a presentation depends on its timestep, and for each method what
its top lists depend on and how well it agrees with leave-one-out. Each training has a seed of its own for weights,
batch order and draws. The model is one that has learned (:data:`LEARNED`), unless ``--set`` says otherwise: then the
norm depends on the timestep. Takes about four minutes of one processor for each training.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from dit_mlflow import (
    Trajectory,
    Window,
    Workload,
    leave_one_out,
    load_workload,
    mean_validation_loss,
    parse_windows,
    sample_losses,
    train,
)
from dit_mlflow.methods import method
from dit_mlflow.methods.snapshot import Snapshot
from dit_mlflow.methods.tracin import presented_norms

METHODS = ["tracin", "tracin_renormalized", "dit"]
TOP = 10
"""Samples in a top list, of largest absolute score."""
BINS = 10
"""Equal parts of the timesteps."""
QUERIES = 12
"""Validation samples whose losses are queries, besides the mean loss."""
PARTS = 5
LEARNED = {"optimizer": "adam", "lr": "0.003", "epochs": "200", "hidden": "128"}


@dataclass(frozen=True, eq=False)
class Presentations:
    """Every use of a training sample, in order; all fields are ``[presentations]``."""

    step: np.ndarray
    sample: np.ndarray
    timestep_bin: np.ndarray
    norm: np.ndarray

    def inside(self, window: Window) -> Presentations:
        kept = (self.step >= window.start) & (self.step < window.end)
        return Presentations(self.step[kept], self.sample[kept], self.timestep_bin[kept], self.norm[kept])

    def norm_by_bin(self) -> np.ndarray:
        """Mean gradient norm by part of the timesteps, ``[BINS]``; 0 where none was drawn."""
        count = np.bincount(self.timestep_bin, minlength=BINS)
        return np.bincount(self.timestep_bin, self.norm, minlength=BINS) / np.maximum(count, 1)

    def luck(self, samples: int) -> np.ndarray:
        """``[samples]``: for each, the mean gradient norm at the timesteps that it drew, summed over these."""
        return np.bincount(self.sample, self.norm_by_bin()[self.timestep_bin], minlength=samples)


def presentations(trajectory: Trajectory, workload: Workload) -> Presentations:
    """Timesteps and gradient norms as recorded. Cost: a replay, and a backward pass for each presentation."""
    replay = trajectory.replay(workload)
    drawn: list[torch.Tensor] = []
    replay.dynamics.model.register_forward_pre_hook(lambda model, given: drawn.append(given[1]))
    rows = []
    for t, state in enumerate(replay.forward(0, trajectory.num_steps - 1)):
        step = trajectory.step(t)
        snapshot = Snapshot(replay, state, step)
        drawn.clear()
        norms = presented_norms(replay, step, snapshot)
        bins = torch.cat(drawn).numpy() * BINS // workload.settings["timesteps"]
        rows.append((np.full(len(norms), t), step.samples, bins, norms))
    return Presentations(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def overlap(scores: np.ndarray) -> float:
    """Mean share of the top list that two queries have in common; ``scores [queries, samples]``."""
    tops = [set(np.argsort(-np.abs(row))[:TOP].tolist()) for row in scores]
    return float(np.mean([len(a & b) / TOP for a, b in itertools.combinations(tops, 2)]))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


def measured(seed: int, settings: dict[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Norms by timestep, and a row for each window and method, of one training."""
    workload = load_workload("projects/diffusion", **settings)
    queries = [mean_validation_loss(workload), *sample_losses(workload, range(QUERIES))]
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        if drift := trajectory.verify(workload).max_drift:
            raise SystemExit(f"the training does not replay exactly: drift {drift:g}")
        epochs = parse_windows("epochs", trajectory)
        last_of_fifths = epochs[len(epochs) // PARTS - 1 :: len(epochs) // PARTS]
        windows = [*parse_windows("1", trajectory), *parse_windows(str(PARTS), trajectory), *last_of_fifths]
        scores = {name: method(name)(trajectory, workload, windows, queries=queries).scores for name in METHODS}
        scores["leave_one_out"] = leave_one_out(trajectory, workload, windows, queries=queries).scores
        shown = presentations(trajectory, workload)
    norms = pd.DataFrame({part: shown.inside(windows[k]).norm_by_bin() for part, k in (("first", 1), ("last", PARTS))})
    rows = list(_rows(windows, scores, shown, workload.num_samples))
    return norms.assign(seed=seed), pd.DataFrame(rows).assign(seed=seed)


def _rows(
    windows: list[Window], scores: dict[str, np.ndarray], shown: Presentations, samples: int
) -> Iterator[dict[str, Any]]:
    truth = scores["leave_one_out"]
    for k, window in enumerate(windows):
        inside = shown.inside(window)
        luck = inside.luck(samples)
        lucky = set(np.argsort(-luck)[:TOP].tolist())
        for name, found in scores.items():
            single = found[k, 1:]
            mean = np.abs(single).mean(axis=0)
            agreements = [spearman(a, b) for a, b in zip(single, truth[k, 1:], strict=True)]
            tops = [set(np.argsort(-np.abs(row))[:TOP].tolist()) for row in single]
            yield {
                "window": "whole run" if k == 0 else "fifths" if k <= PARTS else "single epochs",
                "method": name,
                "overlap of queries": overlap(single),
                "luck in top": float(np.mean([len(top & lucky) / TOP for top in tops])),
                "luck and size": spearman(mean, luck),
                "agreement, mean loss": spearman(found[k, 0], truth[k, 0]),
                "agreement, samples": float(np.mean(agreements)),
                "first and last fifth": spearman(found[1, 0], found[PARTS, 0]) if k == 0 else np.nan,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="of projects/diffusion")
    options = parser.parse_args()
    settings = LEARNED | dict(option.split("=", 1) for option in options.set)
    found = [measured(seed, settings) for seed in range(options.seeds)]
    norms = pd.concat([norms for norms, _ in found])
    print(f"Mean gradient norm by tenth of the timesteps ({options.seeds} trainings: mean, smallest to largest)\n")
    print(_markdown(norms.groupby(norms.index)[["first", "last"]], "tenth"))
    # Fifths and epochs of a training are first averaged within it.
    rows = pd.concat([rows for _, rows in found]).groupby(["window", "method", "seed"], sort=False).mean()
    print(f"What top lists of {TOP} depend on (chance: {TOP} of the samples), and Spearman correlations\n")
    print(_markdown(rows.groupby(["window", "method"], sort=False), "window, method"))


def _markdown(groups: Any, name: str) -> str:
    """Mean, smallest and largest over trainings."""
    mean, low, high = groups.mean(), groups.min(), groups.max()
    lines = [f"| {name} | {' | '.join(mean.columns)} |", "|" + "---|" * (1 + len(mean.columns))]
    for key in mean.index:
        figures = zip(mean.loc[key], low.loc[key], high.loc[key], strict=True)
        cells = ["" if np.isnan(m) else f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in figures]
        lines.append(f"| {', '.join(key) if isinstance(key, tuple) else key + 1} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
