"""The workload: model, data, per-sample loss, and the loop's settings, which a method needs besides the trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from dit_mlflow.errors import DitError, UnsupportedError, WorkloadError
from dit_mlflow.told import text_of
from dit_mlflow.workload.appearance import Appearance, appearance_of, label_of
from dit_mlflow.workload.batches import Batch
from dit_mlflow.workload.random_state import preserved_random_state, seed_generators
from dit_mlflow.workload.wrappers import plain_copy

Optimizers = Optimizer | Mapping[str, Optimizer]
"""What trains a model: one optimizer, or several by name."""


def makes_batches(dataset: Dataset[Any]) -> bool:
    """Whether it fetches several samples at once, and may make them fit together (pad them to one length)."""
    if type(dataset) is Subset:  # It has the method, for the sake of datasets that have it.
        return makes_batches(dataset.dataset)
    return bool(getattr(dataset, "__getitems__", None))


def fetched(dataset: Dataset[Any], indices: Sequence[int] | np.ndarray) -> Any:
    """What torch's ``DataLoader`` hands to its ``collate_fn``."""
    several = getattr(dataset, "__getitems__", None)
    if several:
        return several([int(index) for index in indices])
    return [dataset[int(index)] for index in indices]


@dataclass(frozen=True, eq=False)
class Workload:
    """A training job, as far as influence depends on it.

    Attributes:
        model: a module (copied before use, never changed), or a factory ``() -> module``.
        loss: ``loss(model, batch) -> [B]``, one value per sample of the batch, in the batch's order.
        train_set: map-style dataset; sample ``i`` is ``train_set[i]``.
        validation_set: map-style dataset of the default query, the mean validation loss.
        optimizer, batch_size, epochs: ``optimizer(model) -> torch.optim.Optimizer`` (with :attr:`step`, also a mapping
            of several, by name), samples per micro-batch, passes over ``train_set``; only :func:`train` needs them.
        scheduler: ``scheduler(optimizer)``, stepped after each optimizer step.
        test_set: evaluated at the end of training, never used to choose anything.
        coefficients: ``coefficients(batch) -> [B]``, the factor ``c_i`` with which each sample's loss enters
            the step; default ``1 / (B * accumulate)``.
        accumulate: micro-batches per optimizer step.
        clip_grad_norm, clip_grad_value: gradient clipping before the optimizer step (norm first).
        regularizer: ``regularizer(model) -> scalar``, a loss term that belongs to no sample.
        collate_fn: joins samples to a batch; default ``torch.utils.data.default_collate``.
        corrupted: indices of deliberately damaged training samples, so that detection can be scored.
        describe: ``describe(index) -> str``, a line on the training sample for reports.
        show: ``show(index) -> Appearance``, the training sample as people see it: an image, a text or a table row (see
            :data:`dit_mlflow.workload.appearance.Appearance`); default: guessed from ``train_set[index]``.
        label: ``label(index) -> str``, the label of the training sample; default: from ``train_set[index]``.
        outputs: ``outputs(model, batch) -> [B, classes]`` logits (or ``[B]``, ``[B, 1]``: of class 1 against 0), for
            queries on them; default ``model(batch[0])``.
        targets: ``targets(batch) -> [B]``, the class of each sample, for queries and methods that ask for it; default
            ``batch[1]`` or ``batch["labels"]``.
        metrics: ``metrics(model, batch) -> {name: [B]}``, averaged over validation and test set and logged.
        step: ``step(model, optimizer, batch, weights) -> loss | None``: the whole training step of one batch, where it
            is not "the loss, then the optimizer": several networks, optimizers or passes, averages of weights. Ordinary
            PyTorch, from ``zero_grad`` to ``optimizer.step()``, in which sample ``i`` counts ``weights[i]`` times
            (``weights [B]``, all 1 in training): ``(weights * losses).mean()``. Its state is in ``model`` (one module
            that holds all networks) and in ``optimizer``, what :attr:`optimizer` gives; the loss is logged.
        reference, settings: where the workload came from; set by :func:`load_workload`, recorded with the
            trajectory, so that a later run can build the same workload.
    """

    model: nn.Module | Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    train_set: Dataset[Any]
    validation_set: Dataset[Any]
    optimizer: Callable[[nn.Module], Optimizers] | None = None
    batch_size: int | None = None
    epochs: int | None = None
    scheduler: Callable[[Any], LRScheduler] | None = None
    test_set: Dataset[Any] | None = None
    coefficients: Callable[[Batch], Tensor] | None = None
    accumulate: int = 1
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    regularizer: Callable[[nn.Module], Tensor] | None = None
    collate_fn: Callable[[list[Any]], Batch] | None = None
    corrupted: Sequence[int] = ()
    describe: Callable[[int], str] | None = None
    show: Callable[[int], Appearance] | None = None
    label: Callable[[int], str] | None = None
    outputs: Callable[[nn.Module, Batch], Tensor] | None = None
    targets: Callable[[Batch], Tensor] | None = None
    metrics: Callable[[nn.Module, Batch], Mapping[str, Tensor]] | None = None
    step: Callable[[nn.Module, Any, Batch, Tensor], Tensor | None] | None = None
    reference: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("train_set", "validation_set"):
            data = getattr(self, name)
            if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
                raise WorkloadError(
                    f"Workload.{name} is a {type(data).__name__}; expected a map-style dataset with "
                    "__len__ and __getitem__, because samples are known by their index"
                )
            if len(data) == 0:
                raise WorkloadError(f"Workload.{name} is empty; expected at least one sample")
        if self.test_set is not None and len(self.test_set) == 0:  # type: ignore[arg-type]
            raise WorkloadError("Workload.test_set is empty; expected at least one sample, or None")
        for name in ("batch_size", "epochs", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WorkloadError(f"Workload.{name} is {value}; expected 1 or more")
        if self.step is not None:
            self._check_step()
        outside = [index for index in self.corrupted if not 0 <= index < self.num_samples]
        if outside:
            raise WorkloadError(f"Workload.corrupted names samples {outside[:5]} outside 0 … {self.num_samples - 1}")

    def _check_step(self) -> None:
        if self.optimizer is None:
            raise WorkloadError("Workload.step is given without Workload.optimizer, which makes what it steps")
        parts = {"accumulate": 1, **dict.fromkeys(("coefficients", "clip_grad_norm", "clip_grad_value", "regularizer"))}
        for name, default in parts.items():
            if getattr(self, name) != default:
                raise WorkloadError(
                    f"Workload.step makes the whole step; do there what Workload.{name} does, and omit it"
                )

    @property
    def title(self) -> str:
        """A short name: the project's folder, and its model if it has such a setting."""
        parts = [
            (self.reference or "workload").rpartition("/")[2],
            text_of(self.settings.get("model", ""), TITLE_CHARACTERS),
        ]
        return " ".join(part for part in parts if part)

    @property
    def num_samples(self) -> int:
        """Number of training samples ``n``."""
        return len(self.train_set)  # type: ignore[arg-type]

    def build_model(self) -> nn.Module:
        """A new copy of the module, or of what the factory makes; of a compiled or parallel model, of what it wraps.

        Raises:
            WorkloadError: the factory fails; its settings may be those of a record.
        """
        if isinstance(self.model, nn.Module):
            return plain_copy(self.model)
        try:
            made = self.model()
        except DitError:
            raise
        except Exception as error:  # Any kind: it is the user's code.
            raise WorkloadError(f"the model cannot be built: {type(error).__name__}: {error}") from error
        return plain_copy(made)

    def batch(self, indices: Sequence[int] | np.ndarray, kept: np.ndarray | None = None) -> Batch:
        """The collated training samples ``indices``; see :meth:`collate`."""
        return self.collate(self.train_set, indices, kept)

    def collate(
        self, dataset: Dataset[Any], indices: Sequence[int] | np.ndarray, kept: np.ndarray | None = None
    ) -> Batch:
        """Samples ``indices`` of ``dataset`` as one batch, fetched as torch's ``DataLoader`` does.

        Args:
            dataset: its ``__getitems__`` is asked for all of them, if it has one, and else ``__getitem__`` for each.
            indices: of the samples.
            kept: bool, like ``indices``: which of them are in the batch; ``None`` = all. The others are fetched all the
                same, so that those that stay draw what they drew.
        """
        if self.collate_fn is None and type(dataset) is TensorDataset:
            picked = torch.as_tensor(np.asarray(indices)[slice(None) if kept is None else kept], dtype=torch.long)
            return [tensor.index_select(0, picked.to(tensor.device)) for tensor in dataset.tensors]
        samples = fetched(dataset, indices)
        if kept is not None and isinstance(samples, Sequence) and len(samples) == len(kept):
            samples = [sample for sample, stays in zip(samples, kept, strict=True) if stays]
        elif kept is not None:
            samples = fetched(dataset, np.asarray(indices)[kept])
        return (self.collate_fn or default_collate)(samples)

    def unvarying(self, dataset: Dataset[Any], indices: Sequence[int] | np.ndarray) -> Batch:
        """As :meth:`collate`, for samples outside of recorded steps: the result is the same every time.

        A sample's random augmentation is seeded by its index (by the first one's, where the dataset makes batches),
        ``collate_fn`` by 0. The generators are restored.
        """
        if self.collate_fn is None and type(dataset) is TensorDataset:
            return self.collate(dataset, indices)

        def seeded(index: int) -> Any:
            seed_generators(index)
            return dataset[index]

        with preserved_random_state():
            if makes_batches(dataset):
                seed_generators(int(indices[0]) if len(indices) else 0)
                samples = fetched(dataset, indices)
            else:
                samples = [seeded(int(index)) for index in indices]
            seed_generators(0)
            return (self.collate_fn or default_collate)(samples)

    def appearance(self, index: int) -> Appearance | None:
        """Training sample ``index`` as people see it; ``None`` = unknown."""
        return appearance_of(self.train_set[index]) if self.show is None else self.show(index)

    def label_of(self, index: int) -> str | None:
        """The label of training sample ``index`` as people read it; ``None`` = unknown."""
        return label_of(self.train_set[index]) if self.label is None else self.label(index)

    def batch_coefficients(self, batch: Batch, size: int) -> Tensor:
        """``c_i`` for a micro-batch of ``size`` samples, shape ``[size]``."""
        if self.coefficients is None:
            return torch.full((size,), 1.0 / (size * self.accumulate), dtype=torch.float64)
        coefficients = self.coefficients(batch)
        if coefficients.shape != (size,):
            raise WorkloadError(
                f"Workload.coefficients returned shape {list(coefficients.shape)} for a batch of {size} "
                f"samples; expected [{size}], one factor per sample"
            )
        return coefficients.detach()

    def sample_losses(self, model: nn.Module, batch: Batch, size: int) -> Tensor:
        """``loss(model, batch)``, checked to be one value per sample."""
        losses = self.loss(model, batch)
        if losses.shape != (size,):
            raise WorkloadError(
                f"Workload.loss returned shape {list(losses.shape)} for a batch of {size} samples; expected "
                f"[{size}], one value per sample (reduction='none'), since influence is asked per sample"
            )
        return losses

    def class_logits(self, model: nn.Module, batch: Batch, size: int) -> Tensor:
        """Logits ``[size, classes]``; a single output ``z`` per sample becomes ``(-z / 2, z / 2)``."""
        if self.outputs is None and isinstance(batch, Mapping):
            raise WorkloadError(
                f"Workload.outputs is needed to read logits from batches of type {type(batch).__name__}; "
                "give outputs(model, batch) -> [B, classes]"
            )
        found = model(batch[0]) if self.outputs is None else self.outputs(model, batch)
        if not isinstance(found, Tensor) or found.shape[:1] != (size,) or found.dim() > 2:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise WorkloadError(f"Workload.outputs gave {shape} for {size} samples; expected [{size}, classes] logits")
        if found.numel() == size:
            return torch.stack([-found.reshape(size) / 2, found.reshape(size) / 2], dim=1)
        return found

    def class_labels(self, batch: Batch, classes: int) -> Tensor:
        """Class numbers ``[B]`` of a batch; raises :class:`UnsupportedError` if its labels are none."""
        labels: Any
        if self.targets is not None:
            labels = self.targets(batch)
        elif isinstance(batch, Mapping):
            labels = batch.get("labels")
        else:
            labels = batch[1] if isinstance(batch, (list, tuple)) and len(batch) > 1 else None
        if not isinstance(labels, Tensor) or labels.dim() == 0:
            raise UnsupportedError(
                f"batches of type {type(batch).__name__} hold no tensor of labels, batch[1] or batch['labels'], which "
                "is needed here; give Workload.targets(batch) -> [B], if it is a classification"
            )
        whole = labels.reshape(-1).long()
        if (
            labels.numel() != len(labels)
            or not (whole == labels.reshape(-1)).all()
            or not 0 <= whole.min() <= whole.max() < classes
        ):
            raise UnsupportedError(
                f"labels of shape {list(labels.shape)} are not one class of 0 … {classes - 1} per sample, as is needed "
                "here; give Workload.targets(batch) -> [B], if it is a classification"
            )
        return whole

    @cached_property
    def plan(self) -> Plan:
        """The steps that :func:`train` will make, known before it starts."""
        missing = [name for name in ("optimizer", "batch_size", "epochs") if getattr(self, name) is None]
        if missing or self.batch_size is None or self.epochs is None:
            raise WorkloadError(f"Workload.{', Workload.'.join(missing)} must be given to train")
        micro_batches = math.ceil(self.num_samples / self.batch_size)
        per_epoch = math.ceil(micro_batches / self.accumulate)
        return Plan(tuple(per_epoch * epoch for epoch in range(1, self.epochs + 1)))


@dataclass(frozen=True)
class Plan:
    """The planned steps of a training, for windows.

    Attributes:
        epoch_ends: for each epoch, the step after its last one.
    """

    epoch_ends: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        return self.epoch_ends[-1]


TITLE_CHARACTERS = 100
"""Most characters of the model in a title."""
