"""CPU time, as multiples of the training, while samples, epochs, windows and parameters grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from dit_mlflow import Window, leave_one_out, parse_windows, track, train
from dit_mlflow.evaluation.figures import CPU_SECONDS
from dit_mlflow.plots.canvas import HARMFUL, HELPFUL, MARKED, SMALL, new_figure
from dit_mlflow.recording.loop import train_unrecorded

from .authors import authors_scores
from .cases import Case
from .memory import remembered
from .panels import legend_above
from .scored import fingerprint
from .table import Series, Table, Unit, every_seed, grid, mean_of, number

BASE = {"n_train": 256, "epochs": 21, "hidden": 8}
SCALES: dict[str, tuple[int, ...]] = {
    "samples": (64, 128),
    "epochs": (5, 11),
    "windows": (1, 3, 7),
    "hidden units": (32, 128),
}
"""What is varied from :data:`BASE` with a window for each epoch, which all scales share."""
QUICK_SCALES = {"samples": (64,), "windows": (1,)}
SETTINGS = {"samples": "n_train", "epochs": "epochs", "hidden units": "hidden"}
METHODS = ("dit local", "dit final", "dit cumulative", "published", "leave_one_out")
WORDS = {
    "dit local": "DIT, `local`",
    "dit final": "DIT, `final`",
    "dit cumulative": "DIT, `cumulative`",
    "published": "published method",
    "leave_one_out": "exact leave-one-out",
}
STYLES = {
    "dit local": (HELPFUL, "o"),
    "dit final": ("#56B4E9", "s"),
    "dit cumulative": ("#009E73", "D"),
    "published": (HARMFUL, "v"),
    "leave_one_out": (MARKED, "^"),
}


class Cost(Table):
    """Every figure is CPU time over that of the plain training in the same process."""

    name = "cost"
    title = "Cost"
    facets = ("scale", "at")
    figures = ("ratio", "seconds")

    def units(self, cases: Sequence[Case], seeds: int, quick: bool) -> list[Unit]:
        """On the first case with a hidden layer whose width can be set."""
        case = next((case for case in cases if case.model == "dnn"), None)
        if case is None:
            return []
        scales = QUICK_SCALES if quick else SCALES
        given = {**{name: str(value) for name, value in BASE.items()}, **dict(case.settings)}
        common = {**{scale: given[name] for scale, name in SETTINGS.items()}, "windows": given["epochs"]}
        changes = [
            (("scale", scale), ("at", str(at)))
            for scale, values in scales.items()
            for at in values
            if str(at) != common[scale]
        ]
        bases = replace(case, settings=tuple(given.items()))
        return [
            Unit(replace(bases, settings=(*bases.settings, *change)), seed)
            for seed in range(seeds)
            for change in [(), *changes]
        ]

    def measure(self, unit: Unit) -> pd.DataFrame:
        given = dict(unit.case.settings)
        scale, at = given.pop("scale", ""), given.pop("at", "")
        if scale in SETTINGS:
            given[SETTINGS[scale]] = at
        case = replace(unit.case, settings=tuple(given.items()))
        seconds = _spent(case, unit.seed, at if scale == "windows" else "epochs", fingerprint())
        # The training that all scales have in common is a point of each.
        common = {**{name: int(given[setting]) for name, setting in SETTINGS.items()}, "windows": int(given["epochs"])}
        points = [(scale, int(at))] if scale else list(common.items())
        keys = {"data": unit.case.data, "model": unit.case.model, "seed": unit.seed}
        return pd.DataFrame(
            [
                {
                    **keys,
                    "scale": name,
                    "at": value,
                    "method": method,
                    "ratio": spent / seconds["training"],
                    "seconds": spent,
                }
                for name, value in points
                for method, spent in seconds.items()
            ]
        )

    def series(self, rows: pd.DataFrame) -> Iterable[Series]:
        for row in rows.to_dict("records"):
            yield f"by_{row['scale'].replace(' ', '_')}/cost/times_training", row["at"], row["ratio"]
            yield f"by_{row['scale'].replace(' ', '_')}/{CPU_SECONDS.name}", row["at"], row["seconds"]

    def figure(self, rows: pd.DataFrame) -> Figure:
        """A panel for each scale, both axes logarithmic."""
        scales = list(dict.fromkeys(rows["scale"]))
        figure = new_figure(3.6)
        for axes, scale in zip(np.atleast_1d(figure.subplots(1, len(scales), sharey=True)), scales, strict=True):
            for method in METHODS:
                own = rows[(rows["scale"] == scale) & (rows["method"] == method)].groupby("at")["ratio"]
                colour, marker = STYLES[method]
                axes.plot(
                    own.mean().index,
                    own.mean(),
                    color=colour,
                    marker=marker,
                    ms=4,
                    lw=1.4,
                    label=WORDS[method].replace("`", ""),
                )
                axes.fill_between(own.mean().index, own.min(), own.max(), color=colour, alpha=0.15, lw=0)
            axes.set_xscale("log")
            axes.set_yscale("log")
            ticks = sorted(rows[rows["scale"] == scale]["at"].unique())
            axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=SMALL)
            axes.minorticks_off()
            axes.set_xlabel(scale)
            axes.axhline(1, color="black", lw=0.7, ls=":")
            axes.grid(axis="y", lw=0.3)
        figure.axes[0].set_ylabel("CPU time / that of the training")
        legend_above(figure, 5)
        return figure

    def section(self, rows: pd.DataFrame) -> str:
        data, model = rows[["data", "model"]].iloc[0]
        scales = list(dict.fromkeys(rows["scale"]))
        shown = rows[rows["method"].isin(METHODS)].assign(of=lambda table: table["method"].map(WORDS))
        wide = rows.pivot_table(index=["scale", "at", "seed"], columns="method", values="seconds")
        against = (wide["published"] / wide["dit cumulative"]).groupby(["scale", "at"], sort=False).mean()
        retraining = (wide["leave_one_out"] / wide["dit cumulative"]).groupby(["scale", "at"], sort=False).mean()
        words = [
            "**Cost.** The published method (`benchmarks/reproduction/authors.py`: a sweep from every epoch's end, one "
            f"sample at a time) takes {number(against.min(), 0)} to {number(against.max(), 0)} times the CPU time of "
            "DIT for `cumulative` windows; retraining without every sample, side by side in float32, "
            f"{number(retraining.min(), 0)} to {number(retraining.max(), 0)} times.",
            f"On {data} {model}: {BASE['n_train']} samples, {BASE['epochs']} epochs with a window each, hidden layer "
            f"of {BASE['hidden']}, but for the one that is varied. CPU time of one thread as a multiple of the plain "
            "training in the same process.",
        ]
        for scale in scales:
            own = shown[shown["scale"] == scale]
            words += [
                f"## {scale}\n",
                grid(
                    own.sort_values("at", kind="stable"),
                    ["at"],
                    "of",
                    [WORDS[name] for name in METHODS],
                    lambda cell: mean_of(cell["ratio"], 1),
                ),
            ]
        seeds = shown[(shown["scale"] == scales[0]) & shown["method"].isin(["dit cumulative", "published"])]
        words += [
            f"## Every seed: {scales[0]}\n",
            every_seed(seeds, ["of", "at"], "ratio", 1),
        ]
        return "\n\n".join(words)


@remembered
def _spent(case: Case, seed: int, windows_text: str, code: str) -> dict[str, float]:
    """CPU seconds of the training and of every method, one thread each."""
    torch.set_num_threads(1)
    workload = case.workload(seed)
    with TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)
        windows = parse_windows(windows_text, trajectory)
        whole = [Window(0, trajectory.num_steps)]
        short: dict[str, Callable[[], object]] = {
            "training": lambda: train_unrecorded(workload, seed, seed),
            "dit local": lambda: track(trajectory, workload, windows, "local"),
            "dit final": lambda: track(trajectory, workload, windows, "final"),
            "dit cumulative": lambda: track(trajectory, workload, windows, "cumulative"),
        }
        long: dict[str, Callable[[], object]] = {
            "leave_one_out": lambda: leave_one_out(trajectory, workload, whole, "final", dtype=None),
            "published": lambda: authors_scores(trajectory, workload, windows),
        }
        return {name: _cpu_seconds(run, 3) for name, run in short.items()} | {
            name: _cpu_seconds(run, 1) for name, run in long.items()
        }


def _cpu_seconds(run: Callable[[], object], repetitions: int) -> float:
    """Least of several: what else the machine does only adds."""
    spent = []
    for _ in range(repetitions):
        begun = time.process_time()
        run()
        spent.append(time.process_time() - begun)
    return min(spent)
