"""Cost of recording a plain loop: MLP 784-256-10, SGD with momentum, batches of 64 from a DataLoader.

``python benchmarks/recording.py`` prints a table. Figures are CPU seconds of this process, medians of several
repetitions in which the loop without and with the recorder take turns. Recording includes everything from entering the
recorder to the last file on disk: the dataset's digest, batch indices, hyperparameters and random states of every step,
about ``sqrt(T)`` checkpoints of parameters and momentum (1.6 MB each), and their hashes. ``ends only`` is the same with
checkpoints at the first and the last step alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from dit_mlflow import TrajectoryRecorder

STEPS_PER_EPOCH = 50
BATCH_SIZE = 64


def random_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    samples = STEPS_PER_EPOCH * BATCH_SIZE
    return TensorDataset(
        torch.randn(samples, 784, generator=generator), torch.randint(10, (samples,), generator=generator)
    )


def cpu_seconds(data: TensorDataset, epochs: int, checkpoint_every: str | int | None) -> float:
    """CPU seconds of one training; ``None`` = without a recorder."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(data, batch_size=BATCH_SIZE, shuffle=True)

    def train(recorder: TrajectoryRecorder | None) -> None:
        for _ in range(epochs):
            for inputs, targets in recorder.watch(loader) if recorder else loader:
                optimizer.zero_grad()
                criterion(model(inputs), targets).backward()
                optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        if checkpoint_every is None:
            train(None)
        else:
            with TrajectoryRecorder(
                model, optimizer, Path(folder) / "t", checkpoint_every=checkpoint_every
            ) as recorder:
                train(recorder)
        return time.process_time() - started


def measure(steps: int, repetitions: int) -> dict[str, float]:
    """Median CPU seconds of ``steps`` steps, without and with the recorder."""
    data = random_data()
    kinds: dict[str, str | int | None] = {"plain": None, "ends only": 0, "recorded": "sqrt"}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repetition in range(repetitions + 1):
        for kind, checkpoint_every in kinds.items():
            seconds = cpu_seconds(data, steps // STEPS_PER_EPOCH, checkpoint_every)
            if repetition > 0:
                times[kind].append(seconds)
    return {kind: statistics.median(values) for kind, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", type=int, default=[250, 1000, 2000], help="multiples of 50")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = pd.DataFrame({steps: measure(steps, options.repetitions) for steps in options.steps}).T
    for kind in ("ends only", "recorded"):
        seconds[f"{kind} / plain"] = seconds[kind] / seconds["plain"]
    print(seconds.rename_axis("steps").to_string(float_format="%.3f"))


if __name__ == "__main__":
    main()
