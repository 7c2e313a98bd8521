"""The diffusion project: the published process, draws that replay, influence against differences and leaving out."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from dit_mlflow import Trajectory, Workload, WorkloadError, leave_one_out, load_workload, parse_windows, track, train
from dit_mlflow.workload.random_state import preserved_random_state

REPOSITORY = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "n_train": 12,
    "n_validation": 6,
    "n_test": 5,
    "hidden": 8,
    "epochs": 3,
    "batch_size": 4,
    "lr": 1,
}


@pytest.fixture
def workload() -> Workload:
    return load_workload("projects/diffusion", **SMALL)


@pytest.fixture
def trajectory(workload: Workload, tmp_path: Path) -> Trajectory:
    return train(workload, tmp_path / "t")


def kept(timesteps: int) -> list[float]:
    """``a_n``, as a plain product."""
    product, found = 1.0, []
    for n in range(timesteps):
        product *= 1 - (0.1 + (20 - 0.1) * n / (timesteps - 1)) / timesteps
        found.append(product)
    return found


class Known(nn.Module):
    """Says of every noisy image that the noise was a half."""

    seen: tuple[torch.Tensor, torch.Tensor]

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        self.seen = noisy, timesteps
        return torch.full_like(noisy, 0.5)


def test_noising_and_loss_by_hand(workload: Workload) -> None:
    images, timesteps, noise = batch = workload.batch([0, 5, 7])
    assert (timesteps * 8 // 100).tolist() == [list(range(8))] * 3
    model = Known().eval()
    found = workload.loss(model, batch)
    torch.testing.assert_close(found, (noise - 0.5).square().mean(dim=(1, 2)))
    noisy, asked = model.seen
    for row in range(24):
        sample, draw = divmod(row, 8)
        n = int(timesteps[sample, draw])
        assert int(asked[row]) == n
        a = kept(100)[n]
        expected = a**0.5 * images[sample] + (1 - a) ** 0.5 * noise[sample, draw]
        torch.testing.assert_close(noisy[row], expected, rtol=1e-5, atol=1e-6)
    # Ho et al. begin with nearly the image and end with nearly noise alone.
    assert kept(1000)[0] == pytest.approx(1 - 1e-4) and kept(1000)[-1] == pytest.approx(4.04e-5, rel=1e-2)


def test_training_draws_anew_and_evaluation_never(workload: Workload) -> None:
    model, batch = workload.build_model(), workload.batch(range(6))
    with preserved_random_state():
        torch.manual_seed(4)
        first, second = workload.loss(model, batch), workload.loss(model, batch)
        torch.manual_seed(4)
        again = workload.loss(model, batch)
        drawn = torch.randint(100, (6,)), torch.randn(6, 64)
        torch.manual_seed(4)
        known = Known()
        losses = workload.loss(known, batch)
        torch.manual_seed(4)
        timesteps, noise = torch.randint(100, (6,)), torch.randn(6, 64)
        before = torch.get_rng_state()
        fixed = [workload.loss(model.eval(), batch) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0].shape == timesteps.shape
    assert torch.equal(first, again)
    assert not torch.isclose(first, second).any()
    assert torch.equal(known.seen[1], timesteps)
    torch.testing.assert_close(losses, (noise - 0.5).square().mean(dim=1))
    assert torch.equal(*fixed)


def test_images_are_those_of_scikit_learn() -> None:
    workload = load_workload("projects/diffusion", corrupt=0.25, **SMALL)
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(1797)[:12]
    images = workload.train_set.tensors[0].numpy()  # type: ignore[attr-defined]
    assert len(workload.corrupted) == 3
    for index in range(12):
        clean = pixels[order[index]] / 8 - 1
        assert np.allclose(images[index], clean, atol=1e-5) == (index not in workload.corrupted)
        assert workload.label_of(index) == str(labels[order[index]])
        assert workload.describe is not None
        noisy = " (noisy image)" if index in workload.corrupted else ""
        assert workload.describe(index) == f"digit {labels[order[index]]}{noisy}"
        shown = workload.appearance(index)
        np.testing.assert_allclose(shown, (images[index].reshape(8, 8) / 2 + 0.5).clip(0, 1), atol=1e-6)
    again = load_workload("projects/diffusion", **workload.settings)
    for part in ("train_set", "validation_set", "test_set"):
        assert all(map(torch.equal, getattr(workload, part).tensors, getattr(again, part).tensors))


def validation_loss_by_hand(workload: Workload, trajectory: Trajectory, sample: int, weight: float) -> float:
    """After a plain float64 loop that draws timesteps and noise from the recorded states, and nothing from replay."""
    model = trajectory.checkpoint(0).load_into(workload.build_model()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    table = torch.tensor(kept(100), dtype=torch.float64)
    for t in range(trajectory.num_steps):
        step = trajectory.step(t)
        (state,), images = step.random_states, workload.batch(step.samples)[0].double()
        assert state is not None
        state.restore()
        timesteps, noise = torch.randint(100, (len(images),)), torch.randn(len(images), 64).double()
        a = table[timesteps][:, None]
        losses = (noise - model(a.sqrt() * images + (1 - a).sqrt() * noise, timesteps)).square().mean(dim=1)
        weights = torch.tensor([weight if i == sample else 1.0 for i in step.samples], dtype=torch.float64)
        optimizer.zero_grad()
        (weights * losses / len(images)).sum().backward()
        optimizer.step()
    images, timesteps, noise = workload.validation_set.tensors  # type: ignore[attr-defined]
    total = 0.0
    for draw in range(timesteps.shape[1]):
        a = table[timesteps[:, draw]][:, None]
        noisy = a.sqrt() * images.double() + (1 - a).sqrt() * noise[:, draw]
        total += float((noise[:, draw] - model(noisy, timesteps[:, draw])).square().mean().detach())
    return total / timesteps.shape[1]


def test_the_sweep_is_the_central_difference_and_leave_one_out_the_removal(
    workload: Workload, trajectory: Trajectory
) -> None:
    assert trajectory.verify(workload).max_drift == 0
    whole = parse_windows("1", trajectory)
    swept, removed = (
        found(trajectory, workload, whole, dtype=torch.float64).of(0)  # type: ignore[operator]
        for found in (track, leave_one_out)
    )
    h = 1e-4
    with preserved_random_state():
        recorded = validation_loss_by_hand(workload, trajectory, 0, 1.0)
        for sample in range(0, 12, 3):
            less, more = (validation_loss_by_hand(workload, trajectory, sample, w) for w in (1 - h, 1 + h))
            np.testing.assert_allclose(swept[sample], (less - more) / (2 * h), rtol=1e-5, atol=1e-10)
            without = validation_loss_by_hand(workload, trajectory, sample, 0.0)
            np.testing.assert_allclose(removed[sample], without - recorded, rtol=1e-7, atol=1e-12)
    assert spearmanr(swept, removed).statistic > 0.95


def test_retraining_side_by_side_draws_what_was_recorded(
    workload: Workload, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_mlflow.retraining.counterfactuals import Retraining

    found = []
    for together in (True, False):
        monkeypatch.setattr(Retraining, "_prefer_side_by_side", lambda self, *args, chosen=together: chosen)
        found.append(leave_one_out(trajectory, workload, parse_windows("2", trajectory)).scores)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": 20}, "timesteps is 20; expected 21 or more"),
        ({"draws": 0}, "draws is 0; expected 1 or more"),
        ({"draws": 101}, "draws is 101; expected at most one for each of the 100 timesteps"),
        ({"hidden": 0}, "hidden is 0; expected 1 or more"),
        ({"n_train": 0}, "n_train is 0"),
        ({"n_train": 1797}, "there are 1797 digits"),
        ({"corrupt": 1.5}, "corrupt is 1.5; expected a share"),
        ({"optimizer": "lion"}, "setting optimizer='lion'"),
        ({"momentum": 0.9, "optimizer": "adam"}, "belongs to optimizer=sgd"),
        ({"steps": 3}, "has no setting 'steps'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((WorkloadError, ValueError), match=message):
        load_workload("projects/diffusion", **settings)


def test_the_script_measures_what_was_drawn(
    trajectory: Trajectory, workload: Workload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Timesteps and norms against those of the recorded generator, presentation by presentation."""
    script = str(REPOSITORY / "projects" / "diffusion" / "bias.py")
    names = runpy.run_path(script)
    shown = names["presentations"](trajectory, workload)
    model = trajectory.checkpoint(0).load_into(workload.build_model())
    step = trajectory.step(0)
    (state,), images = step.random_states, workload.batch(step.samples)[0]
    assert state is not None
    with preserved_random_state():
        state.restore()
        timesteps, noise = torch.randint(100, (4,)), torch.randn(4, 64)
    assert shown.sample[:4].tolist() == step.samples.tolist()
    assert shown.timestep_bin[:4].tolist() == (timesteps // 10).tolist()
    for row in range(4):
        a = kept(100)[int(timesteps[row])]
        noisy = a**0.5 * images[row] + (1 - a) ** 0.5 * noise[row]
        loss = (noise[row] - model(noisy[None], timesteps[row, None])[0]).square().mean()
        parts = torch.autograd.grad(loss, list(model.parameters()))
        norm = float(torch.cat([part.flatten() for part in parts]).norm())
        assert shown.norm[row] == pytest.approx(norm, rel=1e-4)
    size = ["n_train=16", "n_validation=12", "n_test=0", "epochs=10", "batch_size=8", "hidden=4"]
    monkeypatch.setattr(sys, "argv", [script, "--seeds", "1", "--set", *size])
    runpy.run_path(script, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    for window in ("whole run", "fifths", "single epochs"):
        assert sum(line.startswith(f"| {window}, ") for line in lines) == 4
    assert any(line.startswith("| whole run, leave_one_out") and "| 1.00 (1.00 to 1.00) |" in line for line in lines)
