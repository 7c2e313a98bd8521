"""Record the trajectory of a training loop that the user already has."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset

from dit_mlflow.accelerate_internals import torch_optimizer
from dit_mlflow.errors import InputError, TrajectoryError, checked_path
from dit_mlflow.recording.finite_check import FiniteCheck
from dit_mlflow.recording.folder import Written, check_new
from dit_mlflow.recording.guards import (
    AutocastCheck,
    ChangeCheck,
    Groups,
    Structure,
    check_model,
    check_parameters,
    check_scaler,
)
from dit_mlflow.recording.loader_patch import Handed
from dit_mlflow.recording.pending_step import PendingStep
from dit_mlflow.recording.recorded_model import RecordedModel, TrainingSet, resuming_step
from dit_mlflow.recording.watched_loader import Drawn, WatchedLoader
from dit_mlflow.recording.writer import TrajectoryWriter
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.optimizers import every
from dit_mlflow.told import logger_of
from dit_mlflow.torch_internals import found_infinite
from dit_mlflow.trajectory import Hyperparameters, State
from dit_mlflow.trajectory.manifest import FILE_NAME
from dit_mlflow.workload import Workload, WorkloadReference, floating_one
from dit_mlflow.workload.dataset_digest import is_inert
from dit_mlflow.workload.random_state import RandomState, preserved_random_state
from dit_mlflow.workload.workload import Optimizers
from dit_mlflow.workload.wrappers import unwrapped

logger = logger_of(__name__)


class TrajectoryRecorder:
    """Records every optimizer step made inside its ``with`` block.

    Three lines in an existing loop::

        with TrajectoryRecorder(model, optimizer, "trajectory") as recorder:    # 1
            for epoch in range(epochs):
                for x, y in recorder.watch(loader):                             # 2
                    optimizer.zero_grad()
                    loss = criterion(model(x), y).mean()
                    loss.backward()
                    optimizer.step()
                    recorder.log(loss=loss)                                     # 3, optional

    Training is bit for bit the same as without it: the recorder only reads parameters, random states and batches.

    Args:
        model: the module in training. Of a compiled model, and of ``DataParallel`` or (in one process)
            ``DistributedDataParallel``, the wrapped module is recorded.
        optimizer: over parameters of ``model``; several by name, if each step is made inside :meth:`one_step`.
        directory: a new folder, or with ``resume`` that of a trajectory.
        workload: what the loop trains; ``None`` = unknown. Its reference and coefficients are recorded too, and the
            first step is replayed with it before the second is made.
        checkpoint_every: ``"sqrt"`` stores ``s_t`` at ``t = 0, 1, 4, 9, … k*k …`` and at the end, about
            ``sqrt(T)`` states without knowing ``T``; ``n > 0`` stores every ``n``-th; ``0`` first and last only.
        low_precision: allow parameters in float16 or bfloat16, ``torch.autocast`` and ``GradScaler``. The workload's
            loss must then use autocast as the loop does, without scaling, and the loop must call :meth:`discard` when
            the scaler skips a step. Scores in the recorded precision have its rounding errors: over 120 steps of a
            small network, those in bfloat16 were off by 15 % of the largest score. ``track(dtype=torch.float64)`` is
            exact for the training in float64 from the same start on the same batches (autocast leaves float64 alone),
            which differed there from the recorded one by 0.4 % of the distance moved.
        store_batches: store every batch's tensors too, for data that cannot be fetched again: augmentation in worker
            processes, a dataset with a generator of its own. They take the space of the batches (64 images of 28 x 28
            in float32: 200 KB per step), in every epoch. Replay still fetches a batch of the same samples from the
            dataset, and fills its containers with the stored tensors.
        resume: continue the trajectory in ``directory``, if there is one, or the given one, in another folder. It
            continues from the last stored state that model and optimizer equal bit for bit when the ``with`` block is
            entered, and drops later steps. Loops that save themselves to be resumed call :meth:`checkpoint` at the same
            time.
        on_written: called from another thread with what has been written to the folder.

    A folder that can no longer be written (a full disk), or that is removed, does not stop training: the error is
    logged once and kept in :attr:`failure`, and the folder holds what could be saved. Of a process that ends without
    leaving the block, all that was recorded is kept; of one that is killed, what it had written, ten seconds before or
    less.

    Raises:
        InputError: ``checkpoint_every`` has another value, or ``directory`` is a file.
        OSError: the folder cannot be written when the block is entered.
        TrajectoryError: the folder already holds a trajectory, the optimizer is over another model, or the trajectory
            to be resumed is of another model or has no state equal to the model's. During training: the samples of a
            step are not known, something other than the optimizer changed parameters or the optimizer's state, the
            model got other parts (pruned, tied, replaced), or the workload does not replay the first step.
        UnsupportedError: the optimizer's step cannot be differentiated, several processes train, or, without
            ``low_precision``, training is in low precision (autocast and ``GradScaler`` are noticed at the first step).

    Cost: a copy of the batch's indices and hyperparameters per step, a copy of the state per checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        directory: str | Path,
        workload: Workload | None = None,
        checkpoint_every: str | int = "sqrt",
        *,
        low_precision: bool = False,
        store_batches: bool = False,
        resume: bool | Trajectory = False,
        on_written: Callable[[Written], None] | None = None,
    ) -> None:
        is_checkpoint = checkpoint_rule(checkpoint_every)
        self._hooked: set[str] = set()
        check_model(unwrapped(model), low_precision, self._hooked)
        if isinstance(optimizer, Optimizer):
            optimizer = torch_optimizer(optimizer)
        self._model = model
        self._recorded_model = RecordedModel(model, optimizer)
        if not resume:
            check_new(checked_path(directory))
        self._low_precision = low_precision
        self._store_batches = store_batches
        self._optimizer = optimizer
        self._workload = workload
        reference = None
        if workload is not None and workload.reference is not None:
            reference = WorkloadReference(reference=workload.reference, settings=dict(workload.settings))
        self._training_set = TrainingSet(None if workload is None else workload.num_samples)
        layouts = self._recorded_model.model_layout, self._recorded_model.optimizer_layout
        # The loop may change the current folder.
        self._writer = TrajectoryWriter(
            checked_path(directory).absolute(), *layouts, reference, self._training_set, on_written
        )
        self._resume = resume
        self._groups = Groups(optimizer)
        self._settings: tuple[Hyperparameters, ...] = ()
        self._changes = ChangeCheck(self._recorded_model.parameters)
        self._structure = Structure(self._recorded_model.model)
        self._finite = FiniteCheck(self._recorded_model.parameters)
        self._step = PendingStep(store_batches, workload)
        self._entered = self._inside = self._warned = False
        self._num_steps = 0
        self._stepping: tuple[int, int] | None = None
        self._depth = 0
        self._whole = False
        self._is_checkpoint = is_checkpoint
        self._latest = 0
        self._taken: State | None = None
        self._epoch = -1
        self._received_from: DataLoader[Any] | None = None
        self._iteration: int | None = None
        self._loaders: dict[int, tuple[DataLoader[Any], WatchedLoader]] = {}

    @property
    def directory(self) -> Path:
        return self._writer.directory

    @property
    def num_steps(self) -> int:
        """Steps recorded so far."""
        return self._num_steps

    @property
    def drawn_samples(self) -> np.ndarray:
        """Samples of the next step, in batch order, ``[sum B]``."""
        return self._step.samples

    @property
    def dataset(self) -> Dataset[Any] | None:
        """The training set, once a loader is watched."""
        return self._training_set.dataset

    @property
    def dataset_digest(self) -> str | None:
        """The training set's digest; known at the end of the block, for some data sets before."""
        return self._training_set.digest

    @property
    def failure(self) -> BaseException | None:
        """Why the last attempt to write the record failed; ``None`` if it did not."""
        return self._writer.failure

    def __enter__(self) -> TrajectoryRecorder:
        if self._entered:
            raise TrajectoryError(
                f"this recorder has been entered before, and wrote {self.directory}; make a new one for another "
                "training, or, with resume=True, for more of this one"
            )
        self._entered = True
        now = self._recorded_model.snapshot()
        begun = self._resume if isinstance(self._resume, Trajectory) else None
        if self._resume is True and (self.directory / FILE_NAME).is_file():
            begun = Trajectory.open(self.directory)
        if begun is None:
            self._writer.begin(now)
        else:
            self._go_on_with(begun, now)
        self._changes.note(now.parameters)
        self._groups.note_state()
        self._inside = True
        self._hooks = [register_optimizer_step_post_hook(self._after_other_step)]
        for optimizer in every(self._optimizer):
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        # If the block is never left (a notebook is closed), the record is saved.
        atexit.register(self._save)
        self._autocast_hooks = []
        if not self._low_precision:
            check = AutocastCheck(floating_one(self._recorded_model.parameters.values()).device.type)
            self._autocast_hooks = [module.register_forward_pre_hook(check) for module in self._model.modules()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._inside:
            return
        atexit.unregister(self._save)
        for hook in [*self._hooks, *self._autocast_hooks]:
            hook.remove()
        complete = False
        try:
            if kind is None and not self._writer.is_copy:
                self._warn_of_no_step()
                self._store_last_state()
            # The data set may be slow to read, or fail.
            self._save()
            self._training_set.complete()
            complete = kind is None
        finally:
            self._save(complete)
            self._inside = False
            self._writer.close()

    def watch(self, loader: DataLoader[Any]) -> WatchedLoader:
        """An iterable over the loader's own batches that tells the recorder which samples they hold.

        Raises:
            InputError: not a DataLoader over a map-style dataset.
        """
        _, watched = self._loaders.get(id(loader), (None, None))
        if watched is None:
            watched = WatchedLoader(loader, self._begin_pass, self._add, self._step.settle)
            self._loaders[id(loader)] = (loader, watched)
            self._training_set.note(loader.dataset)
        return watched

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Record all that is done inside it as one step: several optimizers, passes or models, averages of weights.

        Replay and influence need the same step as :attr:`Workload.step <dit_mlflow.Workload>`::

            for batch in recorder.watch(loader):
                with recorder.one_step():
                    loss = step(model, optimizers, batch, torch.ones(len(batch[0])))

        The step begins without gradients (it calls ``zero_grad`` itself) and is made of the batches drawn since the
        last one. An error inside it is not recorded as a step.

        Raises:
            InputError: inside of another ``one_step()``.
        """
        if self._whole:
            raise InputError("one_step() inside one_step(); expected one for each step: leave out the inner one")
        self._begin_step()
        modes = self._recorded_model.in_evaluation_mode()
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
        self._end_step(modes)

    def receive(self, loader: DataLoader[Any], handed: Handed) -> None:
        """For trainers with loaders of their own (see :class:`LoaderPatch`): this batch is about to be used."""
        if handed.batch is None and (self._store_batches or (self._workload and self._workload.coefficients)):
            raise InputError(
                "the tensors of this batch are not known, but store_batches or Workload.coefficients needs them; "
                "resume training at the end of an epoch"
            )
        if loader is not self._received_from:
            self._training_set.note(loader.dataset)
            self._received_from, self._iteration = loader, None
        if handed.iteration != self._iteration:
            self._iteration = handed.iteration
            if self._epoch < 0 or not handed.goes_on:
                self._begin_epoch()
        now = RandomState.capture()
        # If other batches were drawn in between, the state before the draw does not lead to the forward pass.
        before = handed.before if handed.before is not None and handed.after == now else now
        self._step.add(Drawn(handed.indices, self._epoch, before, handed.batch, now))

    def take_back(self) -> None:
        """Forget the batch drawn last, and only that: its gradient was not computed."""
        self._step.take_back()

    def weigh(self, coefficients: list[np.ndarray]) -> None:
        """Note ``c_i`` of the batches since the last step, one array for each."""
        self._step.weigh(coefficients)

    def log(self, loss: float | Tensor) -> None:
        """Record the loss of the step whose batch was drawn last. Optional."""
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        self._finite.loss(self._num_steps - (not self._step.has_batches), value, self._step.samples)
        self._step.log(value)

    def checkpoint(self) -> None:
        """Store the current state, and return when all that is recorded is on disk.

        Call it where a loop saves itself to be resumed later, between two steps and after :meth:`log`. Outside of the
        block, nothing is left to store.
        """
        if not self._inside:
            return
        if self._latest < self._num_steps:
            self._changes.check(self._num_steps, waits=True)
        self._take_state()
        self._save()

    def discard(self) -> None:
        """Forget the batches drawn since the last step, which the loop will not use.

        Call it where a loop continues without ``optimizer.step()``: a batch skipped by ``continue``, a step that a
        ``GradScaler`` skipped. The loop must also drop the gradients accumulated so far (``optimizer.zero_grad()``).
        """
        self._step.discard()

    def _save(self, complete: bool = False) -> None:
        """Write all that is recorded to disk."""
        self._step.settle(RandomState.capture())
        self._commit()
        self._writer.flush(complete)

    def _go_on_with(self, begun: Trajectory, now: State) -> None:
        """Continue a trajectory from its last state that equals ``now``."""
        step = resuming_step(begun, now, self._recorded_model)
        stored = begun.manifest.batches is not None
        if step > 0 and stored != self._store_batches:
            raise InputError(
                f"store_batches={self._store_batches}, but the trajectory that is continued was recorded with {stored}"
            )
        if step < begun.num_steps:
            logger.warning(
                "training goes on from step %d; the %d steps recorded after it are left out of the trajectory in %s",
                *(step, begun.num_steps - step, begun.directory),
            )
        self._epoch = begun.step(step - 1).epoch if step > 0 else -1
        self._writer.resume(begun.manifest, step, self._epoch if step > 0 else None)
        self._num_steps = self._latest = step

    def _begin_pass(self) -> int:
        """As :meth:`_begin_epoch`, of a watched loader.

        Raises:
            TrajectoryError: the block has not been entered, so that nothing would be recorded.
        """
        if not self._entered:
            raise TrajectoryError(
                "recorder.watch(loader) is iterated before the recorder is entered, so that no step would be recorded; "
                "train inside `with recorder:`"
            )
        if not self._inside and not self._warned:
            self._warned = True
            logger.warning(
                "recorder.watch(loader) is iterated after its with block: what is trained now is not part of the "
                "trajectory in %s",
                self.directory,
            )
        return self._begin_epoch()

    def _add(self, drawn: Drawn) -> None:
        if self._inside:
            self._step.add(drawn)

    def _begin_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._whole:
            return
        if self._optimizer is not optimizer:
            raise TrajectoryError(
                "several optimizers are recorded, so that a call of one's step() is not a step of training; make each "
                "step inside `with recorder.one_step():`, and give the same as Workload.step"
            )
        # The step of a subclass calls that of its base, whose hooks run too.
        now = self._num_steps, len(self._step.drawn)
        self._depth = self._depth + 1 if now == self._stepping else 1
        self._stepping = now
        if self._depth > 1:
            return
        if self._num_steps == 0 and not self._low_precision:
            check_scaler()
        self._begin_step()
        if self._low_precision and found_infinite(optimizer):
            self.discard()

    def _after_other_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Of every optimizer in this process: refuse one that trains the model beside the recorded."""
        if self._whole or self._depth or any(optimizer is one for one in every(self._optimizer)):
            return
        # Other models are trained too, also in other threads.
        if self._recorded_model.shares_with(optimizer) and (changed := self._changes.changed()):
            raise TrajectoryError(
                f"{type(optimizer).__name__}.step() changed parameter {changed[0]!r}, but the recorded optimizer is "
                f"{self._own_names}. If several train the model, give all of them by "
                "name, and make each step inside `with recorder.one_step():`. If another one takes over, leave this "
                "block before, and begin a new recorder with it"
            )

    def _begin_step(self) -> None:
        if self._writer.is_copy or not self._inside:
            where = "in another process, which forked this one" if self._inside else "and left"
            raise TrajectoryError(f"this recorder was entered {where}; make one here, with a folder of its own")
        if not self._step.has_batches:
            raise TrajectoryError(
                "optimizer.step() without a batch from recorder.watch(loader): the samples of this step are "
                "not known; iterate over recorder.watch(loader) instead of loader"
            )
        self._changes.check(self._num_steps)
        if self._structure.check(self._num_steps):
            self._recorded_model.note_modules()
        self._commit()
        if self._num_steps == 1 and self._workload is not None:
            self._try_replay(self._workload)
        self._settings = self._groups.settings()

    def _try_replay(self, workload: Workload) -> None:
        """Replay the first step now: a workload that is not what the loop does is refused before a long run."""
        if self._store_batches and not (self.dataset is not None and is_inert(self.dataset)):
            return  # Reading a sample again could change what the dataset draws next.
        self._writer.flush()
        with preserved_random_state():
            begun = Trajectory.open(self.directory)
            begun.replay(workload)
            begun.couples_samples(workload)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._whole:
            return
        self._depth -= 1
        if self._depth:
            return
        self._stepping = None
        if self._step.has_batches:
            self._end_step()

    def _end_step(self, modes: list[str] | None = None) -> None:
        """``modes``: of a whole step, the modules that it began in evaluation mode."""
        self._finite.step(self._num_steps, self._step.drawn)
        self._step.make(self._num_steps, self._settings, self._recorded_model, modes)
        self._num_steps += 1
        self._groups.note_state()
        if self._num_steps == 1:
            self._recorded_model.check_layouts(self._num_steps)
            check_parameters(self._recorded_model.parameters, self._hooked)
        while self._autocast_hooks:
            self._autocast_hooks.pop().remove()
        if self._is_checkpoint(self._num_steps):
            self._take_state()
        self._changes.note(None if self._taken is None else self._taken.parameters)

    def _take_state(self) -> None:
        """Copy the current state, unless it was copied already or recording has stopped."""
        if self._latest < self._num_steps and not self._writer.stopped:
            self._recorded_model.check_layouts(self._num_steps)
            check_parameters(self._recorded_model.parameters, self._hooked)
            self._taken = self._recorded_model.snapshot()
            self._finite.state(self._latest, self._num_steps, self._taken.parameters)
            self._latest = self._num_steps

    def _commit(self) -> None:
        """Hand the last step, whose loss is final, and the state after it to the writer."""
        # An interrupt between these lines loses nothing.
        if self._step.made is not None:
            self._writer.add_step(self._step.made.row, self._step.made.tensors)
            self._step.forget()
        if self._taken is not None:
            self._writer.add_checkpoint(self._latest, self._taken)
            self._taken = None

    def _store_last_state(self) -> None:
        """Take the last state, unless the parameters changed after the last step."""
        if not (self._num_steps and self._changes.changed(waits=True)):
            self._take_state()
        elif self._latest < self._num_steps:
            logger.warning(
                "the parameters changed after the last step (%d), inside the recorder's with block: weights loaded "
                "back (the best epoch's, averaged ones)? They are not part of the trajectory, whose last state is not "
                "stored and will be replayed from step %d. Load such weights after the block",
                *(self._num_steps - 1, self._latest),
            )
        elif self._step.has_batches:
            logger.warning(
                "the parameters changed after the last recorded step (%d), and batches were drawn since, but %s.step() "
                "was not called: what moved them is not part of the trajectory",
                *(self._num_steps - 1, self._own_names),
            )

    @property
    def _own_names(self) -> str:
        return " and ".join(type(optimizer).__name__ for optimizer in every(self._optimizer))

    def _warn_of_no_step(self) -> None:
        if not self._num_steps and self._step.has_batches:
            logger.warning(
                "batches were drawn, and no step was recorded: %s.step() was never called. Where parameters are "
                "moved by methods of another name (first_step, second_step), make each step inside "
                "recorder.one_step(), and give it as Workload.step",
                self._own_names,
            )


def checkpoint_rule(every: str | int) -> Callable[[int], bool]:
    """Whether ``s_t`` is to be stored, as a function of ``t``.

    Args:
        every: ``"sqrt"`` for square numbers, ``n > 0`` for every ``n``-th, ``0`` for none but the ends.

    Raises:
        InputError: ``every`` has another value.
    """
    if every == "sqrt":
        return lambda step: math.isqrt(step) ** 2 == step
    if isinstance(every, int) and every >= 0:
        return lambda step: every > 0 and step % every == 0
    raise InputError(f"checkpoint_every is {every!r}; expected 'sqrt', or a number of steps (0: only the ends)")
