"""Record what a Hugging Face Trainer does: ``Trainer(callbacks=[TrajectoryCallback()])``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("the Hugging Face callback needs transformers: pip install 'dit-mlflow[transformers]'") from error
from accelerate.data_loader import SkipBatchSampler
from accelerate.state import GradientState

from dit_mlflow.accelerate_internals import torch_loader, torch_optimizer
from dit_mlflow.errors import TrajectoryError, UnsupportedError
from dit_mlflow.recording.loader_patch import Handed, LoaderPatch
from dit_mlflow.told import logger_of
from dit_mlflow.tracking.recording.loss_share import LossShare
from dit_mlflow.tracking.recording.recorded_training import RecordedTraining
from dit_mlflow.workload import Workload

_log = logger_of(__name__)


class TrajectoryCallback(TrainerCallback):
    """Records what a ``transformers.Trainer`` trains as ``trajectory/`` of an MLflow run::

        trainer = Trainer(model, args, train_dataset=train_set, callbacks=[TrajectoryCallback()])
        trainer.train()

    The run is the active one (such as that of ``report_to="mlflow"``), or else a new one that ends with the training.
    The samples of each step are read from the loader that the trainer iterates, with the samplers that it or accelerate
    have put there. Training gives the same result, bit for bit, as without the callback.

    The workload for what was recorded:

    - ``model``: the trainer's model, built with ``attn_implementation="eager"`` for training too: other kernels draw
      other dropout masks and cannot be differentiated twice;
    - ``loss(model, batch)``: for each sample, the *sum* of the model's loss over the sample's labels (that are not
      -100); for one label per sample simply ``cross_entropy(logits, labels, reduction="none")``;
    - ``collate_fn``: the trainer's ``data_collator``;
    - ``clip_grad_norm``: ``max_grad_norm`` of the training arguments, 1.0 unless changed;
    - ``coefficients``, ``accumulate``: not needed as long as the model itself computes the loss from ``labels``. The
      factor of each sample's loss depends on trainer and model, so it is measured and recorded (see
      :class:`~dit_mlflow.tracking.recording.loss_share.LossShare`). In transformers 5.23 it is ``1 / N`` where the
      model divides by ``num_items_in_batch`` (``N`` labels in the whole step: ``LlamaForCausalLM``), and ``1 / B``
      where the model takes that argument but averages over the ``B`` labels of its micro-batch all the same
      (``BertForSequenceClassification``, ``BertForMaskedLM``): the trainer then does not divide by the number of
      micro-batches. Models without keyword arguments get ``1 / (B * A)`` for ``A`` micro-batches in the step, ``A``
      being smaller in the last of an epoch. With a ``compute_loss_func``, label smoothing, or several labels per sample
      that are no class numbers, nothing is recorded and the workload's ``coefficients`` count.

    NEFTune (``neftune_noise_alpha``) draws noise that replay draws again, if ``model`` gives a model with it:
    ``activate_neftune(model, alpha)`` of ``transformers.integrations.neftune``. With ``auto_find_batch_size``, the
    attempt that makes a first step is recorded; one that begins again after it is refused. Columns that the trainer
    removes from a data set (``remove_unused_columns``) may stay in the workload's ``train_set``.

    The trainer draws batches ahead. A collator or dataset that draws random numbers (masking, augmentation) therefore
    needs ``store_batches=True``; without it, replay refuses the trajectory.

    If training fails, the trainer calls no callback. The recording is then closed, as an incomplete trajectory, when
    Python frees the frames of the trainer's loop (usually once the exception has been handled), and at the latest when
    the next training begins, the callback is garbage-collected, or the process ends.

    A training resumed from a checkpoint is recorded from there on (with ``resume=True``, as the continuation of the
    run's trajectory). Resumed in the middle of an epoch, it cannot have ``store_batches`` or ``Workload.coefficients``.

    Args:
        workload: describes the training; if given, the first step is replayed, as a check, before the second is made.
        run_id: the run; default: as above.
        options: ``live`` (influence while training runs) and ``resume`` of
            :func:`~dit_mlflow.tracking.record_trajectory`; further arguments of :class:`dit_mlflow.TrajectoryRecorder`:
            ``checkpoint_every``, ``store_batches``, ``low_precision``, …

    Raises, from ``train`` and before a parameter changes:
        InputError: the training set is not map-style; ``live`` with a workload that has no name to load it by.
        UnsupportedError: several processes, low precision without ``low_precision``, an unsupported optimizer.
    """

    def __init__(self, workload: Workload | None = None, run_id: str | None = None, **options: Any) -> None:
        self._arguments = (workload, run_id, options)
        self._training: RecordedTraining | None = None
        self._share: LossShare | None = None
        self._num_batches = 0
        self._abandon: weakref.finalize[..., TrajectoryCallback] | None = None

    def on_train_begin(self, args: Any, *_: Any, **kwargs: Any) -> None:
        if self._abandon is not None:
            self._abandon()
        before = self._training
        if args.auto_find_batch_size and before is not None and before.num_steps:
            raise UnsupportedError(
                f"auto_find_batch_size began training again, with the weights as they were, after {before.num_steps} "
                "steps that are recorded; a run holds one training. Record with a per_device_train_batch_size that "
                "fits, and without auto_find_batch_size"
            )
        if args.neftune_noise_alpha is not None:
            _log.warning(
                "training adds NEFTune noise to the embeddings; replay needs it too: have Workload.model return a "
                "model to which transformers.integrations.neftune.activate_neftune(model, %s) was applied",
                args.neftune_noise_alpha,
            )
        self._share, self._num_batches = None, 0
        self._training = RecordedTraining(*self._arguments)
        self._abandon = weakref.finalize(self, self._training.abandon)
        with self._failing():
            self._training.watch(torch_loader(kwargs["train_dataloader"]))

    def on_step_begin(
        self, *_: Any, model: nn.Module | None = None, optimizer: Optimizer | None = None, **kwargs: Any
    ) -> None:
        training = self._training
        if training is None or training.closed:
            return
        with self._failing():
            if not training.begun:
                # Only now have all other callbacks begun, among them the one that starts an MLflow run.
                assert model is not None and optimizer is not None
                training.begin(model, torch_optimizer(optimizer))
                self._share = LossShare(model)
                training.at_close(self._share.remove)
            self._next_batch(training)

    def on_substep_end(self, *_: Any, **kwargs: Any) -> None:
        training = self._training
        if training is None or training.closed:
            return
        with self._failing():
            self._used(training)
            self._next_batch(training)

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        training = self._training
        if training is None or training.closed or self._share is None:
            return
        with self._failing():
            self._used(training)
            training.before_step(*self._share.take(self._num_batches))
            self._num_batches = 0

    def on_epoch_end(self, *_: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.end_epoch()

    def on_save(self, *_: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.checkpoint()

    def on_log(self, *_: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        # The last event before load_best_model_at_end, after which the model is another one.
        if self._training is not None and "train_runtime" in (logs or {}):
            self._training.checkpoint()

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self._end()

    def _next_batch(self, training: RecordedTraining) -> None:
        assert training.patch is not None
        training.next_batch(training.patch.take() or _resumed(training.patch))

    def _used(self, training: RecordedTraining) -> None:
        training.used()
        self._num_batches += 1

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Close the recording if an error is raised: it ends the training, and no callback is called."""
        try:
            yield
        except BaseException as error:
            self._end(error)
            raise

    def _end(self, error: BaseException | None = None) -> None:
        training, self._training = self._training, None
        self._share, self._num_batches = None, 0
        if training is not None:
            training.close(error)
        if self._abandon is not None:
            self._abandon.detach()


def _resumed(patch: LoaderPatch) -> Handed | None:
    """A trainer resumed in the middle of an epoch iterates a loader of its own over the watched samplers."""
    sampler = getattr(GradientState().active_dataloader, "batch_sampler", None)
    if not isinstance(sampler, SkipBatchSampler) or sampler.batch_sampler is not patch.sampler:
        raise TrajectoryError(
            "the trainer draws its batches from another loader than the one that it showed its callbacks, so the "
            "samples of a step are not known"
        )
    return patch.take_noted(sampler.skip_batches)
