"""How much influence in one window downloads from a tracking server: MLP 784-256-10 with AdamW, 4,500 digits.

``python benchmarks/downloads.py`` prints a table. An ``mlflow server`` on loopback stands between us and the artifacts
(SQLite, one worker). Each row begins with an empty cache: ``load_trajectory`` and ``track`` on that window, then the
same again in the same cache. Bytes are those of the files that came into the cache; the manifest comes on top each
time. Seconds are wall time of both calls, replay and sweep included. A checkpoint is 2.4 MB, and files are written when
16 MiB have come together.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mlflow
import pandas as pd
import stores
import torch
from mnist import mnist_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from dit_mlflow import Window, Workload, track, train
from dit_mlflow.tracking import load_trajectory, log_trajectory
from dit_mlflow.tracking.store.cache import FOLDER

PIECES = 10


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return cross_entropy(model(inputs), targets, reduction="none")


def digits(epochs: int) -> Workload:
    images, labels = mnist_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.from_numpy(images / 255).float()[order], torch.from_numpy(labels)[order]
    return Workload(
        model=lambda: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)),
        loss=losses,
        train_set=TensorDataset(inputs[:4500], targets[:4500]),
        validation_set=TensorDataset(inputs[4500:], targets[4500:]),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
        batch_size=64,
        epochs=epochs,
    )


def ask(run_id: str, workload: Workload, window: Window, cache: Path) -> tuple[int, int, float]:
    """Files and bytes added to the cache, and seconds."""
    before = sizes(cache)
    started = time.perf_counter()
    track(load_trajectory(run_id), workload, [window])
    seconds = time.perf_counter() - started
    arrived = sizes(cache).items() - before.items()
    return len(arrived), sum(size for _, size in arrived), seconds


def sizes(cache: Path) -> dict[int, int]:
    """By inode, so that a file downloaded again counts as another one."""
    found = [path.stat() for path in cache.rglob("*") if path.is_file()]
    return {status.st_ino: status.st_size for status in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    workload = digits(arguments.epochs)
    with tempfile.TemporaryDirectory() as temporary, stores.server(Path(temporary)) as server:
        mlflow.set_tracking_uri(server.uri)
        trajectory = train(workload, Path(temporary) / "trajectory")
        started = time.perf_counter()
        with mlflow.start_run() as run:
            log_trajectory(trajectory)
        files = [entry.size for entry in trajectory.manifest.files.values()]
        print(
            f"{trajectory.num_steps} steps, {len(trajectory.checkpoint_steps)} checkpoints: {len(files)} files, "
            f"{sum(files) / 1e6:.1f} MB, the largest {max(files) / 1e6:.1f} MB; logged in "
            f"{time.perf_counter() - started:.1f} s\n"
        )
        steps = trajectory.num_steps
        bounds = [steps * piece // PIECES for piece in range(PIECES + 1)]
        windows = [Window(bounds[piece], bounds[piece + 1]) for piece in (0, PIECES // 2, PIECES - 1)]
        rows = []
        for window in [*windows, Window(0, steps)]:
            with tempfile.TemporaryDirectory() as cache:
                os.environ[FOLDER] = cache
                count, size, seconds = ask(run.info.run_id, workload, window, Path(cache))
                _, again, sooner = ask(run.info.run_id, workload, window, Path(cache))
            rows.append((str(window), count, size / 1e6, seconds, again / 1e6, sooner))
    columns = ["window", "files", "MB", "seconds", "MB again", "seconds again"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False, float_format="{:.1f}".format))


if __name__ == "__main__":
    main()
