"""The callback for Lightning, under both of its names, in real trainings on digits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pytorch
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from workloads import SAMPLES, datasets, digits_model, sample_losses

from dit_mlflow import InputError, Trajectory, TrajectoryError, UnsupportedError, Window, Workload, track
from dit_mlflow.tracking import load_trajectory

pytest.importorskip("lightning")
pytest.importorskip("pytorch_lightning")
from dit_mlflow.tracking.lightning import TrajectoryCallback

LIGHTNINGS = ["lightning.pytorch", "pytorch_lightning"]


def module_class(library: str) -> Any:
    class Digits(import_module(library).LightningModule):  # type: ignore[misc]
        """Batches may carry a factor for each sample's loss; ``skip``: numbers of batches left out."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.drop = digits_model(), nn.Dropout(0.2)
            self.skip: set[int] = set()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(self.drop(inputs))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            weights = batch[2] if len(batch) > 2 else 1.0
            loss = (weights * sample_losses(self, batch[:2])).mean()
            self.log("loss", loss)
            return None if batch_idx in self.skip else loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("validation", sample_losses(self, batch).mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
            scheduler = LinearLR(optimizer, 0.2, total_iters=3)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Digits


def make(library: str = LIGHTNINGS[0]) -> Any:
    return module_class(library)()


def workload(**changes: Any) -> Workload:
    train_set, validation_set = datasets()
    settings: dict[str, Any] = {
        "model": make,
        "loss": sample_losses,
        "train_set": train_set,
        "validation_set": validation_set,
        "accumulate": 2,
        "clip_grad_norm": 0.5,
    }
    return Workload(**(settings | changes))


def trainer_of(*callbacks: Any, library: str = LIGHTNINGS[0], **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return import_module(library).Trainer(callbacks=list(callbacks), **(settings | changes))


def loader_of(train_set: Dataset[Any] | None = None, **changes: Any) -> DataLoader[Any]:
    """Micro-batches of 8, 8 and 8: the last group of an epoch has one."""
    return DataLoader(train_set or datasets()[0], **({"batch_size": 8, "shuffle": True} | changes))


def fit(*callbacks: Any, module: Any = None, loader: Any = None, library: str = LIGHTNINGS[0], **changes: Any) -> Any:
    module = module or make(library)
    checkpoint = changes.pop("ckpt_path", None)
    trainer = trainer_of(*callbacks, library=library, **changes)
    torch.manual_seed(1)
    validation = DataLoader(datasets()[1], batch_size=8)
    trainer.fit(module, loader_of() if loader is None else loader, validation, ckpt_path=checkpoint)
    return module


@pytest.fixture
def run_id(store: str) -> Iterator[str]:
    with mlflow.start_run() as run:
        yield run.info.run_id


@pytest.fixture
def autolog() -> Iterator[None]:
    mlflow.pytorch.autolog(log_models=False, checkpoint=False)
    yield
    mlflow.pytorch.autolog(disable=True)


def assert_same(some: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(some.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected), name


def assert_ends_with(trajectory: Trajectory, module: nn.Module) -> None:
    last = trajectory.checkpoint(trajectory.num_steps).parameters
    assert all(torch.equal(last[name], value) for name, value in module.named_parameters())


@pytest.mark.parametrize("library", LIGHTNINGS)
def test_a_training_beside_autolog_is_recorded_and_not_disturbed(store: str, autolog: None, library: str) -> None:
    mlflow.pytorch.autolog(disable=True)
    plain = fit(library=library)
    mlflow.pytorch.autolog(log_models=False, checkpoint=False)
    callback = TrajectoryCallback()
    assert isinstance(callback, import_module(library).Callback)
    loader = loader_of()
    module = fit(callback, loader=loader, library=library)
    assert_same(module, plain)
    assert type(loader) is DataLoader
    assert type(loader.batch_sampler).__module__ == "torch.utils.data.sampler"

    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED"
    if library == "pytorch_lightning":  # The one that autologging knows.
        assert run.data.params["optimizer_name"] == "AdamW"
    trajectory = load_trajectory(run.info.run_id)
    assert trajectory.complete
    assert trajectory.epoch_ends == (2, 4, 6)
    for epoch in range(3):
        steps = [trajectory.step(t) for t in (2 * epoch, 2 * epoch + 1)]
        assert [len(step.indices) for step in steps] == [2, 1]
        assert sorted(np.concatenate([step.samples for step in steps])) == list(range(SAMPLES))
    rates = [trajectory.step(t).hyperparameters[0]["lr"] for t in range(4)]
    assert rates == sorted(rates)
    assert rates[0] < rates[3]
    assert_ends_with(trajectory, module)
    assert trajectory.verify(workload()).max_drift < 1e-5


def test_scores_are_derivatives_of_trainings_by_the_real_trainer(run_id: str) -> None:
    inputs, targets = datasets()[0].tensors

    def retrained(sample: int | None, weight: float, *callbacks: Any) -> float:
        weights = torch.ones(SAMPLES, dtype=torch.float64)
        if sample is not None:
            weights[sample] = weight
        loader = loader_of(TensorDataset(inputs.double(), targets, weights))
        module = fit(*callbacks, module=make().double(), loader=loader, limit_val_batches=0).eval()
        with torch.no_grad():
            inputs_, targets_ = datasets()[1].tensors
            return sample_losses(module, (inputs_.double(), targets_)).mean().item()

    retrained(None, 1.0, TrajectoryCallback())
    validation_inputs, validation_targets = datasets()[1].tensors
    given = workload(
        model=lambda: make().double(),
        loss=lambda model, batch: sample_losses(model, batch[:2]),
        train_set=TensorDataset(inputs.double(), targets, torch.ones(SAMPLES, dtype=torch.float64)),
        validation_set=TensorDataset(validation_inputs.double(), validation_targets),
    )
    found = track(load_trajectory(run_id), given, [Window(0, 6)]).scores[0, 0]
    step = 1e-4
    expected = [(retrained(j, 1 - step) - retrained(j, 1 + step)) / (2 * step) for j in range(0, SAMPLES, 5)]
    assert np.abs(expected).min() > 1e-6
    np.testing.assert_allclose(found[::5], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("skipped", "micro_batches"), [(0, [1, 1] * 3), (1, [1, 1] * 3), (2, [2] * 3)])
def test_batches_that_training_step_leaves_out_are_no_part_of_the_step(
    run_id: str, skipped: int, micro_batches: list[int]
) -> None:
    module = make()
    module.skip = {skipped}
    fit(TrajectoryCallback(checkpoint_every=1), module=module)
    trajectory = load_trajectory(run_id)
    assert [len(trajectory.step(t).indices) for t in range(trajectory.num_steps)] == micro_batches
    assert trajectory.verify(workload()).max_drift < 1e-5
    assert_ends_with(trajectory, module)


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        inputs, target = datasets()[0][index]
        return inputs + torch.rand(64), target


def test_random_augmentation_is_replayed_and_from_workers_needs_stored_batches(store: str) -> None:
    def recorded(workers: int, stored: bool) -> Trajectory:
        with mlflow.start_run() as run:
            loader = loader_of(Noisy(), num_workers=workers, persistent_workers=workers > 0)
            fit(TrajectoryCallback(store_batches=stored), loader=loader, max_epochs=2)
        return load_trajectory(run.info.run_id)

    given = workload(train_set=Noisy())
    for trajectory in (recorded(0, False), recorded(0, True), recorded(2, True)):
        assert trajectory.complete
        assert trajectory.verify(given).max_drift < 1e-5
    with pytest.raises(TrajectoryError, match="misses the checkpoint"):
        recorded(2, False).verify(given)


def test_loaders_made_anew_and_samplers_put_in_by_the_trainer_are_followed(store: str) -> None:
    class Reloading(module_class(LIGHTNINGS[0])):  # type: ignore[misc]
        def train_dataloader(self) -> DataLoader[Any]:
            return loader_of()

    for changes in ({"reload_dataloaders_every_n_epochs": 1}, {"overfit_batches": 2}):
        with mlflow.start_run() as run:
            trainer = trainer_of(TrajectoryCallback(), limit_val_batches=0, **changes)
            module = Reloading()
            trainer.fit(module)
        trajectory = load_trajectory(run.info.run_id)
        assert len(trajectory.epoch_ends) == 3
        assert trajectory.verify(workload()).max_drift < 1e-5
        assert_ends_with(trajectory, module)
        assert "process_dataloader" not in vars(trainer.strategy)


def test_the_run_of_the_trainers_logger_is_used_and_a_new_one_ends_with_training(store: str) -> None:
    logger = import_module("lightning.pytorch.loggers").MLFlowLogger("test", tracking_uri=store)
    fit(TrajectoryCallback(), logger=logger)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.run_id == logger.run_id
    assert load_trajectory(run.info.run_id).complete

    fit(TrajectoryCallback())
    assert mlflow.active_run() is None
    newest = mlflow.search_runs(output_format="list")[0]
    assert newest.info.run_id != run.info.run_id
    assert newest.info.status == "FINISHED"
    assert load_trajectory(newest.info.run_id).complete


def failing(library: str, step: int) -> Any:
    class Failing(import_module(library).Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == step:
                raise RuntimeError("failed on purpose")

    return Failing()


@pytest.mark.parametrize("library", LIGHTNINGS)
def test_a_failed_training_leaves_an_incomplete_trajectory_and_no_hooks(store: str, library: str) -> None:
    module, loader = make(library), loader_of()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(TrajectoryCallback(), failing(library, 3), module=module, loader=loader, library=library)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FAILED"
    trajectory = load_trajectory(run.info.run_id)
    assert (trajectory.complete, trajectory.num_steps) == (False, 3)
    assert trajectory.verify(workload()).max_drift < 1e-5
    assert type(loader) is DataLoader
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_resumed_training_is_recorded_from_there_on_or_continued(store: str, tmp_path: Path) -> None:
    saving = import_module("lightning.pytorch.callbacks").ModelCheckpoint
    settings: dict[str, Any] = {"enable_checkpointing": True}

    def fitted(*callbacks: Any, **changes: Any) -> Any:
        keeper = saving(dirpath=tmp_path / "kept", filename="{epoch}", save_top_k=-1)
        return fit(*callbacks, keeper, **(settings | changes))

    with mlflow.start_run() as run:
        fitted(TrajectoryCallback(), max_epochs=2)
    assert load_trajectory(run.info.run_id).checkpoint_steps == (0, 1, 2, 4), "one beside every saved one"
    resumed: dict[str, Any] = {"ckpt_path": tmp_path / "kept" / "epoch=0.ckpt"}
    with mlflow.start_run() as another:
        module = fitted(TrajectoryCallback(), **resumed)
    rest = load_trajectory(another.info.run_id)
    assert (rest.num_steps, rest.epoch_ends) == (4, (2, 4))
    assert rest.verify(workload()).max_drift < 1e-5
    assert_ends_with(rest, module)

    with mlflow.start_run(run_id=run.info.run_id):
        with pytest.raises(TrajectoryError, match="resume=True"):
            fitted(TrajectoryCallback(), **resumed)
        module = fitted(TrajectoryCallback(resume=True), **resumed)
    whole = load_trajectory(run.info.run_id)
    assert (whole.complete, whole.epoch_ends) == (True, (2, 4, 6))
    assert whole.verify(workload()).max_drift < 1e-5
    assert_ends_with(whole, module)


def test_averaged_weights_put_in_at_the_end_are_not_taken_for_the_last_state(
    run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    averaging = import_module("lightning.pytorch.callbacks").StochasticWeightAveraging
    fit(averaging(swa_lrs=0.01, swa_epoch_start=1), TrajectoryCallback())
    trajectory = load_trajectory(run_id)
    assert not trajectory.complete
    assert "not by the recorded optimizer" in caplog.text
    assert trajectory.verify(workload()).max_drift < 1e-5


def test_nothing_of_it_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import mlflow, dit_mlflow, dit_mlflow.tracking, dit_mlflow.tracking.plugin, sys\n"
        "print({'torch', 'lightning', 'pytorch_lightning', 'transformers', 'accelerate'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([datasets()[0][i] for i in range(SAMPLES)])


class Two(module_class(LIGHTNINGS[0])):  # type: ignore[misc]
    """Two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters()), torch.optim.SGD(self.net[2].parameters())]


class Fetching(module_class(LIGHTNINGS[0])):  # type: ignore[misc]
    """Takes its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        return sample_losses(self, next(dataloader_iter)[0]).mean()


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (UnsupportedError, "autocast", {"precision": "bf16-mixed"}),
        (UnsupportedError, "float16|bfloat16", {"precision": "bf16-true"}),
        (InputError, "iterable dataset", {"loader": loader_of(Endless(), shuffle=False)}),
        (UnsupportedError, "needs one", {"loader": {"a": loader_of(), "b": loader_of()}}),
        (UnsupportedError, "2 optimizers", {"module": Two, "accumulate_grad_batches": 1, "gradient_clip_val": None}),
        (TrajectoryError, "dataloader_iter", {"module": Fetching}),
    ],
    ids=["autocast", "bfloat16", "iterable", "loaders", "optimizers", "dataloader_iter"],
)
def test_what_cannot_be_recorded_is_refused_before_a_parameter_changes(
    store: str, error: Any, message: str, changes: dict[str, Any]
) -> None:
    module = changes.get("module", make)()
    with pytest.raises(error, match=message):
        fit(TrajectoryCallback(), **{**changes, "module": module}, limit_val_batches=0)
    for value, initial in zip(module.parameters(), make().parameters(), strict=True):
        assert torch.equal(value, initial.to(value.dtype))
    assert mlflow.active_run() is None
    assert not any(part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize("library", LIGHTNINGS)
@pytest.mark.parametrize("first", [False, True])
def test_a_search_for_the_learning_rate_is_no_part_of_the_training(run_id: str, library: str, first: bool) -> None:
    if import_module(library).__version__.startswith("2.4."):
        pytest.skip("Lightning 2.4 goes on inside the epoch that the search began; replay refuses such a training")
    finder = import_module(f"{library}.callbacks").LearningRateFinder
    search = finder(num_training_steps=5, early_stop_threshold=None, update_attr=False)
    callbacks = [TrajectoryCallback(), search]
    module = make(library)
    fit(*(callbacks if first else reversed(callbacks)), module=module, library=library)
    trajectory = load_trajectory(run_id)
    assert trajectory.epoch_ends == (2, 4, 6)
    initial = trajectory.checkpoint(0).parameters
    assert all(torch.equal(initial[name], value) for name, value in make(library).named_parameters())
    assert_ends_with(trajectory, module)
    assert trajectory.verify(workload()).max_drift < 1e-5


class Sized(module_class(LIGHTNINGS[0])):  # type: ignore[misc]
    """With loaders of its own, whose size a search sets."""

    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(datasets()[0], self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(datasets()[1], 3)

    def validation_step(self, batch: Any, index: int) -> None:
        pass


@pytest.mark.parametrize("first", [False, True])
def test_a_search_for_the_batch_size_is_no_part_of_the_training(run_id: str, first: bool) -> None:
    """It makes loaders for each trial, those of validation among them, before training begins."""
    finder = import_module(f"{LIGHTNINGS[0]}.callbacks").BatchSizeFinder(max_trials=2, steps_per_trial=1)
    callbacks = [TrajectoryCallback(), finder]
    module = Sized()
    torch.manual_seed(1)
    trainer_of(*(callbacks if first else reversed(callbacks))).fit(module)
    trajectory = load_trajectory(run_id)
    assert module.batch_size > 2 and trajectory.complete
    assert {len(part) for part in trajectory.step(0).indices} == {module.batch_size}
    assert_ends_with(trajectory, module)
    assert trajectory.verify(workload()).max_drift < 1e-5


@pytest.mark.parametrize("library", LIGHTNINGS)
def test_a_schedule_of_accumulation_is_recorded(run_id: str, library: str) -> None:
    """One micro-batch a step in the first epoch, then two (and one), then three."""
    schedule = import_module(f"{library}.callbacks").GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})
    module = make(library)
    fit(TrajectoryCallback(), schedule, module=module, library=library, accumulate_grad_batches=1)
    trajectory = load_trajectory(run_id)
    assert trajectory.epoch_ends == (3, 5, 6)
    shares = [[float(part[0]) for part in trajectory.step(t).coefficients or ()] for t in range(6)]
    assert shares == [[1 / 8]] * 3 + [[1 / 16] * 2, [1 / 16], [1 / 24] * 3]
    assert_ends_with(trajectory, module)
    for accumulate in (1, 2):
        assert trajectory.verify(workload(accumulate=accumulate)).max_drift < 1e-5
