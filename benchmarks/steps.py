"""Cost of a step's record: bytes on disk, and microseconds to write it and to read it back.

``python benchmarks/steps.py`` prints a table over 1,000 steps of batch 32. Times are CPU time, the best of several
repetitions: writing is what the recorder's writing thread does with a file of steps (encoding, hashing, syncing),
reading is what :meth:`dit_mlflow.Trajectory.step` does when it first meets the file (hashing left out). Random states
are torch's, at steps that draw 16,384 numbers each (a dropout layer) or 96 (augmentation of 32 images).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dit_mlflow.recording.folder import Segment, TrajectoryFolder
from dit_mlflow.replay.optimizers import describe_optimizer, hyperparameters
from dit_mlflow.trajectory.manifest import Manifest, ModelLayout, TensorLayout
from dit_mlflow.trajectory.step_record import StepFields
from dit_mlflow.trajectory.steps_file import read_steps
from dit_mlflow.workload.random_state import RandomState

STEPS, BATCH = 1000, 32


def rows(
    optimizer: Optimizer, draws: int = 0, coefficients: bool = False, scheduled: bool = False
) -> Iterator[StepFields]:
    """The steps of a training that draws ``draws`` random numbers at each."""
    generator = np.random.default_rng(0)
    settings = hyperparameters(optimizer)
    torch.manual_seed(0)
    for t in range(STEPS):
        if scheduled:
            optimizer.param_groups[0]["lr"] = 0.1 * float(np.cos(t / STEPS))
            settings = hyperparameters(optimizer)
        before = RandomState.capture()
        torch.rand(draws)
        yield {
            "index": t,
            "epoch": t // 100,
            "indices": [tuple(generator.integers(50_000, size=BATCH).tolist())],
            "coefficients": [generator.random(BATCH)] if coefficients else None,
            "hyperparameters": settings,
            "loss": float(generator.random()),
            "random_states": [before.used_since(RandomState.capture())],
            "evaluation_mode": [],
            "no_gradient": [],
            "zero_gradient": [],
        }


CASES: dict[str, dict[str, Any]] = {
    "SGD": {},
    "SGD, coefficients": {"coefficients": True},
    "AdamW": {"adam": True},
    "AdamW, learning rate changes": {"adam": True, "scheduled": True},
    "AdamW, 16,384 draws": {"adam": True, "draws": 16_384},
    "AdamW, 96 draws": {"adam": True, "draws": 96},
}


def measure(name: str, repetitions: int) -> dict[str, Any]:
    options = dict(CASES[name])
    model = nn.Linear(2, 1)
    adam = options.pop("adam", False)
    optimizer = AdamW(model.parameters(), lr=0.1) if adam else SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = list(rows(optimizer, **options))
    layouts = {name: TensorLayout(shape=tuple(p.shape), dtype="float32") for name, p in model.named_parameters()}
    empty = Manifest(
        complete=False,
        num_steps=0,
        num_samples=50_000,
        epoch_ends=(),
        model=ModelLayout(name="Linear", parameters=layouts, buffers={}),
        optimizer=describe_optimizer(optimizer, model),
        steps=(),
        checkpoints=(),
        files={},
        workload=None,
        dataset=None,
        versions={},
        threads=1,
    )
    writing, reading = [], []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as temporary:
            folder = TrajectoryFolder(Path(temporary), empty)
            begun = time.process_time()
            folder.append(Segment(0, steps), {"num_steps": STEPS})
            writing.append(time.process_time() - begun)
            part = folder.manifest.steps[0]
            begun = time.process_time()
            read_steps(Path(temporary) / part.file, part, folder.manifest)
            reading.append(time.process_time() - begun)
            size = folder.manifest.files[part.file].size
    return {
        "optimizer": name,
        "bytes per step": f"{size / STEPS:,.0f}",
        "µs to write": f"{1e6 * min(writing) / STEPS:.1f}",
        "µs to read": f"{1e6 * min(reading) / STEPS:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(pd.DataFrame([measure(name, options.repetitions) for name in CASES]).to_string(index=False))


if __name__ == "__main__":
    main()
