"""Each method against a plain loop, a dense reference or a published identity."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from oracles import train_again
from torch import nn
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import (
    InputError,
    Trajectory,
    UnsupportedError,
    Window,
    Workload,
    leave_one_out,
    parameter_value,
    parse_windows,
    track,
    train,
)
from dit_mlflow import sample_losses as sample_losses_of
from dit_mlflow.methods import NAMES, at_window_end, last_layer, method, sample_gradients
from dit_mlflow.methods.confident_learning import ConfidentLearning, out_of_sample
from dit_mlflow.methods.exact import DitConfirmed
from dit_mlflow.methods.newton_step import InfluenceFunction
from dit_mlflow.methods.sample_gradients import norms
from dit_mlflow.methods.snapshot import Snapshot
from dit_mlflow.retraining import confirm

GRADIENT_METHODS = [
    *["tracin", "tracin_checkpoints", "grad_dot", "grad_cos", "grad_norm", "source", "dvemb"],
    *["influence_function", "influence_function_lissa", "influence_function_arnoldi", "influence_function_datainf"],
]


def groups(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.1}])


@pytest.fixture
def workload() -> Workload:
    """Labels 0 and 12 are wrong; layers with learning rates of their own."""
    built = digits_workload(optimizer=groups, epochs=4)
    labels = built.train_set.tensors[1]  # type: ignore[attr-defined]
    labels[[0, 12]] = (labels[[0, 12]] + 1) % 3
    return built


@pytest.fixture
def trajectory(workload: Workload, tmp_path: Any) -> Trajectory:
    return train(workload, tmp_path / "t")


def model_at(workload: Workload, trajectory: Trajectory, t: int) -> nn.Module:
    return train_again(workload, trajectory, lambda step, i: 1.0, t)


def gradient(workload: Workload, model: nn.Module, sample: int | None) -> torch.Tensor:
    """Of one training sample's loss, or of the mean validation loss; by layer, flat."""
    chosen = workload.batch([sample]) if sample is not None else workload.validation_set.tensors  # type: ignore
    inputs, targets = chosen
    value = workload.loss(model, (inputs.double(), targets)).mean()
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))])


def rates(model: nn.Module) -> torch.Tensor:
    return torch.cat([torch.full((p.numel(),), 0.5 if k < 2 else 0.1) for k, p in enumerate(model.parameters())])


@pytest.mark.parametrize("window", [Window(0, 12), Window(2, 7)])
def test_tracin_is_the_sum_over_recorded_steps(workload: Workload, trajectory: Trajectory, window: Window) -> None:
    expected = np.zeros(workload.num_samples)
    for t in range(window.start, window.end):
        model = model_at(workload, trajectory, t)
        query = rates(model) * gradient(workload, model, None)
        for sample in trajectory.step(t).samples:
            expected[sample] += float(gradient(workload, model, int(sample)) @ query) / 8
    found = method("tracin")(trajectory, workload, [window])
    assert found.kind == "none"
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-3, atol=1e-6)


def test_tracin_is_dit_for_a_window_of_one_step(workload: Workload, trajectory: Trajectory) -> None:
    """But for where the query is asked, before the step or after it: so a query that is linear in the parameters."""
    queries = [parameter_value("0.weight", 2, 20), parameter_value("2.bias", 1)]
    windows = [Window(5, 6)]
    expected = track(trajectory, workload, windows, queries=queries)
    found = method("tracin")(trajectory, workload, windows, queries=queries)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-8)


def test_tracin_over_checkpoints(workload: Workload, trajectory: Trajectory) -> None:
    assert trajectory.checkpoint_steps == (0, 1, 4, 9, 12)
    found = method("tracin_checkpoints")(trajectory, workload, [Window(1, 9), Window(5, 8)])
    expected = np.zeros(workload.num_samples)
    for t in (1, 4):
        model = model_at(workload, trajectory, t)
        query = rates(model) * gradient(workload, model, None)
        expected += [float(gradient(workload, model, i) @ query) / 24 for i in range(24)]
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-3, atol=1e-6)
    assert np.isnan(found.of(1)).all()


@pytest.mark.parametrize("name", ["grad_dot", "grad_cos", "grad_norm", "loss"])
def test_methods_at_a_windows_end(name: str, workload: Workload, trajectory: Trajectory) -> None:
    found = method(name)(trajectory, workload, [Window(0, 5), Window(5, 12)])
    for k, end in enumerate((5, 12)):
        model = model_at(workload, trajectory, end)
        query = gradient(workload, model, None)
        own = [gradient(workload, model, i) for i in range(24)]
        inputs, targets = workload.train_set.tensors  # type: ignore[attr-defined]
        expected = {
            "grad_dot": [float(g @ query) for g in own],
            "grad_cos": [float(torch.cosine_similarity(g, query, dim=0)) for g in own],
            "grad_norm": [-float(g.norm()) for g in own],
            "loss": (-workload.loss(model, (inputs.double(), targets))).tolist(),
        }[name]
        np.testing.assert_allclose(found.of(k), expected, rtol=1e-3, atol=1e-5)


def test_an_angle_that_cannot_be_had_is_not_a_right_angle(
    workload: Workload, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gradients 0 and NaN, the first alone scores 0."""
    expected = method("grad_cos")(trajectory, workload).of(0)
    expected[[3, 5]] = 0, np.nan

    def lengths(snapshot: Snapshot) -> np.ndarray:
        found = norms(snapshot)
        found[[3, 5]] = 0, np.nan
        return found

    monkeypatch.setattr(at_window_end, "norms", lengths)
    np.testing.assert_array_equal(method("grad_cos")(trajectory, workload).of(0), expected)


def partly_frozen() -> nn.Module:
    model = digits_model()
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    return model


def trained_only(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_frozen_parameters_do_not_count_even_if_the_optimizer_holds_them(name: str, tmp_path: Any) -> None:
    workload = digits_workload(model=partly_frozen)
    left_out = digits_workload(model=partly_frozen, optimizer=trained_only)
    found, expected = (
        method(name)(train(each, tmp_path / str(k)), each).scores for k, each in enumerate((workload, left_out))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    model = model_at(workload, train(workload, tmp_path / "t"), 9)
    if name == "grad_norm":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        (inputs, targets) = workload.train_set.tensors  # type: ignore[attr-defined]
        losses = workload.loss(model, (inputs.double(), targets))
        own = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in losses]
        norms = [-float(torch.cat([part.flatten() for part in parts]).norm()) for parts in own]
        np.testing.assert_allclose(found[0, 0], norms, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in GRADIENT_METHODS if name != "grad_norm"])
def test_a_query_that_depends_on_nothing_trained_is_refused(name: str, tmp_path: Any) -> None:
    workload = digits_workload(model=partly_frozen, optimizer=trained_only, epochs=1)
    with pytest.raises(InputError, match="does not depend on the trained parameters"):
        method(name)(train(workload, tmp_path / "t"), workload, queries=[parameter_value("0.weight", 0, 20)])


class Labelled(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples as dicts, with a tensor in each batch that is not one row per sample."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(zip(("inputs", "labels"), self.base[index], strict=True))


def with_shared_weights(samples: list[Any]) -> dict[str, torch.Tensor]:
    return {**torch.utils.data.default_collate(samples), "weights": torch.linspace(1, 2, 3)}


def dict_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    outputs = model(batch["inputs"])
    return nn.functional.cross_entropy(outputs, batch["labels"], batch.get("weights"), reduction="none")


def one_at_a_time(model: nn.Module, batch: Any) -> torch.Tensor:
    """Control flow that depends on data."""
    return torch.stack([loss * 2 if loss > 1 else loss for loss in sample_losses(model, batch)])


@pytest.mark.parametrize("case", ["dicts", "shared", "control flow"])
def test_norms_are_the_same_side_by_side_and_one_by_one(
    case: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_set, validation_set = (Labelled(part) for part in datasets())
    dicts = {"train_set": train_set, "validation_set": validation_set, "loss": dict_loss}
    changes: dict[str, Any] = {
        "dicts": dicts,
        "shared": {**dicts, "collate_fn": with_shared_weights},
        "control flow": {"loss": one_at_a_time},
    }[case]
    workload = digits_workload(epochs=1, **changes)
    trajectory = train(workload, tmp_path / "t")
    fallen_back, real = [], sample_gradients._one_by_one
    monkeypatch.setattr(sample_gradients, "_one_by_one", lambda *given: fallen_back.append(1) or real(*given))
    found = method("grad_norm")(trajectory, workload).of(0)
    assert bool(fallen_back) == (case != "dicts")
    model = trajectory.checkpoint(3).load_into(workload.build_model())
    for sample in range(24):
        parts = torch.autograd.grad(workload.loss(model, workload.batch([sample])).sum(), list(model.parameters()))
        norm = float(torch.cat([part.flatten() for part in parts]).norm())
        np.testing.assert_allclose(found[sample], -norm, rtol=1e-4)


def dense_hessian(workload: Workload, model: nn.Module, samples: Any = None) -> torch.Tensor:
    """Of the mean loss of some training samples, default: all."""
    names, values = zip(*model.named_parameters(), strict=True)
    sizes = [value.numel() for value in values]
    inputs, targets = workload.batch(range(workload.num_samples) if samples is None else samples)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {n: p.reshape(v.shape) for n, p, v in zip(names, flat.split(sizes), values, strict=True)}
        outputs = torch.func.functional_call(model, parts, (inputs.double(),))
        return nn.functional.cross_entropy(outputs, targets)

    flat = torch.cat([value.detach().flatten() for value in values])
    return torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-any-return]


def test_influence_function_is_the_dense_newton_step(workload: Workload, trajectory: Trajectory) -> None:
    found = method("influence_function")(trajectory, workload)
    model = model_at(workload, trajectory, 12)
    hessian = dense_hessian(workload, model)
    damped = hessian + found.metadata["damping"] * torch.eye(len(hessian))
    solution = torch.linalg.solve(damped, gradient(workload, model, None))
    expected = [float(gradient(workload, model, i) @ solution) / 24 for i in range(24)]
    np.testing.assert_allclose(found.of(0), expected, rtol=2e-2, atol=1e-4 * np.abs(expected).max())


def test_influence_function_with_a_regularizer_where_the_optimizer_holds_a_part(tmp_path: Any) -> None:
    workload = digits_workload(
        optimizer=lambda model: torch.optim.SGD(model[2].parameters(), lr=0.5),  # type: ignore[index]
        regularizer=lambda model: 0.05 * sum(p.square().sum() for p in model.parameters()),
    )
    trajectory = train(workload, tmp_path / "t")
    found = method("influence_function")(trajectory, workload)
    model = model_at(workload, trajectory, trajectory.num_steps)
    held = slice(sum(p.numel() for p in model[0].parameters()), None)  # type: ignore[index]
    hessian = dense_hessian(workload, model)[held, held]
    damped = hessian + (found.metadata["damping"] + 0.1) * torch.eye(len(hessian))
    solution = torch.linalg.solve(damped, gradient(workload, model, None)[held])
    expected = [float(gradient(workload, model, i)[held] @ solution) / 24 for i in range(24)]
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    assert found.metadata["residual"] < 1e-4


def test_influence_function_raises_its_damping_or_refuses(workload: Workload, trajectory: Trajectory) -> None:
    curvature = float(torch.linalg.eigvalsh(dense_hessian(workload, model_at(workload, trajectory, 12)))[0])
    assert curvature < 0
    found = InfluenceFunction(damping=-curvature / 20)(trajectory, workload)
    assert found.metadata["damping"] >= -curvature / 2
    model = model_at(workload, trajectory, 12)
    damped = dense_hessian(workload, model) + found.metadata["damping"] * torch.eye(len(gradient(workload, model, 0)))
    solution = torch.linalg.solve(damped, gradient(workload, model, None))
    expected = [float(gradient(workload, model, i) @ solution) / 24 for i in range(24)]
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(UnsupportedError, match="damping up to"):
        InfluenceFunction(damping=-curvature / 20, attempts=1, max_iterations=5000, tolerance=1e-10)(
            trajectory, workload
        )


def test_sgd_influence_is_its_recursion_over_the_whole_run(workload: Workload, trajectory: Trajectory) -> None:
    """With dense Hessians of each step's batch."""
    expected = np.zeros(workload.num_samples)
    adjoint = gradient(workload, model_at(workload, trajectory, 12), None)
    for t in range(12)[::-1]:
        model, samples = model_at(workload, trajectory, t), trajectory.step(t).samples
        kick = rates(model) * adjoint
        for sample in samples:
            expected[sample] += float(kick @ gradient(workload, model, int(sample))) / 8
        adjoint = adjoint - dense_hessian(workload, model, samples) @ kick
    found = method("sgd_influence")(trajectory, workload, parse_windows("3", trajectory))
    assert found.windows == (Window(0, 12),)
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-3, atol=1e-6)


def test_self_influence_is_minus_the_sweeps_own(workload: Workload, trajectory: Trajectory) -> None:
    windows = parse_windows("2", trajectory)
    found = method("self_influence")(trajectory, workload, windows, "final").scores[:, 0]
    queries = sample_losses_of(workload, of="training")
    expected = track(trajectory, workload, windows, "final", queries).scores
    np.testing.assert_allclose(found, -np.diagonal(expected, axis1=1, axis2=2), rtol=1e-4, atol=1e-7)


class MomentumLater(torch.optim.lr_scheduler.LRScheduler):
    """No momentum in the first step."""

    def get_lr(self) -> list[float]:
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.9 if self.last_epoch else 0.0
        return [0.1]


@pytest.mark.parametrize(
    ("used", "changes"),
    [
        ("SGD and clipped gradients", {"clip_grad_norm": 1.0}),
        ("Adam", {"optimizer": lambda model: torch.optim.Adam(model.parameters())}),
        ("SGD and momentum", {"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}),
        ("SGD and momentum", {"scheduler": MomentumLater}),
    ],
)
def test_sgd_influence_is_refused_for_other_training(used: str, changes: dict[str, Any], tmp_path: Any) -> None:
    workload = digits_workload(epochs=1, **changes)
    with pytest.raises(UnsupportedError, match=f"plain SGD; the training used {used}. Use dit"):
        method("sgd_influence")(train(workload, tmp_path / "t"), workload)


def test_margins_and_forgetting_are_those_of_the_training_itself(workload: Workload, trajectory: Trajectory) -> None:
    window = Window(3, 12)
    margins: list[list[float]] = [[] for _ in range(24)]
    inside = np.zeros((24, 12))
    for t in range(12):
        model = model_at(workload, trajectory, t)
        samples = trajectory.step(t).samples
        inputs, targets = workload.batch(samples)
        for sample, row, label in zip(samples, model(inputs.double()).tolist(), targets.tolist(), strict=True):
            margins[sample].append(row[label] - max(value for k, value in enumerate(row) if k != label))
            inside[sample, len(margins[sample]) - 1] = t in window
    area, forgotten = [], []
    for sample, values in enumerate(margins):
        counted = inside[sample, : len(values)].astype(bool)
        area.append(np.mean(np.array(values)[counted]))
        lost = sum(a > 0 >= b for a, b, c in zip(values, values[1:], counted[1:], strict=False) if c)
        forgotten.append(-lost if max(values) > 0 else -(len(values) + 1))
    np.testing.assert_allclose(method("aum")(trajectory, workload, [window]).of(0), area, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(method("forgetting_events")(trajectory, workload, [window]).of(0), forgotten)
    assert len(set(forgotten)) > 1


def test_out_of_sample_probabilities_come_from_models_that_never_saw_the_sample(
    workload: Workload, trajectory: Trajectory
) -> None:
    labels, found = out_of_sample(trajectory.replay(workload), folds=3, seed=0)
    inputs, targets = workload.train_set.tensors  # type: ignore[attr-defined]
    np.testing.assert_array_equal(labels, targets)
    from sklearn.model_selection import StratifiedKFold

    for _, fold in StratifiedKFold(3, shuffle=True, random_state=0).split(labels, labels):
        held_out = set(fold.tolist())
        model = train_again(workload, trajectory, lambda t, i, out=held_out: float(i not in out), 12)  # type: ignore
        expected = model(inputs[fold].double()).softmax(dim=1).detach()
        np.testing.assert_allclose(found[fold], expected, rtol=1e-4, atol=1e-6)


def test_out_of_sample_probabilities_are_asked_for_in_parts_of_those_held_out(
    workload: Workload, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = out_of_sample(trajectory.replay(workload), folds=3, seed=0)[1]
    monkeypatch.setattr(last_layer, "FEATURES_PER_PASS", 5)
    asked = []

    def outputs(model: nn.Module, batch: Any) -> torch.Tensor:
        asked.append(len(batch[0]))
        return model(batch[0])  # type: ignore[no-any-return]

    watched = replace(workload, outputs=outputs)
    found = out_of_sample(trajectory.replay(watched), folds=3, seed=0)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert max(asked) <= 5
    assert sum(asked) == 24 + 24  # for the labels, and each sample once by a model that never saw it


@pytest.mark.parametrize("settings", [{"folds": 1}, {"folds": 0}, {"seed": -1}])
def test_confident_learning_needs_parts(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected 2 parts or more"):
        ConfidentLearning(**settings)


@pytest.mark.parametrize("name", ["loss", "aum", "confident_learning", "self_influence", "grad_norm"])
def test_wrong_labels_score_lowest(name: str, workload: Workload, trajectory: Trajectory) -> None:
    scores = method(name)(trajectory, workload).of(0)
    assert {0, 12} <= set(np.argsort(scores)[:4].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_every_method_answers_alike(name: str, workload: Workload, trajectory: Trajectory) -> None:
    found = method(name)(trajectory, workload, parse_windows("2", trajectory), "final")
    assert found.method == name
    assert found.kind in ("final", "none")
    assert found.scores.shape == (2 if method(name).per_window else 1, 1, 24)
    assert found.metadata["measures"] in ("query", "ranking", "suspicion")
    assert np.isfinite(found.scores[0]).all()


def test_a_method_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no method 'dlt'; there are dit, expected, removal, dit_confirmed"):
        method("dlt")


@pytest.mark.parametrize("kind", ["local", "cumulative"])
def test_confirming_replaces_the_largest_scores_by_the_truth(
    kind: Any, workload: Workload, trajectory: Trajectory
) -> None:
    windows = parse_windows("2", trajectory)
    estimate = track(trajectory, workload, windows, kind)
    truth = leave_one_out(trajectory, workload, windows, kind)
    exact = confirm(estimate, trajectory, workload, m=5)
    mixed = DitConfirmed(share=5 / 24, dtype=torch.float64)(trajectory, workload, windows, kind)
    for k in range(2):
        largest = np.sort(np.argsort(-np.abs(estimate.of(k)))[:5])
        rest = np.setdiff1d(np.arange(24), largest)
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(exact.of(k))), largest)
        np.testing.assert_allclose(exact.of(k)[largest], truth.of(k)[largest], rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(mixed.of(k)[largest], truth.of(k)[largest], rtol=1e-9, atol=1e-14)
        np.testing.assert_array_equal(mixed.of(k)[rest], estimate.of(k)[rest])
    with pytest.raises(InputError, match="m=25 samples to confirm"):
        confirm(estimate, trajectory, workload, m=25)


def test_confirming_answers_the_query_that_was_asked(workload: Workload, trajectory: Trajectory) -> None:
    asked = sample_losses_of(workload, [3])
    windows = parse_windows("2", trajectory)
    estimate = track(trajectory, workload, windows, queries=asked)
    truth = leave_one_out(trajectory, workload, windows, queries=asked)
    exact = confirm(estimate, trajectory, workload, m=5, queries=asked)
    assert exact.queries == ("loss of validation sample 3",)
    for k in range(2):
        largest = np.sort(np.argsort(-np.abs(estimate.of(k)))[:5])
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(exact.of(k))), largest)
        np.testing.assert_allclose(exact.of(k)[largest], truth.of(k)[largest], rtol=1e-9, atol=1e-14)
    for queries, other in ((None, "mean_validation_loss"), (sample_losses_of(workload, [4]), "sample 4")):
        with pytest.raises(InputError, match=f"are of the query 'loss of validation sample 3'.* be of .*{other}'"):
            confirm(estimate, trajectory, workload, m=5, queries=queries)


def test_confirming_a_method_without_kinds_needs_one_for_parts_of_training(
    workload: Workload, trajectory: Trajectory
) -> None:
    windows = parse_windows("2", trajectory)
    estimate = method("tracin")(trajectory, workload, windows)
    with pytest.raises(InputError, match=r"tracin has no kind of window score.*give confirm\(kind=...\)"):
        confirm(estimate, trajectory, workload, m=5)
    truth = leave_one_out(trajectory, workload, windows, "final")
    exact = confirm(estimate, trajectory, workload, m=24, kind="final")
    assert exact.kind == "final"
    np.testing.assert_allclose(exact.scores, truth.scores, rtol=1e-9, atol=1e-14)
    with pytest.raises(InputError, match="kind='local' to confirm scores of kind 'final'"):
        confirm(truth, trajectory, workload, m=5, kind="local")
    whole = confirm(method("grad_dot")(trajectory, workload), trajectory, workload, m=24)
    for kind in ("local", "final", "cumulative"):
        truth = leave_one_out(trajectory, workload, [Window(0, 12)], kind)  # type: ignore[arg-type]
        np.testing.assert_allclose(whole.scores, truth.scores, rtol=1e-9, atol=1e-14)


def test_a_sample_confirmed_for_one_query_is_exact_for_all(
    workload: Workload, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = sample_losses_of(workload, range(6))
    windows = parse_windows("2", trajectory)
    estimate, truth = (ask(trajectory, workload, windows, queries=queries).scores for ask in (track, leave_one_out))
    confirmation = import_module("dit_mlflow.retraining.leave_one_out")
    made, real = [], confirmation.retrain
    monkeypatch.setattr(confirmation, "retrain", lambda q, left, *rest: made.append(len(left)) or real(q, left, *rest))
    found = DitConfirmed(share=3 / 24, dtype=torch.float64)(trajectory, workload, windows, queries=queries)
    for k in range(2):
        union = np.unique(np.argsort(-np.abs(estimate[k]), axis=1)[:, :3])
        rest = np.setdiff1d(np.arange(24), union)
        assert 3 < len(union) < 18
        np.testing.assert_allclose(found.scores[k][:, union], truth[k][:, union], rtol=1e-9, atol=1e-14)
        np.testing.assert_array_equal(found.scores[k][:, rest], estimate[k][:, rest])
        assert found.metadata["confirmed"][k] == made[k] == len(union)
    assert len(made) == 2
