"""Draws of sample weights of a step of one's own: a step and its derivative alone, and for 16 draws side by side.

``python benchmarks/draws.py`` prints a Markdown table: milliseconds, the faster of three steps, on one thread.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from exactness import CASES, SAMPLES, Net, data, losses

from dit_mlflow import Workload, train
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.kind import Course
from dit_mlflow.influence.query import mean_validation_loss
from dit_mlflow.influence.weighted_sweeps import WeightedSweeps

DRAWS, EPOCHS = 16, 2
OWN = "a step of one's own: AdamW, clipping"
STEPS: dict[str, dict[str, Any]] = {
    **{name: CASES[name] for name in (OWN, "SAM", "mean teacher", "GAN, two optimizers")},
    **{f"{OWN}; width {width}": {**CASES[OWN], "model": partial(Net, width=width)} for width in (256, 4096)},
}


def measure(name: str) -> tuple[float, float] | None:
    settings = {"model": Net, "loss": losses, "batch_size": 8, "epochs": EPOCHS} | STEPS[name]
    workload = Workload(train_set=data(SAMPLES, 0), validation_set=data(16, 1), **settings)
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "trajectory")
        engine, queries = Engine(trajectory.replay(workload), shown=False), [mean_validation_loss(workload)]
        steps = trajectory.num_steps
        engine.choose(0, steps, queries)
        weights = torch.rand(DRAWS, SAMPLES, generator=torch.Generator().manual_seed(0))
        return WeightedSweeps(engine).compared(queries, Course(0, steps, ((steps, 0, 1),)), weights)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"| training | one alone | {DRAWS} alone | {DRAWS} side by side | times as fast |\n|---|---|---|---|---|")
    for name in STEPS:
        if (seconds := measure(name)) is None:
            print(f"| {name} | not the same side by side |||")
            continue
        alone, together = (1e3 * part for part in seconds)
        print(f"| {name} | {alone:.1f} | {DRAWS * alone:.0f} | {together:.1f} | {DRAWS * alone / together:.1f} |")


if __name__ == "__main__":
    main()
