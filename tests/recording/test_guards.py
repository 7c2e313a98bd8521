"""Loops out of the ordinary are recorded truthfully, or refused by name before long work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference
from plain_loop import Net, assert_replays, record, whole
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize, prune
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import Trajectory, TrajectoryError, TrajectoryRecorder, UnsupportedError, Window, track
from dit_mlflow.trajectory import REPLAY_TOLERANCE

# Batches that are not used


@pytest.mark.parametrize("discards", [True, False])
def test_skipped_batches(discards: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))

    model = make()
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
    used = []
    torch.manual_seed(1)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for _ in range(3):
            for number, batch in enumerate(recorder.watch(DataLoader(datasets()[0], batch_size=4, shuffle=True))):
                optimizer.zero_grad()
                loss = sample_losses(model, batch).mean()
                if number % 3 == 0:
                    recorder.log(loss)
                    if discards:
                        recorder.discard()
                    continue
                loss.backward()
                optimizer.step()
                used.append(batch[1].tolist())
    trajectory = Trajectory.open(tmp_path / "t")
    workload = digits_workload(model=make, optimizer=None)
    if not discards:
        with pytest.raises(TrajectoryError, match=r"does not use it \(continue,.*call recorder\.discard\(\)"):
            trajectory.verify(workload)
        return
    assert_replays(trajectory, workload, model)
    targets = datasets()[0].tensors[1]
    assert [targets[trajectory.step(t).samples].tolist() for t in range(trajectory.num_steps)] == used
    assert all(len(trajectory.step(t).random_states) == 1 for t in range(trajectory.num_steps))
    assert all(trajectory.step(t).loss is None for t in range(trajectory.num_steps))


def test_a_step_on_discarded_batches_is_refused(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    with (
        pytest.raises(TrajectoryError, match=r"without a batch from recorder\.watch"),
        TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder,
    ):
        for _ in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
            recorder.discard()
            optimizer.step()


# Averages of the model


def test_training_beside_an_average_is_recorded(tmp_path: Path) -> None:
    model = digits_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    trajectory = record(
        tmp_path / "t", model, SGD(model.parameters(), lr=0.5), after=lambda: average.update_parameters(model)
    )
    assert_replays(trajectory, digits_workload(), model)


def test_the_average_itself_is_refused(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    with pytest.raises(TrajectoryError, match="AveragedModel, which no optimizer steps: record the trained model"):
        TrajectoryRecorder(AveragedModel(model), optimizer, tmp_path / "t")
    with pytest.raises(TrajectoryError, match="not parameters of the recorded model"):
        TrajectoryRecorder(copy.deepcopy(model), optimizer, tmp_path / "t")


def test_averaged_weights_put_in_for_evaluation_and_taken_out_again(tmp_path: Path) -> None:
    model = digits_model()
    average = AveragedModel(model)

    def evaluate() -> None:
        kept = [parameter.data for parameter in model.parameters()]
        for parameter, other in zip(model.parameters(), average.module.parameters(), strict=True):
            parameter.data = other.data
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.data = value

    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5), after=evaluate)
    assert_replays(trajectory, digits_workload(), model)


# Adapters


class Adapter(nn.Module):
    """A frozen layer plus a trained one of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(rank, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + inputs @ self.down.T @ self.up.T


class LowRank(nn.Module):
    def __init__(self, rows: int, columns: int, rank: int = 2) -> None:
        super().__init__()
        self.down = nn.Parameter(0.3 * torch.randn(rank, columns))
        self.up = nn.Parameter(0.3 * torch.randn(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def adapted() -> nn.Module:
    return nn.Sequential(Adapter(nn.Linear(64, 6)), nn.Tanh(), Adapter(nn.Linear(6, 3)))


def parametrized() -> nn.Module:
    model = digits_model().requires_grad_(False)
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))
    return model


@pytest.mark.parametrize("make", [adapted, parametrized])
def test_adapters_alone_are_trained_and_swept(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    def optimizer(model: nn.Module) -> Optimizer:
        return Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)

    model = make()
    trajectory = record(tmp_path / "t", model, optimizer(model))
    workload = digits_workload(model=make, optimizer=optimizer)
    assert_replays(trajectory, workload, model)
    assert {name.rsplit(".", 1)[1] for group in trajectory.manifest.optimizer.groups for name in group} == {
        "down",
        "up",
    }
    found = track(trajectory, workload, whole(trajectory), dtype=torch.float64).of(0)[::4]
    expected = finite_difference(workload, trajectory, whole(trajectory)[0], "local", range(0, 24, 4), 1e-5)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


# Layers frozen in training


def freeze_late(directory: Path, zero: Callable[[Optimizer], None]) -> Trajectory:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    with TrajectoryRecorder(model, optimizer, directory, checkpoint_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(DataLoader(datasets()[0], batch_size=8))):
            model[0].requires_grad_(number == 0)
            zero(optimizer)
            sample_losses(model, batch).mean().backward()
            optimizer.step()
    return Trajectory.open(directory)


def test_gradients_left_at_zero_are_told_from_those_that_are_absent(tmp_path: Path) -> None:
    zeroed = freeze_late(tmp_path / "zeroed", lambda optimizer: optimizer.zero_grad(set_to_none=False))
    absent = freeze_late(tmp_path / "absent", lambda optimizer: optimizer.zero_grad())
    frozen = {"0.weight", "0.bias"}
    for trajectory, zero, none in ((zeroed, frozen, set()), (absent, set(), frozen)):
        assert [trajectory.step(t).zero_gradient for t in range(3)] == [set(), zero, zero]
        assert [trajectory.step(t).no_gradient for t in range(3)] == [set(), none, none]
    states = [trajectory.checkpoint(t).parameters["0.weight"] for trajectory in (zeroed, absent) for t in (1, 2)]
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[2], states[3])


def test_frozen_parameters_stepped_by_an_old_gradient_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'0.weight' is frozen.*by an old gradient.*zero_grad\(\)"):
        freeze_late(tmp_path / "t", lambda optimizer: None)
    assert Trajectory.open(tmp_path / "t").num_steps == 1


# Changes beside the optimizer


def clamp(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.05, 0.05)


def clamp_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def another_optimizer(fused: bool) -> Callable[[nn.Module], None]:
    return lambda model: SGD(model[2].parameters(), lr=0.1, fused=fused).step()  # type: ignore[index]


CHANGES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "clamping": (clamp, "0.weight"),
    "clamping .data": (clamp_data, "0.weight"),
    "second optimizer": (another_optimizer(fused=False), "2.weight"),
    "second optimizer, fused": (another_optimizer(fused=True), "2.weight"),
    "weights loaded": (lambda model: model.load_state_dict(digits_model().state_dict()) and None, "0.weight"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_changed_between_steps_are_named(name: str, tmp_path: Path) -> None:
    change, first = CHANGES[name]
    model = digits_model()
    message = rf"'{first}' changed between step 0 and step 1, and not by|SGD.step\(\) changed parameter '{first}'"
    with pytest.raises(TrajectoryError, match=message):
        record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5), after=lambda: change(model))
    trajectory = Trajectory.open(tmp_path / "t")
    assert (trajectory.num_steps, trajectory.complete) == (1, False)


def test_parameters_changed_late_are_named(tmp_path: Path) -> None:
    model = digits_model()
    steps = iter(range(100))
    with pytest.raises(TrajectoryError, match=r"'0.weight' changed between step 2 and step 3"):
        record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5), after=lambda: next(steps) == 2 and clamp(model))


def test_weights_renormalised_in_the_forward_pass_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.EmbeddingBag(17, 5, max_norm=0.1), nn.Linear(5, 3))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model((16 * batch[0]).long()), batch[1], reduction="none")

    with pytest.raises(TrajectoryError, match=r"'0.weight'.*Embedding\(max_norm"):
        record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5), loss=loss)


def test_weights_loaded_before_the_block_ends_are_not_taken_for_the_last_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Early stopping: the best epoch's weights are loaded back, and averaged ones are copied in, when training ends."""
    model = digits_model()
    best = copy.deepcopy(model.state_dict())
    steps = iter(range(1, 100))
    trajectory = record(
        tmp_path / "t",
        model,
        SGD(model.parameters(), lr=0.5),
        after=lambda: next(steps) == 6 and model.load_state_dict(best) and None,
    )
    assert "the last step (5), inside the recorder's with block: weights loaded back" in caplog.text
    assert (trajectory.num_steps, trajectory.checkpoint_steps, trajectory.complete) == (6, (0, 1, 4), True)
    assert trajectory.verify(digits_workload()).max_drift == 0
    assert np.isfinite(track(trajectory, digits_workload(), [Window(0, 6)]).scores).all()


@pytest.mark.parametrize("last", [4, 6])
def test_weights_averaged_through_data_at_the_end_are_not_taken_for_the_last_state(
    last: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No version counter shows them; the state after step 4 is stored when it is made."""
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for batch in recorder.watch(DataLoader(datasets()[0], batch_size=24 // last)):
            optimizer.zero_grad()
            sample_losses(model, batch).mean().backward()
            optimizer.step()
        for value in model.parameters():
            value.data.copy_(0.9 * value.data)
    assert (f"the parameters changed after the last step ({last - 1})" in caplog.text) == (last == 6)
    trajectory = Trajectory.open(tmp_path / "t")
    assert (trajectory.num_steps, trajectory.complete) == (last, True)
    assert trajectory.verify(digits_workload()).max_drift == 0


def test_steps_made_by_hand_after_recorded_ones_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, steps = digits_model(), iter(range(100))
    optimizer = SGD(model.parameters(), lr=0.1)

    def step(loss: Tensor) -> None:
        loss.backward()
        if next(steps) < 4:
            optimizer.step()
        else:
            for value in model.parameters():
                value.data -= 0.1 * value.grad

    trajectory = record(tmp_path / "t", model, optimizer, step=step)
    assert trajectory.num_steps == 4
    assert "changed after the last recorded step (3), and batches were drawn since, but SGD.step() was" in caplog.text


def test_weights_loaded_as_they_were_are_no_change(tmp_path: Path) -> None:
    model = digits_model()
    trajectory = record(
        tmp_path / "t",
        model,
        SGD(model.parameters(), lr=0.5),
        after=lambda: model.load_state_dict(copy.deepcopy(model.state_dict())) and None,
        checkpoint_every=1,
    )
    assert_replays(trajectory, digits_workload(), model)


class LateBuffer(nn.Linear):
    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor = self.seen + len(images)
        return super().forward(images)


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(64, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (weight_normed, r"normalised by torch\.nn\.utils\.weight_norm.*use torch.nn.utils.parametrizations"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"parameter '0\.weight' has no shape yet \(a Lazy module\)"),
        (lambda: LateBuffer(64, 3), "buffer 'seen' was made, removed or given another shape or type by step 0"),
    ],
    ids=["weight_norm", "lazy", "buffer"],
)
def test_models_that_are_not_what_they_will_be_are_refused(
    model: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    made = model()
    with pytest.raises(UnsupportedError, match=message):
        record(tmp_path / "t", made, SGD(made.parameters(), lr=0.1))


def test_a_model_that_keeps_what_it_computed_cannot_be_copied() -> None:
    model = digits_model()
    model.kept = model(datasets()[0].tensors[0])
    with pytest.raises(UnsupportedError, match=r"cannot be copied \(Only Tensors .* Modules must not keep tensors"):
        digits_workload(model=model).build_model()


@pytest.mark.parametrize("kind", [{"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("cls", [SGD, Adam])
def test_the_recorded_optimizers_own_steps_are_not_mistaken(
    cls: type[Optimizer], kind: dict[str, bool], tmp_path: Path
) -> None:
    model = digits_model()
    trajectory = record(tmp_path / "t", model, cls(model.parameters(), lr=0.02, **kind))
    assert trajectory.verify(digits_workload(optimizer=None)).max_drift <= REPLAY_TOLERANCE


def test_pruned_modules_and_gradient_masks_are_said_when_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pruned = digits_model()
    prune.l1_unstructured(pruned[0], "weight", 0.5)  # type: ignore[index]
    with pytest.raises(UnsupportedError, match=r"0 is pruned by torch.nn.utils.prune"):
        TrajectoryRecorder(pruned, SGD(pruned.parameters(), lr=0.1), tmp_path / "t")
    for number, name in enumerate(("register_hook", "register_post_accumulate_grad_hook")):
        masked = digits_model()
        getattr(masked[2].weight, name)(lambda gradient: None)  # type: ignore[index]
        TrajectoryRecorder(masked, SGD(masked.parameters(), lr=0.1), tmp_path / str(number))
        assert [entry.message for entry in caplog.records if "'2.weight' has a gradient hook" in entry.message]
        caplog.clear()


def put_in_buffer(model: nn.Module) -> None:
    model[0].register_buffer("seen", torch.zeros(3))  # type: ignore[index,operator]


def replace_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())  # type: ignore[index]


def replace_layer(model: nn.Module) -> None:
    model[2] = copy.deepcopy(model[2])  # type: ignore[index,operator]


def prune_layer(model: nn.Module) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index]


def tie_by_data(model: nn.Module) -> None:
    model[0].bias.data = model[2].weight.data[0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message", "kept"),
    [
        (prune_layer, "parameter '0.weight' of the model was put in, taken out, moved or replaced before step 3", 3),
        (replace_parameter, "parameter '0.weight' of the model was put in, taken out", 3),
        (replace_layer, "module '2' of the model was put in, taken out", 3),
        (put_in_buffer, "buffer '0.seen' was made, removed or given another shape or type by step 3", 3),
        (tie_by_data, "parameters '0.bias' and '2.weight' share memory", 4),
    ],
)
def test_parts_exchanged_in_mid_training_are_said_when_recording(
    change: Callable[[nn.Module], None], message: str, kept: int, tmp_path: Path
) -> None:
    model, steps = digits_model(), iter(range(100))
    with pytest.raises((TrajectoryError, UnsupportedError), match=message):
        record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1), after=lambda: next(steps) == 2 and change(model))
    trajectory = Trajectory.open(tmp_path / "t")
    assert (trajectory.num_steps, trajectory.complete) == (kept, False)


class Attaching(Net):
    """As many are written: what it needs besides is made where it is needed first."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not hasattr(self, "activation"):
            self.activation = nn.Tanh()
        self.once = nn.Dropout(0.1)
        return self.outer(self.once(self.activation(self.inner(inputs))))


def attach_loss(model: nn.Module) -> None:
    model.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))


def attach_average(model: nn.Module) -> None:
    model.average = AveragedModel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def attach_and_detach(model: nn.Module) -> None:
    if hasattr(model, "criterion"):
        del model.criterion
    else:
        model.criterion = nn.CrossEntropyLoss()


@pytest.mark.parametrize("make", [Net, Attaching])
@pytest.mark.parametrize("attach", [lambda _: None, attach_loss, attach_average, attach_and_detach])
def test_modules_attached_beside_what_is_trained_are_no_part_of_it(
    make: Callable[[], nn.Module], attach: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    model = make()
    expected = {name for name, _ in model.named_parameters()}
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1), after=lambda: attach(model))
    assert trajectory.verify(digits_workload(model=make, optimizer=None)).max_drift == 0
    assert trajectory.checkpoint(trajectory.num_steps).parameters.keys() == expected
    assert not trajectory.checkpoint(trajectory.num_steps).buffers


def test_a_module_replaced_by_its_like_is_asked_for_its_mode(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 6), nn.Dropout(0.5), nn.Linear(6, 3))

    model, steps = make(), iter(range(100))

    def replace() -> None:
        if next(steps) == 2:
            model[1] = nn.Dropout(0.5).eval()  # type: ignore[index,operator]

    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1), after=replace)
    assert_replays(trajectory, digits_workload(model=make, optimizer=None), model)
    assert [trajectory.step(t).evaluation_mode for t in (2, 3)] == [set(), {"1"}]


def test_a_layer_appended_or_exchanged_for_another_rate_is_refused(tmp_path: Path) -> None:
    def append(model: Any) -> None:
        model.append(nn.Tanh())

    def exchange(model: Any) -> None:
        model[1] = nn.Dropout(0.5)

    for number, change in enumerate((append, exchange)):
        model = nn.Sequential(nn.Linear(64, 3), nn.Dropout(0.1))
        with pytest.raises(TrajectoryError, match=r"module '[12]' of the model was put in, taken out, moved or repl"):
            record(tmp_path / str(number), model, SGD(model.parameters(), lr=0.1), after=lambda: change(model))  # noqa: B023


def test_frozen_parameters_may_share_memory(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3))
        model[1].weight.data = model[0].weight.data
        model[:2].requires_grad_(False)
        return model

    model = make()
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1))
    assert_replays(trajectory, digits_workload(model=make, optimizer=None), model)
    model[0].requires_grad_(True)  # type: ignore[index]
    with pytest.raises(UnsupportedError, match=r"'0\.weight' and '1\.weight' share memory"):
        TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "u")


def test_hooks_of_many_parameters_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = digits_model()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: None)
    record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1))
    others = len(list(model.parameters())) - 1
    assert caplog.text.count("has a gradient hook") == 1
    assert f"'0.weight' (and {others} more) has a gradient hook" in caplog.text


def test_a_gradient_mask_put_in_late_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, steps = digits_model(), iter(range(100))

    def mask() -> None:
        if next(steps) == 2:
            model[2].weight.register_hook(lambda gradient: 0 * gradient)  # type: ignore[index,operator]

    record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1), after=mask)
    assert caplog.text.count("'2.weight' has a gradient hook") == 1


@pytest.mark.parametrize(("layer", "name", "step"), [(0, "weight", 3), (0, "bias", 4), (2, "bias", 3)])
def test_changes_through_data_are_found_at_once_or_where_a_state_is_stored(
    layer: int, name: str, step: int, tmp_path: Path
) -> None:
    """At once, where some elements of the first and the last parameter tell; by step 4 in any."""
    model, steps = digits_model(), iter(range(100))

    def change() -> None:
        if next(steps) > 1:
            getattr(model[layer], name).data.mul_(0.9)  # type: ignore[index]

    with pytest.raises(TrajectoryError, match=rf"'{layer}\.{name}' changed between step {step - 1} and step {step}"):
        record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5), after=change)


def test_another_optimizer_that_takes_over_is_named_at_its_first_step(tmp_path: Path) -> None:
    model = digits_model()
    optimizer, steps = SGD(model.parameters(), lr=0.1), iter(range(100))
    other = Adam(model.parameters())

    def step(loss: Tensor) -> None:
        loss.backward()
        (optimizer if next(steps) < 4 else other).step()

    with pytest.raises(TrajectoryError, match=r"Adam\.step\(\) changed parameter '0\.weight', but .* is SGD"):
        record(tmp_path / "t", model, optimizer, step=step)
    assert Trajectory.open(tmp_path / "t").num_steps == 4


@pytest.mark.parametrize("clear", [lambda one, _: one.state.clear(), lambda one, new: one.load_state_dict(new)])
@pytest.mark.parametrize("when", [2, 3])
def test_an_optimizer_state_that_is_replaced_is_said_at_the_next_step(clear: Any, when: int, tmp_path: Path) -> None:
    model = digits_model()
    optimizer, steps = Adam(model.parameters()), iter(range(100))
    new = optimizer.state_dict()
    with pytest.raises(TrajectoryError, match="the state of Adam was replaced or cleared"):
        record(tmp_path / "t", model, optimizer, after=lambda: next(steps) == when and clear(optimizer, new))
    assert Trajectory.open(tmp_path / "t").num_steps == when + 1


def test_an_optimizer_state_that_is_saved_and_loaded_back_is_the_same(tmp_path: Path) -> None:
    model = digits_model()
    optimizer = Adam(model.parameters())
    trajectory = record(
        tmp_path / "t", model, optimizer, after=lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    )
    assert_replays(trajectory, digits_workload(optimizer=None), model)


def test_other_parameters_put_into_a_group_are_refused(tmp_path: Path) -> None:
    model, steps = digits_model(), iter(range(100))
    optimizer = SGD([model[0].weight], lr=0.1)  # type: ignore[index]

    def exchange() -> None:
        if next(steps) == 1:
            optimizer.param_groups[0]["params"] = [model[2].weight]  # type: ignore[index]

    with pytest.raises(UnsupportedError, match="parameter groups changed during recording"):
        record(tmp_path / "t", model, optimizer, after=exchange)


def test_optimizers_of_other_models_beside_it_are_nobodys_business(tmp_path: Path) -> None:
    model, other = digits_model(), digits_model()
    beside = SGD(other.parameters(), lr=0.1)
    other(datasets()[0][0][0][None]).sum().backward()
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1), after=lambda: beside.step() and None)
    assert_replays(trajectory, digits_workload(optimizer=None), model)
