"""Cost of the sweep, in multiples of the cost of the training itself: ``python benchmarks/speed.py``.

Training is a plain ``torch.optim`` loop on the same batches, drawn beforehand, with the same number of threads (one,
unless ``--threads`` says otherwise). Figures are medians of CPU seconds in one process, taken in turns. "In memory"
leaves out reading and replay; all else starts from a trajectory on disk with the default checkpoints. Each window asks
its query once, the mean loss of 64 samples: about one more training step per window.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from measure import Work, cpu_seconds, medians, plain_training
from mnist import mnist_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim import SGD, Adam
from torch.utils.data import TensorDataset

from dit_mlflow import Trajectory, Window, Workload, leave_one_out, parse_windows, track, train
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.kind import courses, sweeps
from dit_mlflow.influence.query import mean_validation_loss
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory import State


class Encoder(nn.Module):
    """The rows of an image as 28 tokens through two transformer layers."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Linear(28, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=dropout, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(images.flatten(1).unflatten(1, (28, 28)))).mean(dim=1))


def mlp() -> nn.Module:
    """784-256-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    """32 and 64 channels."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 49, 10))


def small() -> nn.Module:
    """784-8-1."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return Adam(model.parameters(), lr=1e-3)


def digits_workload(model: Any, samples: int, epochs: int, optimizer: Any = momentum, batch_size: int = 64) -> Workload:
    """Real digits, ten classes; ``small``: two classes, 0 … 4 and the others."""
    images, labels = mnist_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    inputs = torch.from_numpy(images).float()[order].view(-1, 1, 28, 28) / 255
    targets = torch.from_numpy(labels)[order]

    def ten(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    def two(model: nn.Module, batch: Any) -> Tensor:
        return binary_cross_entropy_with_logits(model(batch[0]), (batch[1] > 4).to(batch[0].dtype), reduction="none")

    return Workload(
        model,
        two if model is small else ten,
        train_set=TensorDataset(inputs[:samples], targets[:samples]),
        validation_set=TensorDataset(inputs[-64:], targets[-64:]),
        optimizer=optimizer,
        batch_size=batch_size,
        epochs=epochs,
    )


class InMemory(Replay):
    """A trajectory with all states in memory, to measure the sweep alone."""

    def __init__(self, trajectory: Trajectory, workload: Workload) -> None:
        super().__init__(trajectory, workload)
        self._states = list(self.forward(0, trajectory.num_steps))

    def backward(self, a: int, b: int, *settings: Any) -> Iterator[tuple[int, State]]:
        for t in range(b, a - 1, -1):
            yield t, self._states[t]


def sweep_in_memory(trajectory: Trajectory, workload: Workload) -> Work:
    replay = InMemory(trajectory, workload)
    planned = sweeps(courses("local", parse_windows("1", trajectory), trajectory.num_steps))
    return lambda: Engine(replay).run([mean_validation_loss(workload)], planned, 1)


def multiples(rows: dict[str, Workload], repetitions: int) -> pd.DataFrame:
    """One sweep, in memory and from disk; 21 disjoint windows."""
    table = {}
    for name, workload in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            trajectory = train(workload, Path(folder) / "t")
            one, many = parse_windows("1", trajectory), parse_windows("21", trajectory)
            seconds = medians(
                {
                    "training": plain_training(workload, trajectory),
                    "in memory": sweep_in_memory(trajectory, workload),
                    "from disk": lambda t=trajectory, w=workload, one=one: track(t, w, one),
                    "21 local windows": lambda t=trajectory, w=workload, many=many: track(t, w, many),
                },
                repetitions,
            )
            table[name] = {"steps": float(trajectory.num_steps)} | _over_training(seconds)
    return pd.DataFrame(table).T


def _over_training(seconds: dict[str, float]) -> dict[str, float]:
    training = seconds.pop("training")
    return {"training s": training} | {name: value / training for name, value in seconds.items()}


def small_network(repetitions: int) -> pd.DataFrame:
    """784-8-1, 84 steps: windows of all kinds, and exact leave-one-out."""
    workload = digits_workload(small, 256, 21, lambda model: SGD(model.parameters(), lr=0.05))
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "t")
        one, many = parse_windows("1", trajectory), parse_windows("21", trajectory)
        seconds = medians(
            {
                "training": plain_training(workload, trajectory),
                "1 window": lambda: track(trajectory, workload, one),
                "21 local windows": lambda: track(trajectory, workload, many),
                "21 final windows": lambda: track(trajectory, workload, many, "final"),
                "21 cumulative windows": lambda: track(trajectory, workload, many, "cumulative"),
                "256 leave-one-out, float32": lambda: leave_one_out(trajectory, workload, one, dtype=torch.float32),
                "256 leave-one-out, float64": lambda: leave_one_out(trajectory, workload, one),
            },
            repetitions,
        )
    return pd.DataFrame({"784-8-1": _over_training(seconds)}).T


def compiled_steps(rows: dict[str, Workload], repetitions: int) -> pd.DataFrame:
    """One sweep in memory, its steps eager and compiled, after a first walk that checks derivatives and compiles."""
    table = {}
    for name, workload in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            trajectory = train(workload, Path(folder) / "t")
            replay = InMemory(trajectory, workload)
            eager, compiled = (Engine(replay, shown=False, compile=way) for way in ("never", "always"))
            scores = swept_by(eager, workload)()
            begun = time.perf_counter()
            apart = abs(swept_by(compiled, workload)() - scores).max() / abs(scores).max()
            first = time.perf_counter() - begun
            work = {"eager": swept_by(eager, workload), "compiled": swept_by(compiled, workload)}
            seconds = medians({"training": plain_training(workload, trajectory), **work}, repetitions)
            table[name] = {
                "steps": float(trajectory.num_steps),
                **_over_training(seconds),
                "first walk s": first,
                "apart": f"{apart:.0e}",
                "choice": compiled.details["compile"],
            }
    return pd.DataFrame(table).T


def swept_by(engine: Engine, workload: Workload) -> Callable[[], np.ndarray]:
    trajectory = engine.replay.trajectory
    planned = sweeps(courses("local", [Window(0, trajectory.num_steps)], trajectory.num_steps))
    return lambda: engine.run([mean_validation_loss(workload)], planned, 1)


def scaling(repetitions: int) -> pd.DataFrame:
    """CPU milliseconds of the sweep, from disk, with more steps, larger batches and more windows."""
    cases = {
        "128 steps, batch 64, 1 window": (8, 64, "1"),
        "256 steps": (16, 64, "1"),
        "512 steps": (32, 64, "1"),
        "1024 steps": (64, 64, "1"),
        "batch 128, 256 steps": (32, 128, "1"),
        "batch 256, 256 steps": (64, 256, "1"),
        "256 steps, 8 local windows": (16, 64, "8"),
        "256 steps, 64 local windows": (16, 64, "64"),
        "256 steps, 256 local windows": (16, 64, "256"),
    }
    rows = {}
    for name, (epochs, batch_size, text) in cases.items():
        workload = digits_workload(mlp, 1024, epochs, batch_size=batch_size)
        with tempfile.TemporaryDirectory() as folder:
            trajectory = train(workload, Path(folder) / "t")
            windows = parse_windows(text, trajectory)
            seconds = medians({name: lambda t=trajectory, w=workload, k=windows: track(t, w, k)}, repetitions)[name]
            rows[name] = {"ms": 1000 * seconds, "ms per step": 1000 * seconds / trajectory.num_steps}
    return pd.DataFrame(rows).T


def memory(repetitions: int) -> pd.DataFrame:
    """Added peak memory, and time, with less and less room for states; Adam, 1024 steps."""
    workload = digits_workload(mlp, 1024, 64, adam)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        trajectory = train(workload, Path(folder) / "t", checkpoint_every=0)
        window = parse_windows("1", trajectory)
        state = trajectory.checkpoint(trajectory.num_steps).nbytes
        training = cpu_seconds(plain_training(workload, trajectory))
        scores = {}
        before = psutil.Process().memory_info().rss
        # Least first: what a process once had, it may keep.
        for states in (4, 16, 64, 1100):
            with PeakMemory(before) as peak:
                seconds = cpu_seconds(
                    lambda states=states: scores.update(  # type: ignore[misc]
                        {states: track(trajectory, workload, window, memory_budget=states * state).scores}
                    )
                )
            same = bool((scores[states] == scores[4]).all())
            rows[f"{states} states"] = {
                "budget MiB": states * state / 2**20,
                "peak MiB": peak.bytes / 2**20,
                "times training": seconds / training,
                "same bit for bit": str(same),
            }
    return pd.DataFrame(rows).T


class PeakMemory:
    """Largest resident memory while it is open, above ``before``, in bytes."""

    def __init__(self, before: int) -> None:
        self._before = before

    def __enter__(self) -> PeakMemory:
        self._process, self._done, self.bytes = psutil.Process(), threading.Event(), 0
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watcher.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["multiples", "compiled", "small", "scaling", "memory"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    networks = {
        "MLP 784-256-10": digits_workload(mlp, 1024, 32),
        "MLP 784-256-10, Adam": digits_workload(mlp, 1024, 32, adam),
        "CNN 32-64": digits_workload(cnn, 512, 12),
        "2-layer transformer encoder": digits_workload(Encoder, 512, 12),
        "2-layer transformer encoder, Adam": digits_workload(Encoder, 512, 12, adam),
    }
    to_compile = {
        "784-8-1, SGD": digits_workload(small, 256, 21, lambda model: SGD(model.parameters(), lr=0.05)),
        "MLP 784-256-10": networks["MLP 784-256-10"],
        "MLP 784-256-10, Adam": networks["MLP 784-256-10, Adam"],
        "CNN 32-64": networks["CNN 32-64"],
        "2-layer transformer encoder, no dropout": digits_workload(lambda: Encoder(0.0), 512, 12),
    }
    tables = {
        "multiples": lambda: multiples(networks, options.repetitions),
        "compiled": lambda: compiled_steps(to_compile, options.repetitions),
        "small": lambda: small_network(options.repetitions),
        "scaling": lambda: scaling(options.repetitions),
        "memory": lambda: memory(options.repetitions),
    }
    for name, table in tables.items():
        if options.only in (None, name):
            print(f"\n{name}\n{table().to_string(float_format='{:.2f}'.format)}", flush=True)


if __name__ == "__main__":
    main()
