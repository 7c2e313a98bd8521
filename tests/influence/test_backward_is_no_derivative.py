"""Training whose backward pass is not the derivative of its forward pass, against differences of the loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference, train_again, validation_loss, window_effect
from plain_loop import whole
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import Query, UnsupportedError, Window, expected_influence, leave_one_out, track, train
from dit_mlflow.influence.draws import Draws
from dit_mlflow.methods import method
from dit_mlflow.replay.replay import FEWEST_STATES

SOME = [0, 5, 11]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.round(value * 4) / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return (value > 0).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return gradient / (1 + 5 * value.abs()) ** 2


def halved(value: Tensor) -> Tensor:
    if value.requires_grad:
        value.register_hook(lambda gradient: 0.5 * gradient)
    return value


class Through(nn.Module):
    """A network with something in its middle."""

    def __init__(self, middle: Any) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))
        self.middle = middle

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outer(self.middle(self.inner(inputs)))


class TwoHeads(nn.Module):
    """Domain-adversarial: a second head that the body is to deceive."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.domain = nn.Linear(64, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(inputs)))


def deceived(model: Any, batch: Any) -> Tensor:
    inner = torch.tanh(model.body(batch[0]))
    domain = model.domain(Reversed.apply(inner))
    found = cross_entropy(domain, (batch[1] == 0).long(), reduction="none")
    return cross_entropy(model.head(inner), batch[1], reduction="none") + found


def hooked() -> nn.Module:
    model = digits_model()
    model[1].register_full_backward_hook(lambda module, inputs, outputs: tuple(0.5 * part for part in inputs))
    return model


class Tied(nn.Module):
    """Pixels as words, scored by the same table, whose padding row the embedding's backward pass leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(17, 4, padding_idx=0)
        self.body = nn.Linear(64 * 4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.words((16 * inputs).long()).flatten(1)))
        return (hidden @ self.words.weight.T)[:, :3]


def focal(model: nn.Module, batch: Any) -> Tensor:
    loss = sample_losses(model, batch)
    return (1 - torch.exp(-loss)).detach() ** 2 * loss


def bootstrapped(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    soft = 0.5 * logits.softmax(dim=1).detach() + 0.5 * nn.functional.one_hot(batch[1], 3)
    return -(soft * log_softmax(logits, dim=1)).sum(dim=1)


def balanced(model: nn.Module, batch: Any) -> Tensor:
    """Two losses, of one size."""
    one, other = sample_losses(model, batch), model(batch[0]).square().mean(dim=1)
    return one + other * (one / other).detach().clamp(max=10)


def hardest(model: nn.Module, batch: Any) -> Tensor:
    """Another way by turns, by values: the hard samples count double, with a weight that is detached."""
    loss = focal(model, batch)
    hard = loss > loss.mean()
    if hard.sum().item() > 3:
        loss = loss * 1.5
    return loss + torch.zeros_like(loss).masked_scatter(hard, loss[hard])


def penalised(model: nn.Module, batch: Any) -> Tensor:
    """A penalty on gradients: what is swept is a third derivative."""
    inputs = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).logsumexp(dim=1).sum(), inputs, create_graph=True)
    return sample_losses(model, batch) + 0.1 * slope.square().sum(dim=1)


def penalised_by_parameters(model: nn.Module, batch: Any) -> Tensor:
    losses = sample_losses(model, batch)
    slopes = torch.autograd.grad(losses.mean(), [*model.parameters()], create_graph=True)
    return losses + 0.1 * torch.stack([slope.square().sum() for slope in slopes]).sum()


class Below(nn.Module):
    """Normalises by what ``torch.nn.functional`` calls, as some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def forward(self, values: Tensor) -> Tensor:
        found = torch.batch_norm(
            values, self.scale, None, self.mean, self.variance, self.training, 0.1, 1e-5, cudnn_enabled=False
        )
        return torch.layer_norm(found, (6,), self.scale)


def normalised(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), norm, nn.Tanh(), nn.Linear(6, 3))


def quantised(value: Tensor) -> Tensor:
    return value + (torch.round(4 * value) / 4 - value).detach()


CASES: dict[str, dict[str, Any]] = {
    "detached focal weight": {"loss": focal},
    "detached soft target": {"loss": bootstrapped},
    "detached balance": {"loss": balanced},
    "branches and selections by values": {"loss": hardest},
    "gradient reversal": {"model": TwoHeads, "loss": deceived},
    "straight-through, autograd function": {"model": partial(Through, Rounded.apply)},
    "straight-through, detach": {"model": partial(Through, quantised)},
    "surrogate of a spike": {"model": partial(Through, Spike.apply)},
    "hook on an activation": {"model": partial(Through, halved)},
    "hook on a module": {"model": hooked},
    "tied padding row": {"model": Tied},
    "spectral norm": {"model": lambda: nn.Sequential(spectral_norm(nn.Linear(64, 6)), nn.Tanh(), nn.Linear(6, 3))},
    "with dropout": {
        "model": lambda: nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)),
        "loss": focal,
    },
    "with BatchNorm": {
        "model": lambda: nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        "loss": focal,
        "batch_size": 12,
    },
    "with BatchNorm's mean of all batches, of which another share is the last at each step": {
        "model": lambda: nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh(), nn.Linear(6, 3)),
        "loss": focal,
        "batch_size": 12,
    },
    "AdamW, clipping, accumulation, a regularizer": {
        "loss": focal,
        "optimizer": lambda model: AdamW(model.parameters(), lr=0.02),
        "clip_grad_norm": 0.5,
        "accumulate": 2,
        "regularizer": lambda model: 0.01 * sum(p.square().sum() for p in model.parameters()),
    },
    **{
        f"gradient penalty through {norm.__name__}": {
            "model": lambda norm=norm: normalised(norm(6)),
            "loss": penalised,
            "batch_size": 12,
        }
        for norm in (nn.LayerNorm, nn.BatchNorm1d)
    },
    "penalty on gradients by parameters, which the query takes too": {
        "model": lambda: normalised(nn.BatchNorm1d(6)),
        "loss": penalised_by_parameters,
        "batch_size": 12,
    },
    "gradient penalty through kernels called directly": {
        "model": lambda: normalised(Below()),
        "loss": penalised,
        "batch_size": 12,
    },
    "gradient penalty, no running statistics": {
        "model": lambda: normalised(nn.BatchNorm1d(6, track_running_stats=False)),
        "loss": penalised,
        "batch_size": 12,
    },
    "momentum": {"loss": focal, "optimizer": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9)},
}


LONG = {
    "branches and selections by values",
    "detached balance",
    *[case for case in CASES if case.startswith(("gradient penalty", "penalty on", "with BatchNorm's"))][1:],
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in LONG else ()) for case in CASES])
def test_scores_are_those_of_differences(tmp_path: Path, case: str) -> None:
    settings = CASES[case]
    workload = digits_workload(**settings)
    trajectory = train(workload, tmp_path / "t")
    steps = trajectory.num_steps
    for kind, window in (
        ("local", Window(0, steps)),
        ("final", Window(1, steps - 1)),
        ("cumulative", Window(2, steps)),
    ):
        result = track(trajectory, workload, [window], kind=kind, dtype=torch.float64)  # type: ignore[arg-type]
        scores = result.of(0)
        if case == "with dropout":
            # The oracle would draw other masks; leave-one-out draws the recorded ones.
            exact = leave_one_out(trajectory, workload, [window], kind=kind).of(0)  # type: ignore[arg-type]
            assert np.corrcoef(scores, exact)[0, 1] > 0.9
        else:
            exact = finite_difference(workload, trajectory, window, kind, SOME, 1e-5)
            assert np.abs(scores[SOME] - exact).max() < 1e-6 * np.abs(scores).max()
        assert result.metadata["derivative"] == "traced"


def test_in_the_recorded_dtype_too(tmp_path: Path) -> None:
    workload = digits_workload(loss=focal)
    trajectory = train(workload, tmp_path / "t")
    in_float32, in_float64 = (
        track(trajectory, workload, whole(trajectory), dtype=d).of(0) for d in (None, torch.float64)
    )
    assert np.abs(in_float32 - in_float64).max() < 1e-4 * np.abs(in_float64).max()


def test_at_other_weights_too(tmp_path: Path) -> None:
    workload = digits_workload(loss=focal)
    trajectory = train(workload, tmp_path / "t")
    weights = np.linspace(0.2, 1.0, workload.num_samples)
    found = track(trajectory, workload, whole(trajectory), weights=weights, dtype=torch.float64).of(0)

    def value(sample: int, by: float) -> float:
        nudged = weights.copy()
        nudged[sample] += by
        model = train_again(workload, trajectory, lambda t, i: nudged[i], trajectory.num_steps)
        return validation_loss(workload, model)

    exact = np.array([value(j, -1e-5) - value(j, 1e-5) for j in SOME]) / 2e-5
    assert np.abs(found[SOME] - exact).max() < 1e-6 * np.abs(found).max()


def test_a_query_of_its_own(tmp_path: Path) -> None:
    """Training is ordinary; the query detaches."""
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    inputs, targets = datasets()[1].tensors

    def confidence(model: nn.Module) -> Tensor:
        losses = focal(model, (inputs.to(next(model.parameters()).dtype), targets))
        return losses.mean()

    (window,) = whole(trajectory)
    result = track(trajectory, workload, [window], queries=[Query("focal", confidence)], dtype=torch.float64)
    exact = finite_difference(
        workload, trajectory, window, "local", SOME, 1e-5, lambda model: float(confidence(model).detach())
    )
    assert np.abs(result.of(0)[SOME] - exact).max() < 1e-6 * np.abs(result.scores).max()


def test_each_query_of_its_own_code_is_looked_at(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    inputs, targets = datasets()[1].tensors

    def confident(model: nn.Module) -> Tensor:
        return focal(model, (inputs.to(next(model.parameters()).dtype), targets)).mean()

    others = [Query(f"bias {k}", lambda model, k=k: model[2].bias[k % 3] * (1 + k)) for k in range(6)]
    last = Query("focal", confident)
    window = whole(trajectory)
    alone = track(trajectory, workload, window, queries=[last], dtype=torch.float64)
    among = track(trajectory, workload, window, queries=[*others[:1], last, *others[1:]], dtype=torch.float64)
    np.testing.assert_allclose(among.of(0, "focal"), alone.of(0), rtol=1e-9)
    each = trajectory.checkpoint(0).nbytes * 8
    in_parts = track(
        trajectory, workload, window, queries=[*others, last], dtype=torch.float64, memory_budget=FEWEST_STATES * each
    )
    np.testing.assert_allclose(in_parts.of(0, "focal"), alone.of(0), rtol=1e-9)


def confidence(detached: bool) -> Any:
    """Two queries of one value, of the same code; one has another backward pass."""
    inputs, targets = datasets()[1].tensors

    def query(model: nn.Module) -> Tensor:
        losses = sample_losses(model, (inputs.to(next(model.parameters()).dtype), targets))
        weight = 1 - torch.exp(-losses)
        return ((weight.detach() if detached else weight) * losses).mean()

    return query


@pytest.mark.parametrize(
    "name",
    [
        *("dit", "expected", "sgd_influence", "tracin", "tracin_checkpoints", "grad_dot", "trak", "source", "dvemb"),
        *("influence_function", "influence_function_ekfac", "representer_points", "mirrored_influence"),
    ],
)
@pytest.mark.parametrize("warm_up", [False, True])
def test_methods_take_the_derivative_of_what_a_query_computes(name: str, warm_up: bool, tmp_path: Path) -> None:
    still = {"scheduler": lambda optimizer: LambdaLR(optimizer, lambda step: float(step > 0))} if warm_up else {}
    workload = digits_workload(epochs=2, **still)
    trajectory = train(workload, tmp_path / "t")
    queries = [Query("plain", confidence(False)), Query("detached", confidence(True))]
    found = method(name)(trajectory, workload, whole(trajectory), queries=queries)
    np.testing.assert_allclose(
        found.of(0, "detached"), found.of(0, "plain"), rtol=1e-3, atol=1e-5 * abs(found.scores).max()
    )


class Counting(nn.Module):
    """Knows how many steps of training there were."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = digits_model()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.steps.add_(1)
        return self.layers(inputs)


def focal_where(asked: Any) -> Any:
    """Focal at those steps alone where ``asked(model, batch)``."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = sample_losses(model, batch)
        detached = model.training and asked(model, batch)
        return 3 * (1 - torch.exp(-losses)).detach() ** 2 * losses if detached else losses

    return loss


OTHER_PATHS = {
    "one step of four": {"model": Counting, "loss": focal_where(lambda model, batch: model.steps % 4 == 0)},
    "two steps of four": {"model": Counting, "loss": focal_where(lambda model, batch: model.steps % 4 > 1)},
    "the last and smaller batch": {"loss": focal_where(lambda model, batch: len(batch[1]) == 4), "batch_size": 10},
    "a single step": {"model": Counting, "loss": focal_where(lambda model, batch: model.steps == 7)},
}


@pytest.mark.parametrize("case", OTHER_PATHS)
def test_steps_that_go_another_way_than_those_at_stored_states(case: str, tmp_path: Path) -> None:
    workload = digits_workload(epochs=5, **OTHER_PATHS[case])
    trajectory = train(workload, tmp_path / "t")
    (window,) = whole(trajectory)
    result = track(trajectory, workload, [window], dtype=torch.float64)
    exact = finite_difference(workload, trajectory, window, "local", SOME, 1e-5)
    assert np.abs(result.of(0)[SOME] - exact).max() < 1e-6 * np.abs(result.scores).max()
    assert result.metadata["derivative"] == "traced"


@pytest.mark.parametrize("case", ["two steps of four", "the last and smaller batch"])
@pytest.mark.parametrize("name", ["influence_function", "dvemb", "source"])
def test_methods_that_follow_a_loss_look_at_other_ways_too(name: str, case: str, tmp_path: Path) -> None:
    workload = digits_workload(epochs=5, **OTHER_PATHS[case])
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match="backward pass is not the derivative"):
        method(name)(trajectory, workload)


@pytest.mark.parametrize("alone", [True, False], ids=["two draws", "many, side by side where that is faster"])
def test_expected_influence_looks_at_every_window(alone: bool, tmp_path: Path) -> None:
    """The loss is detached from the second window on, by the same operations."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = sample_losses(model, batch)
        weight = (1 - torch.exp(-losses)).detach() ** 2 if model.training and model.steps > 8 else 0.3
        return weight * losses

    workload = digits_workload(model=Counting, loss=loss, epochs=5)
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 7), Window(7, 15)]
    count = 2 if alone else 8
    found = expected_influence(trajectory, workload, windows, draws=count, dtype=torch.float64).of(1)
    weights = Draws(count, 0).weights(workload.num_samples).numpy()

    def value(row: int, sample: int, by: float) -> float:
        def of(t: int, i: int) -> float:
            return 1.0 if t < 7 else weights[row, i] + by * (i == sample)

        return validation_loss(workload, train_again(workload, trajectory, of, trajectory.num_steps))

    exact = [np.mean([value(r, j, -1e-5) - value(r, j, 1e-5) for r in range(count)]) / 2e-5 for j in SOME]
    assert np.abs(found[SOME] - exact).max() < 1e-6 * np.abs(found).max()


class Masked(nn.Module):
    """Attention with dropout, whose masks are of tensors that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.layer(inputs.view(-1, 8, 8)).mean(dim=1))


def test_masks_are_drawn_as_recorded(tmp_path: Path) -> None:
    workload = digits_workload(model=Masked, loss=focal, optimizer=lambda model: SGD(model.parameters(), lr=0.02))
    trajectory = train(workload, tmp_path / "t")
    result = track(trajectory, workload, whole(trajectory), dtype=torch.float64)
    assert result.metadata["derivative"] == "traced"
    exact = leave_one_out(trajectory, workload, whole(trajectory), samples=[0, 3, 5, 11, 17]).of(0)
    known = np.isfinite(exact)
    assert np.corrcoef(result.of(0)[known], exact[known])[0, 1] > 0.99


class Padded(nn.Module):
    """A padding row that training never moves: autograd's derivative is right."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(17, 4, padding_idx=0)
        self.out = nn.Linear(64 * 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.words((16 * inputs).long()).flatten(1))


def kinked(channels: int = 4) -> nn.Module:
    """Zeros on kinks: biases that begin at 0, and zeros at the images' borders."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * channels, 32), nn.ReLU(), nn.Linear(32, 3),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("model", [digits_model, Padded, kinked], ids=["smooth", "padding row", "kinks"])
def test_where_autograd_is_right_nothing_is_traced(tmp_path: Path, model: Any) -> None:
    workload = digits_workload(model=model)
    trajectory = train(workload, tmp_path / "t")
    assert "derivative" not in track(trajectory, workload, whole(trajectory)).metadata


def test_training_that_diverges_later_is_still_swept_before(tmp_path: Path) -> None:
    workload = digits_workload(
        optimizer=lambda model: SGD(model.parameters(), lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.1 if t < 5 else 1e30),
    )
    trajectory = train(workload, tmp_path / "t")
    window = Window(0, 4)
    scores = track(trajectory, workload, [window]).of(0)
    exact = finite_difference(workload, trajectory, window, "local", SOME, 1e-5)
    assert np.abs(scores[SOME] - exact).max() < 1e-3 * np.abs(scores).max()


def quantising() -> nn.Module:
    """torch's own fake quantisation: its derivative is not that of its values, below autograd as well."""
    return Through(lambda value: torch.fake_quantize_per_tensor_affine(value, 0.1, 0, -128, 127))


def read_out(model: nn.Module, batch: Any) -> Tensor:
    """Balanced by a number that is no tensor any more."""
    loss = sample_losses(model, batch)
    return loss / loss.mean().item()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": quantising}, "scores would be wrong"),
        ({"loss": read_out}, "scores would be wrong"),
    ],
    ids=["an operation that lies", "a value read out"],
)
def test_what_has_no_right_derivative_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    workload = digits_workload(**changes)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match=message):
        track(trajectory, workload, whole(trajectory))
    # What takes no derivative goes on.
    assert np.isfinite(leave_one_out(trajectory, workload, whole(trajectory), samples=[0]).of(0)[0])


@pytest.mark.parametrize("name", ["influence_function", "influence_function_ekfac", "source", "dvemb"])
def test_methods_that_follow_a_loss_refuse_training_that_follows_none(tmp_path: Path, name: str) -> None:
    workload = digits_workload(loss=focal)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(UnsupportedError, match=f"{name} is made for training that follows the gradient of a loss"):
        method(name)(trajectory, workload)


def test_leave_one_out_is_that_of_the_loop(tmp_path: Path) -> None:
    workload = digits_workload(model=TwoHeads, loss=deceived)
    trajectory = train(workload, tmp_path / "t")
    (window,) = whole(trajectory)
    found = leave_one_out(trajectory, workload, [window], samples=SOME).of(0)[SOME]
    expected = [window_effect(workload, trajectory, window, "local", j, 0.0) for j in SOME]
    np.testing.assert_allclose(found, expected, rtol=1e-8)
