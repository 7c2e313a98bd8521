"""The callback for the Hugging Face Trainer, in real trainings of small Berts on digits read as 64 tokens."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset, IterableDataset

from dit_mlflow import Trajectory, TrajectoryError, UnsupportedError, Window, Workload, track
from dit_mlflow.errors import InputError
from dit_mlflow.tracking import load_trajectory
from dit_mlflow.trajectory import REPLAY_TOLERANCE

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dit_mlflow.tracking.huggingface import TrajectoryCallback  # noqa: E402

IMAGES, LABELS = load_digits(n_class=3, return_X_y=True)
SAMPLES = 21
"""Micro-batches of 4: six an epoch, the last of 1. In groups of 4, the last group has two of them."""

SIZE = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
}


class Digits(Dataset[Any]):
    """``labels(image, label)``: what is to be predicted; ``weights``: factors of samples' losses."""

    def __init__(
        self, start: int = 0, stop: int = SAMPLES, labels: Callable[[Tensor, Tensor], Any] | None = None
    ) -> None:
        self.tokens = torch.from_numpy(IMAGES[start:stop]).long()
        self.digits = torch.from_numpy(LABELS[start:stop])
        self.labels = labels or (lambda tokens, digit: digit)
        self.weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens, digit = self.tokens[index], self.digits[index]
        sample = {"input_ids": tokens, "labels": self.labels(tokens, digit)}
        return sample if self.weights is None else {**sample, "weight": self.weights[index]}


def bert(cls: Any = BertForSequenceClassification, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {"vocab_size": 17, "num_labels": 3, "attn_implementation": "eager", **SIZE}
    return cls(BertConfig(**(settings | changes)))


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="none")


def workload(**changes: Any) -> Workload:
    settings: dict[str, Any] = {
        "model": bert,
        "loss": class_losses,
        "train_set": Digits(),
        "validation_set": Digits(100, 116),
        "clip_grad_norm": 1.0,
    }
    return Workload(**(settings | changes))


def fit(
    *callbacks: Any, model: Any = None, train_set: Any = None, resume: str | None = None, folder: Path, **changes: Any
) -> Any:
    """A training with the trainer's defaults (clipping, AdamW, its sampler), warm-up, decay groups, accumulation."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = Trainer(
        model=model or bert(),
        args=TrainingArguments(output_dir=str(folder / "checkpoints"), **(settings | changes)),
        train_dataset=train_set or Digits(),
        eval_dataset=Digits(100, 116),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def run_id(store: str) -> Iterator[str]:
    with mlflow.start_run() as run:
        yield run.info.run_id


def recorded_in(run_id: str) -> Trajectory:
    return load_trajectory(run_id)


def assert_epochs_cover(trajectory: Trajectory, samples: int = SAMPLES) -> None:
    """Every epoch has drawn every sample once."""
    starts = (0, *trajectory.epoch_ends[:-1])
    for start, end in zip(starts, trajectory.epoch_ends, strict=True):
        drawn = np.concatenate([trajectory.step(t).samples for t in range(start, end)])
        assert sorted(drawn) == list(range(samples))


def assert_ends_with(trajectory: Trajectory, model: nn.Module) -> None:
    last = trajectory.checkpoint(trajectory.num_steps).parameters
    assert all(torch.equal(last[name], value) for name, value in model.named_parameters())


def test_a_default_training_is_recorded_and_not_disturbed(run_id: str, tmp_path: Path) -> None:
    plain = fit(folder=tmp_path)
    trainer = fit(TrajectoryCallback(), folder=tmp_path)
    for (name, value), other in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(value, other), name

    trajectory = recorded_in(run_id)
    assert trajectory.complete
    assert trajectory.epoch_ends == (2, 4, 6)
    assert [[len(part) for part in trajectory.step(t).indices] for t in (0, 1)] == [[4, 4, 4, 4], [4, 1]]
    assert_epochs_cover(trajectory)
    assert_ends_with(trajectory, trainer.model)
    assert len(trajectory.step(0).hyperparameters) == 2, "with and without weight decay"
    rates = [trajectory.step(t).hyperparameters[0]["lr"] for t in range(6)]
    assert rates[0] == 0 < rates[1] < rates[2] < rates[3] == 1e-2 > rates[4]
    assert all(trajectory.step(t).random_states[0] is not None for t in range(6)), "dropout"
    assert trajectory.verify(workload()).max_drift <= REPLAY_TOLERANCE
    assert type(trainer.train_dataset) is Digits
    assert type(trainer.callback_handler.train_dataloader.base_dataloader).__module__ == "torch.utils.data.dataloader"


class Weighted(BertForSequenceClassification):
    """The same training, with a factor for each sample's loss that the trainer knows nothing of."""

    def forward(self, input_ids: Any = None, labels: Any = None, weight: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("num_items_in_batch", None)
        output = super().forward(input_ids=input_ids, **kwargs)
        if labels is None:
            return output
        losses = cross_entropy(output.logits, labels, reduction="none")
        output.loss = (losses if weight is None else weight * losses).mean()
        return output


@pytest.mark.slow
def test_scores_are_derivatives_of_trainings_by_the_real_trainer(run_id: str, tmp_path: Path) -> None:
    fit(TrajectoryCallback(), model=bert().double(), folder=tmp_path)
    found = track(recorded_in(run_id), workload(model=lambda: bert().double()), [Window(0, 6)], queries=None).scores[
        0, 0
    ]
    validation = torch.utils.data.default_collate(list(Digits(100, 116)))

    def retrained(sample: int, weight: float) -> float:
        train_set = Digits()
        train_set.weights = torch.ones(SAMPLES, dtype=torch.float64)
        train_set.weights[sample] = weight
        model = fit(model=bert(Weighted).double(), train_set=train_set, folder=tmp_path).model
        with torch.no_grad():
            return class_losses(model.eval(), validation).mean().item()

    samples, step = [0, 7, 20], 1e-4
    expected = [(retrained(j, 1 - step) - retrained(j, 1 + step)) / (2 * step) for j in samples]
    assert np.abs(expected).min() > 1e-6
    np.testing.assert_allclose(found[samples], expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())


def masked(tokens: Tensor, digit: Tensor) -> Tensor:
    """As many labels as the digit says, and five."""
    return torch.where(torch.arange(64) < 5 + digit, tokens, -100)


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(dim=1)


def next_token_losses(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(dim=1)


def llama() -> Any:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=17, attn_implementation="eager", **SIZE, **ends))


class Plain(nn.Module):
    """A model that takes no loss keywords, so that the trainer divides by the micro-batches of the step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 1))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.layers(input_ids / 16)[:, 0]
        return {"loss": mse_loss(output, labels), "output": output}


def squared_errors(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(model(**batch)["output"], batch["labels"], reduction="none")


@pytest.mark.parametrize(
    ("model", "labels", "loss", "last_coefficients"),
    [
        (bert, None, class_losses, [1 / 4, 1.0]),
        (lambda: bert(BertForMaskedLM), masked, token_losses, None),
        (llama, lambda tokens, digit: tokens, next_token_losses, [1 / (5 * 63)] * 2),
        (Plain, lambda tokens, digit: digit.float(), squared_errors, [1 / 8, 1 / 2]),
    ],
    ids=["samples of the micro-batch", "labels of the micro-batch", "labels of the step", "micro-batches"],
)
def test_the_factor_of_each_loss_is_measured(
    run_id: str, tmp_path: Path, model: Any, labels: Any, loss: Any, last_coefficients: Any
) -> None:
    made = model()
    calls: list[int] = []
    made.register_forward_hook(lambda *_: calls.append(1))
    fit(TrajectoryCallback(), model=made, train_set=Digits(labels=labels), eval_strategy="no", folder=tmp_path)
    assert len(calls) == 18, "three epochs of six micro-batches: the model's own hooks see no more"

    trajectory = recorded_in(run_id)
    found = trajectory.step(1).coefficients
    assert found is not None
    if last_coefficients is None:
        last_coefficients = [1 / sum(5 + int(LABELS[i]) for i in part) for part in trajectory.step(1).indices]
    # Older trainers, transformers 5.10 among them, count a sequence's first label too, which has no loss.
    np.testing.assert_allclose([part[0] for part in found], last_coefficients, rtol=0.02 if model is llama else 1e-7)
    given = workload(model=model, loss=loss, train_set=Digits(labels=labels))
    assert trajectory.verify(given).max_drift <= REPLAY_TOLERANCE


def test_with_a_workload_the_first_step_is_replayed_and_a_wrong_one_refused(run_id: str, tmp_path: Path) -> None:
    wrong = workload(clip_grad_norm=0.1)
    # Plain gradient descent from the first step on: Adam's first steps do not know the gradient's length.
    settings: dict[str, Any] = {"optim": "sgd", "warmup_steps": 0, "folder": tmp_path}
    with pytest.raises(TrajectoryError, match="clipping"):
        fit(TrajectoryCallback(wrong), **settings)
    mlflow.end_run()
    with mlflow.start_run() as run:
        fit(TrajectoryCallback(workload(), checkpoint_every=1), max_steps=5, eval_steps=1, **settings)
    trajectory = recorded_in(run.info.run_id)
    assert trajectory.checkpoint_steps == (0, 1, 2, 3, 4, 5)
    assert trajectory.verify(workload()).max_drift <= REPLAY_TOLERANCE


class Noisy(Digits):
    """Tokens replaced at random, as a masking collator would."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {**sample, "input_ids": torch.where(torch.rand(64) < 0.5, 16, sample["input_ids"])}


@pytest.mark.parametrize("workers", [0, 2])
def test_random_data_needs_stored_batches(store: str, tmp_path: Path, workers: int) -> None:
    given = workload(train_set=Noisy())
    for stored in (False, True):
        with mlflow.start_run() as run:
            fit(
                TrajectoryCallback(store_batches=stored, checkpoint_every=1),
                train_set=Noisy(),
                dataloader_num_workers=workers,
                num_train_epochs=1,
                warmup_steps=0,
                folder=tmp_path,
            )
        trajectory = recorded_in(run.info.run_id)
        assert trajectory.complete
        if stored:
            assert trajectory.verify(given).max_drift <= REPLAY_TOLERANCE
        else:
            with pytest.raises(TrajectoryError, match="misses the checkpoint"):
                trajectory.verify(given)


def test_the_best_model_loaded_at_the_end_is_not_taken_for_the_last_state(run_id: str, tmp_path: Path) -> None:
    trainer = fit(
        TrajectoryCallback(),
        load_best_model_at_end=True,
        save_strategy="epoch",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        folder=tmp_path,
    )
    assert not trainer.state.best_model_checkpoint.endswith("-6"), "the loss on the validation set rises"
    trajectory = recorded_in(run_id)
    assert trajectory.complete
    assert trajectory.verify(workload()).max_drift <= REPLAY_TOLERANCE
    with pytest.raises(AssertionError):
        assert_ends_with(trajectory, trainer.model)


@pytest.mark.slow
def test_a_resumed_training_is_recorded_from_there_on_or_continued(store: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "folder": tmp_path}
    with mlflow.start_run() as run:
        fit(TrajectoryCallback(), **settings)
    whole = recorded_in(run.info.run_id)
    expected = [whole.step(t).samples.tolist() for t in range(6)]
    checkpoint = str(tmp_path / "checkpoints" / "checkpoint-3")  # In the middle of the second epoch.

    with mlflow.start_run() as another:
        trainer = fit(TrajectoryCallback(), resume=checkpoint, **settings)
    rest = recorded_in(another.info.run_id)
    assert [rest.step(t).samples.tolist() for t in range(3)] == expected[3:]
    assert rest.epoch_ends == (1, 3)
    assert rest.verify(workload()).max_drift <= REPLAY_TOLERANCE
    assert_ends_with(rest, trainer.model)
    assert_ends_with(whole, trainer.model)

    with mlflow.start_run(run_id=run.info.run_id):
        fit(TrajectoryCallback(resume=True), resume=checkpoint, **settings)
    whole = recorded_in(run.info.run_id)
    assert [whole.step(t).samples.tolist() for t in range(6)] == expected
    assert whole.epoch_ends == (2, 4, 6)
    assert whole.verify(workload()).max_drift <= REPLAY_TOLERANCE

    with mlflow.start_run(), pytest.raises(InputError, match="resume training at the end of an epoch"):
        fit(TrajectoryCallback(store_batches=True), resume=checkpoint, **settings)


def test_the_run_of_the_trainers_own_callback_is_used_and_others_end_with_training(store: str, tmp_path: Path) -> None:
    fit(TrajectoryCallback(), report_to="mlflow", folder=tmp_path)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.params["learning_rate"] == "0.01"
    assert recorded_in(run.info.run_id).complete

    fit(TrajectoryCallback(), folder=tmp_path)
    assert mlflow.active_run() is None
    newest = mlflow.search_runs(output_format="list")[0]
    assert newest.info.run_id != run.info.run_id
    assert newest.info.status == "FINISHED"
    assert recorded_in(newest.info.run_id).complete

    with mlflow.start_run(run_id=run.info.run_id), pytest.raises(TrajectoryError, match="has a trajectory already"):
        fit(TrajectoryCallback(), folder=tmp_path)


class Failing(TrainerCallback):  # type: ignore[misc]
    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.fail)

    def fail(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("failed on purpose")


@pytest.mark.parametrize(
    ("event", "step"),
    [("on_step_begin", 2), ("on_substep_end", 3), ("on_pre_optimizer_step", 3), ("on_step_end", 4)],
)
def test_a_failed_training_leaves_an_incomplete_trajectory_and_no_hooks(
    store: str, tmp_path: Path, event: str, step: int
) -> None:
    callback = TrajectoryCallback()
    model = bert()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(callback, Failing(event, step), model=model, folder=tmp_path)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FAILED"
    assert mlflow.active_run() is None
    trajectory = recorded_in(run.info.run_id)
    assert not trajectory.complete
    assert trajectory.num_steps == step
    assert trajectory.verify(workload()).max_drift <= REPLAY_TOLERANCE
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_training_whose_frames_are_kept_is_closed_with_the_callback(store: str, tmp_path: Path) -> None:
    callbacks = [TrajectoryCallback()]
    try:
        fit(*callbacks, Failing("on_step_begin", 2), folder=tmp_path)
    except RuntimeError as error:
        kept = error  # As a debugger does, and with it every frame of the trainer.
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "RUNNING"

    mlflow.end_run()
    kept.with_traceback(None)
    callbacks.clear()
    del kept
    gc.collect()
    trajectory = recorded_in(run.info.run_id)
    assert (trajectory.complete, trajectory.num_steps) == (False, 2)
    assert trajectory.verify(workload()).max_drift <= REPLAY_TOLERANCE


@pytest.mark.slow
def test_a_process_that_dies_of_an_exception_closes_its_trajectory(store: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}\n"
        "from pathlib import Path\n"
        "from test_huggingface import Failing, TrajectoryCallback, fit, mlflow\n"
        f"mlflow.set_experiment('test')\nfit(TrajectoryCallback(), Failing('on_step_begin', 3), folder=Path('.'))"
    )
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "failed on purpose" in died.stderr
    (run,) = mlflow.search_runs(output_format="list")
    trajectory = recorded_in(run.info.run_id)
    assert (trajectory.complete, trajectory.num_steps) == (False, 3)
    assert trajectory.verify(workload()).max_drift <= REPLAY_TOLERANCE


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Digits())


def test_what_cannot_be_recorded_is_refused_before_a_parameter_changes(store: str, tmp_path: Path) -> None:
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (UnsupportedError, "autocast", {"bf16": True}),
        (InputError, "iterable dataset", {"train_set": Endless(), "max_steps": 2}),
    ]
    for error, message, settings in cases:
        model = bert()
        with pytest.raises(error, match=message):
            fit(TrajectoryCallback(), model=model, folder=tmp_path, **settings)
        for value, initial in zip(model.parameters(), bert().parameters(), strict=True):
            assert torch.equal(value, initial)
        assert mlflow.active_run() is None
        assert not any(module._forward_pre_hooks for module in model.modules())


class OutOfMemory(BertForSequenceClassification):
    """Takes batches of up to 4, from its forward pass number ``begins`` on."""

    begins = 0

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        if self.training:
            self.begins -= 1
            if len(input_ids) > 4 and self.begins < 0:
                raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


SEARCHING = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


@pytest.mark.slow
def test_the_batch_size_that_is_found_is_recorded(run_id: str, tmp_path: Path) -> None:
    trainer = fit(TrajectoryCallback(), model=bert(OutOfMemory), folder=tmp_path, **SEARCHING)
    trajectory = recorded_in(run_id)
    assert trajectory.complete
    largest = max(len(part) for t in range(trajectory.num_steps) for part in trajectory.step(t).indices)
    assert 1 <= largest <= 4
    assert_epochs_cover(trajectory)
    assert_ends_with(trajectory, trainer.model)
    assert trajectory.verify(workload()).max_drift <= REPLAY_TOLERANCE


@pytest.mark.slow
def test_a_batch_size_that_is_given_up_after_some_steps_is_refused_by_name(run_id: str, tmp_path: Path) -> None:
    model = bert(OutOfMemory)
    model.begins = 4
    with pytest.raises(UnsupportedError, match=r"auto_find_batch_size began training again, .* after [1-4] steps"):
        fit(TrajectoryCallback(), model=model, folder=tmp_path, **SEARCHING)
    assert not recorded_in(run_id).complete


def noisy() -> Any:
    from transformers.integrations.neftune import activate_neftune

    model = bert()
    activate_neftune(model, 5.0)
    return model


def test_neftune_is_said_and_replayed_by_a_model_that_has_it(
    run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(TrajectoryCallback(), folder=tmp_path, neftune_noise_alpha=5.0)
    (said,) = [record.getMessage() for record in caplog.records if "NEFTune" in record.getMessage()]
    assert "activate_neftune(model, 5.0)" in said
    trajectory = recorded_in(run_id)
    assert trajectory.verify(workload(model=noisy)).max_drift <= REPLAY_TOLERANCE
    # The first step of the warm-up moves the optimizer's state alone.
    with pytest.raises(TrajectoryError, match="or the workload does not do what the recorded loop did"):
        trajectory.verify(workload())
