"""Compare ``dit_mlflow.track`` with other attribution libraries on the same small trainings.

``python benchmarks/peers.py`` trains MLP 784-256-10 and a CNN 32-64 on 256 of MNIST's digits (10 classes, batches of
64, SGD) and prints a table for each. Every method answers one question, the influence of each training sample on mean
validation loss over the whole training, and gets the same initial weights and batches. Columns:

- record s: CPU seconds of all that is done before the query is known: training, and what the method keeps of it
- query s: CPU seconds of the scores of all samples for one query
- record x, query x: these two as multiples of plain training, which takes turns with them in the same process
- peak MB: what recording and query add to the process's peak resident memory after plain training
- disk MB: files that recording leaves
- pearson, spearman: with exact leave-one-out in float64, of all samples or of a seeded choice

Each method runs in a process of its own on one thread; times are medians after a repetition for warming up.

The peers are optional; what cannot be imported is listed below the table. One environment for all of them, made outside
the repository (bergson without its requirements, of which this needs a part):

    python -m venv peers && . peers/bin/activate && echo torch==2.13.0 > pin.txt && pip install -c pin.txt torch -e .
    pip install -c pin.txt captum==0.9.0 dattri==0.3.0 && pip install --no-deps bergson==2.5.1
    pip install -c pin.txt torchopt datasets transformers peft simple-parsing jaxtyping natsort ml_dtypes petname psutil

If bergson lives in an environment of its own (with torch, numpy and pandas): ``--bergson-python other/bin/python``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, VALIDATION_SAMPLES, BATCH_SIZE = 256, 64, 64

Batch = tuple[Tensor, Tensor]


def build_model(name: str) -> nn.Sequential:
    """``[B, 784] -> [B, 10]`` logits."""
    if name == "mlp":
        return nn.Sequential(nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 10)),
    )


def sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


@dataclass(frozen=True)
class Training:
    """The training that every method explains: plain SGD, or with momentum, on batches given by sample indices."""

    model: str
    lr: float
    momentum: float
    epochs: int
    data: Batch
    validation: Batch
    start: dict[str, Tensor] = field(default_factory=dict)
    batches: Sequence[Tensor] = ()

    def fresh_model(self) -> nn.Sequential:
        model = build_model(self.model)
        model.load_state_dict(self.start)
        return model

    def batch(self, t: int) -> Batch:
        return self.data[0][self.batches[t]], self.data[1][self.batches[t]]

    def run(self) -> Iterator[nn.Sequential]:
        """Train plainly; yields the model before every step, and after the last."""
        model = self.fresh_model()
        optimizer = SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        for t in range(len(self.batches)):
            yield model
            optimizer.zero_grad()
            sample_losses(model, self.batch(t)).mean().backward()
            optimizer.step()
        yield model

    def run_plainly(self) -> None:
        for _ in self.run():
            pass

    def run_with_checkpoints(self, folder: Path) -> list[str]:
        """The parameters after every epoch, which TracIn needs."""
        paths = []
        for t, model in enumerate(self.run()):
            if t > 0 and t % (len(self.batches) // self.epochs) == 0:
                paths.append(str(folder / f"step-{t}.pt"))
                torch.save(model.state_dict(), paths[-1])
        return paths


Method = Callable[[Training, Path], Iterator[Tensor | None]]
"""A generator function of the training and an empty folder. It sets up (or raises ImportError), yields, records,
yields, and yields the influence ``[SAMPLES]`` on mean validation loss, positive = helpful."""


def dit(training: Training, folder: Path, windows: str = "1", left_out: int = 0) -> Iterator[Tensor | None]:
    """The sweep, or exact leave-one-out of ``left_out`` samples. ``final`` windows add up to the whole training."""
    from dit_mlflow import Trajectory, Workload, leave_one_out, parse_windows, track, train

    workload = Workload(
        model=partial(build_model, training.model),
        loss=sample_losses,
        train_set=TensorDataset(*training.data),
        validation_set=TensorDataset(*training.validation),
        optimizer=lambda model: SGD(model.parameters(), lr=training.lr, momentum=training.momentum),
        batch_size=BATCH_SIZE,
        epochs=training.epochs,
    )
    yield None
    train(workload, folder / "trajectory")
    yield None
    trajectory = Trajectory.open(folder / "trajectory")
    chosen = parse_windows(windows, trajectory)
    if left_out == 0:
        influence = track(trajectory, workload, chosen, "final")
    else:
        influence = leave_one_out(trajectory, workload, chosen, "final", samples=left_out)
    yield torch.from_numpy(influence.scores[:, 0].sum(axis=0))


class WeightedLoss(nn.Module):
    """A module that returns the loss, as bergson trains it. Its inputs must include a matrix named ``input_ids``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        return (weights * sample_losses(self.network, (input_ids, classes))).mean()


class WeightedStream:
    """Batches for bergson: by step, each sample with a weight by which training is differentiated."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.weights = torch.ones(SAMPLES, requires_grad=True)

    def __len__(self) -> int:
        return len(self.training.batches)

    def __getitem__(self, t: int) -> dict[str, Tensor]:
        inputs, classes = self.training.batch(t)
        return {"input_ids": inputs, "classes": classes, "weights": self.weights[self.training.batches[t]]}


def bergson(training: Training, folder: Path) -> Iterator[Tensor | None]:
    """Reverse-mode differentiation of the training by the samples' weights, between bergson's own checkpoints."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    model, stream = WeightedLoss(training.fresh_model()), WeightedStream(training)
    trainer, state = Trainer.initialize(model, torchopt.sgd(training.lr, momentum=training.momentum))
    yield None
    state = trainer.train(state, stream, inplace=True, save_dir=str(folder))
    yield None
    with state.activate(model) as parameters:
        loss = model(*training.validation, torch.ones(VALIDATION_SAMPLES))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    moments = [torch.zeros_like(leaf) for leaf in torchopt.pytree.tree_leaves(state.opt_state)]
    adjoint = BackwardState(dict(zip(parameters, gradients, strict=True)), moments, torch.zeros(SAMPLES))
    adjoint = trainer.backward(str(folder), stream, adjoint, state.detach_(), cleanup=False, inplace=True)
    yield -adjoint.weight_grads


def batched(data: Batch) -> DataLoader[Batch]:
    return DataLoader(TensorDataset(*data), batch_size=BATCH_SIZE)


def dattri_tracin(training: Training, folder: Path) -> Iterator[Tensor | None]:
    """``TracInAttributor`` with the checkpoint after every epoch, without its default projection to 512 numbers."""
    from dattri.algorithm import TracInAttributor
    from dattri.task import AttributionTask

    model = training.fresh_model()
    yield None
    paths = training.run_with_checkpoints(folder)
    yield None
    attributor = TracInAttributor(
        AttributionTask(partial(functional_loss, model), model, paths),
        weight_list=torch.full((len(paths),), training.lr / BATCH_SIZE),
        normalized_grad=False,
        projector_kwargs={"proj_type": "identity"},
    )
    yield attributor.attribute(batched(training.data), batched(training.validation)).mean(dim=1)


def functional_loss(model: nn.Module, parameters: dict[str, Tensor], sample: Batch) -> Tensor:
    """The loss of one sample, as dattri maps it over a batch."""
    return cross_entropy(functional_call(model, parameters, sample[0][None]), sample[1][None])


def module_loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The mean loss of a batch, as dattri wants it to hook linear layers."""
    return sample_losses(model, batch).mean()


def dattri_dvemb(training: Training, folder: Path, dimension: int = 1024) -> Iterator[Tensor | None]:
    """``DVEmbAttributor``: gradients of linear layers per sample and step, their outer products for the Hessian.

    It assumes plain SGD. It holds a square matrix of the gradients' size, so they are projected, as in its paper.
    """
    from dattri.algorithm import DVEmbAttributor
    from dattri.task import AttributionTask

    yield None
    for t, model in enumerate(training.run()):
        if t == 0:
            task = AttributionTask(module_loss, model, {})
            attributor = DVEmbAttributor(task, dimension, factorization_type="kronecker")
        if t < len(training.batches):
            epoch = t * training.epochs // len(training.batches)
            attributor.cache_gradients(epoch, training.batch(t), training.batches[t], training.lr)
    attributor.cache()
    yield None
    yield attributor.attribute(batched(training.validation)).mean(dim=1)


def captum_tracin(training: Training, folder: Path, fast: bool = False) -> Iterator[Tensor | None]:
    """``TracInCP`` with the checkpoint after every epoch; ``fast``: ``TracInCPFast``, of the last layer alone."""
    from captum.influence import TracInCP, TracInCPFast

    def load(model: nn.Module, path: str) -> float:
        model.load_state_dict(torch.load(path))
        return training.lr / BATCH_SIZE

    yield None
    paths = training.run_with_checkpoints(folder)
    yield None
    model, data, loss = training.fresh_model(), TensorDataset(*training.data), nn.CrossEntropyLoss(reduction="sum")
    if fast:
        last = TracInCPFast(model, model[-1], data, paths, load, loss, BATCH_SIZE)
        yield last.influence(training.validation).mean(dim=0)
    else:
        every = TracInCP(model, data, paths, load, None, loss, BATCH_SIZE, sample_wise_grads_per_batch=True)
        yield every.influence(training.validation, aggregate=True)[0] / VALIDATION_SAMPLES


METHODS: dict[str, Method] = {
    "dit-mlflow": dit,
    "dit-mlflow, a window per epoch": partial(dit, windows="epochs"),
    "bergson magic": bergson,
    "dattri DVEmb, linear layers": dattri_dvemb,
    "dattri TracIn": dattri_tracin,
    "captum TracInCP": captum_tracin,
    "captum TracInCPFast, last layer": partial(captum_tracin, fast=True),
}
TRUTH = "exact leave-one-out"


def set_up(model: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Save the training, on batches and from weights that ``dit_mlflow.train`` drew; the row of the ground truth."""
    from mnist import mnist_digits

    from dit_mlflow import Trajectory

    torch.set_num_threads(1)
    images, digits = mnist_digits()
    order = np.random.default_rng(0).permutation(len(digits))[: SAMPLES + VALIDATION_SAMPLES]
    inputs, classes = torch.from_numpy(images[order] / 255).float(), torch.from_numpy(digits[order]).long()
    data, validation = (inputs[:SAMPLES], classes[:SAMPLES]), (inputs[SAMPLES:], classes[SAMPLES:])
    training = Training(model, options.lr, options.momentum, options.epochs, data, validation)
    recording = dit(training, folder)
    next(recording), next(recording)
    trajectory = Trajectory.open(folder / "trajectory")
    start = trajectory.checkpoint(0).load_into(build_model(model)).state_dict()
    batches = [torch.from_numpy(trajectory.step(t).samples) for t in range(trajectory.num_steps)]
    training = replace(training, start=dict(start), batches=batches)
    torch.save(vars(training), folder / "training.pt")
    return measure(partial(dit, left_out=options.left_out_cnn if model == "cnn" else SAMPLES), training, repetitions=0)


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_megabytes() -> float:
    """Peak resident memory of this process so far (Linux counts in kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(method: Method, training: Training, repetitions: int) -> dict[str, Any]:
    """One row of the table, and the scores."""
    training.run_plainly()
    scores: list[float] = []
    figures = []
    for _ in range(repetitions + 1):
        with tempfile.TemporaryDirectory() as folder:
            phases = method(training, Path(folder))
            next(phases)
            plain, before = cpu_seconds(training.run_plainly), peak_megabytes()
            record = cpu_seconds(partial(next, phases))
            disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
            query = cpu_seconds(lambda phases=phases: scores.extend(next(phases).tolist()))
            figures.append((plain, record, query, disk, peak_megabytes() - before))
    names = ("plain s", "record s", "query s", "disk MB", "peak MB")
    row: dict[str, Any] = dict(zip(names, np.median(figures[1:] or figures, axis=0), strict=True))
    # Later repetitions stay below the first one's peak.
    return row | {"peak MB": figures[0][-1], "scores": scores[:SAMPLES]}


def measure_apart(name: str, python: str, folder: Path, repetitions: int) -> dict[str, Any]:
    """:func:`measure` in a process of its own; if it fails, a row with the error."""
    command = [python, __file__, "--measure", name, str(folder), "--repetitions", str(repetitions)]
    process = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if process.returncode:
        return {"error": (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]}
    return json.loads((folder / name).read_text())


def compare(model: str, options: argparse.Namespace) -> None:
    """Print the table of one model."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        # Set up apart: the peak memory of a process starts at that of the process that made it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows = {TRUTH: pool.submit(set_up, model, options, folder).result()}
        for name in METHODS:
            python = options.bergson_python if name.startswith("bergson") else sys.executable
            rows[name] = measure_apart(name, python, folder, options.repetitions)
    scores = pd.DataFrame({name: row.pop("scores") for name, row in rows.items() if "scores" in row})
    table = pd.DataFrame.from_dict(rows, orient="index")
    for phase in ("record", "query"):
        table[f"{phase} x"] = table[f"{phase} s"] / table["plain s"]
    for kind in ("pearson", "spearman"):
        table[kind] = scores.corrwith(scores[TRUTH], method=kind)
    digits = {"record s": 2, "query s": 2, "record x": 1, "query x": 1, "peak MB": 0, "disk MB": 1}
    digits |= {"pearson": 4, "spearman": 4}
    print(f"\n{model}, {scores[TRUTH].count()} samples left out, plain training {table['plain s'].median():.3f} s")
    print(table[list(digits)].round(digits).to_string(na_rep="-"))
    for name, row in rows.items():
        if "error" in row:
            print(f"{name}: {row['error']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--left-out-cnn", type=int, default=32, help="samples with exact leave-one-out; MLP: all")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--bergson-python", default=sys.executable, help="interpreter that can import bergson")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is None:
        for model in options.models:
            compare(model, options)
        return
    torch.set_num_threads(1)
    name, folder = options.measure
    training = Training(**torch.load(Path(folder) / "training.pt"))
    row = measure(METHODS[name], training, options.repetitions)
    (Path(folder) / name).write_text(json.dumps(row))


if __name__ == "__main__":
    main()
