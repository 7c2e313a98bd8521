"""Whether row ``i`` of the per-sample loss depends on sample ``i``, and on no other sample."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from dit_mlflow.errors import WorkloadError, first_line
from dit_mlflow.replay.dynamics import Dynamics, Parameters
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.record import Record
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import OnDeepcopy, tensors_of, to_like
from dit_mlflow.workload.random_state import RandomState, preserved_random_state, seed_generators
from dit_mlflow.workload.workload import Workload, fetched, makes_batches

FEW, MANY = 2, 8
"""Number of samples that are replaced, one at a time: at first, and if one of these changes rows of others."""

STEPS = 4
"""Number of steps that are searched for a batch of two or more samples."""

LARGEST = 256
"""Largest number of a batch's samples that are used."""

_log = logger_of(__name__)


@dataclass(frozen=True, eq=False)
class Move:
    """The effect of another sample at ``position``: ``size [B]`` is the change of each row, 0 if it is rounding."""

    position: int
    size: Tensor

    @property
    def own(self) -> bool:
        return bool(self.size[self.position] > 0)

    @property
    def own_most(self) -> bool:
        return self.own and bool(self.size[self.position] == self.size.max())

    @property
    def others(self) -> bool:
        return int((self.size > 0).sum()) > self.own


class RowProbe:
    """Replaces samples of a recorded batch, one at a time, and observes which rows of the loss change.

    Args:
        trajectory, workload: what was recorded.
        record: the step.
        indices: different samples of one of its micro-batches.

    Cost: a copy of the model, and five forward passes; about thirty where samples are coupled.
    """

    def __init__(self, trajectory: Record, workload: Workload, record: StepRecord, indices: Sequence[int]) -> None:
        self._workload, self._record, self._indices = workload, record, indices
        self._dynamics = Dynamics(workload, trajectory.manifest)
        state = trajectory.checkpoint(0).to(self._dynamics.device)
        self._buffers = state.buffers
        self._parameters: Parameters = state.parameters
        self._items = self._fetched(indices)
        self._evaluating = False
        self._drew = False

    def coupled(self) -> bool:
        """Whether rows depend on other samples besides their own.

        Raises:
            WorkloadError: rows depend on other samples in place of their own.
        """
        found = self._moves(FEW)
        if not found:
            # If all parameters are 0 at the start, all samples may have the same loss.
            self._parameters = {name: _jittered(value) for name, value in self._parameters.items()}
            found = self._moves(FEW)
        if not any(move.others for move in found):
            return False
        for self._evaluating in (False, True):
            found = self._moves(MANY)
            if not any(move.others for move in found):
                break
            self._refuse_misaligned(found)
        return True

    def _refuse_misaligned(self, found: list[Move]) -> None:
        lost = [move for move in found if not move.own]
        if 2 * len(lost) <= len(found):
            # A loss that couples samples does not depend on their order, unless draws (mixup) belong to positions.
            own = sum(move.own_most for move in found)
            if self._drew or 2 * own >= len(found) or self._follows_order():
                return
            lost = [move for move in found if not move.own_most]
        move = lost[0]
        row = int(move.size.argmax())
        raise WorkloadError(
            "Workload.loss gives rows that belong to other samples: with another sample in place of sample "
            f"{self._indices[move.position]}, at place {move.position} of its batch, row {row} changes, and row "
            f"{move.position} {'changes less' if move.own else 'does not'}. Row i must be the loss of sample i of the "
            "batch: return the losses in the batch's order, not flipped, rolled, sorted or shuffled"
        )

    def _moves(self, count: int) -> list[Move]:
        """The effects of replacing up to ``count`` samples, without those that change nothing."""
        size = len(self._items)
        base = self._rows(range(size))
        if not _same(base, self._rows(range(size)), 0.75).all():
            _log.info("the loss draws from generators of its own, so the order of its rows was not checked")
            return []
        places = dict.fromkeys(position * size // count for position in range(count))
        return [move for place in places if (move := self._move(place, base)) is not None]

    def _move(self, position: int, base: Tensor) -> Move | None:
        size, everyone = len(self._items), range(len(self._items))
        shapes = self._shapes(everyone)
        for step in dict.fromkeys((max(1, size // 2), 1)):
            chosen = list(everyone)
            chosen[position] = (position + step) % size
            found = self._rows(chosen)
            moved = (found - base).abs().nan_to_num(0.0, 0.0, 0.0) * ~_same(found, base, 0.75)
            if moved[position] > 0 and self._shapes(chosen) != shapes:
                # Others may be padded to another length.
                moved = moved * torch.eye(size)[position]
            if moved.any():
                return Move(position, moved)
        return None

    def _follows_order(self) -> bool:
        """Whether permuting the samples permutes the rows alike."""
        order = list(range(len(self._items)))
        # A permutation that is neither a reflection nor a rotation, which a flipped or rolled loss would pass.
        order = [*order[1:2], *order[:1], *order[3:], *order[2:3]]
        return bool(_same(self._rows(order), self._rows(range(len(order)))[order], 0.5).all())

    def _rows(self, chosen: Sequence[int]) -> Tensor:
        batch = self._batch(chosen)

        def loss(model: nn.Module) -> Tensor:
            with torch.enable_grad():
                return self._workload.sample_losses(model, batch, len(chosen)).detach().cpu()

        parameters = {
            name: value.detach().requires_grad_(value.is_floating_point()) for name, value in self._parameters.items()
        }
        with preserved_random_state():
            seed_generators(0)
            before = RandomState.capture()
            if self._evaluating:
                found = self._dynamics.evaluate(parameters, self._buffers, loss)
            else:
                self._dynamics.set_modes(self._record)
                left = {name: value.clone() for name, value in self._buffers.items()}
                found = self._dynamics.call(parameters, left, loss)
            self._drew = before.used_since(RandomState.capture()) is not None
        return found

    def _batch(self, chosen: Sequence[int]) -> Any:
        with OnDeepcopy(lambda tensor: tensor.detach().clone()):
            items = [copy.deepcopy(self._items[position]) for position in chosen]
        with preserved_random_state():
            seed_generators(0)
            joined = (self._workload.collate_fn or default_collate)(items)
        return to_like(joined, self._dynamics.device, None, fresh=True)

    def _shapes(self, chosen: Sequence[int]) -> list[torch.Size]:
        return [tensor.shape for tensor in tensors_of(self._batch(chosen))]

    def _fetched(self, indices: Sequence[int]) -> list[Any]:
        data = self._workload.train_set
        if not makes_batches(data):
            return list(map(self._item, indices))
        with preserved_random_state():
            seed_generators(0)
            found = fetched(data, indices)
        if not isinstance(found, (list, tuple)) or len(found) != len(indices):
            raise TypeError(f"__getitems__ gives a {type(found).__name__}, not a list of samples")
        return list(found)

    def _item(self, index: int) -> Any:
        with preserved_random_state():
            seed_generators(index)
            return self._workload.train_set[index]


def samples_are_coupled(trajectory: Record, workload: Workload) -> bool:
    """Whether rows of the workload's loss depend on other samples of the batch (contrastive terms, batch statistics).

    Checked on one of the first batches; ``False`` where the check fails.

    Raises:
        WorkloadError: rows depend on other samples in place of their own.
    """
    for record, indices in _batches(trajectory):
        try:
            with preserved_random_state():
                return RowProbe(trajectory, workload, record, indices).coupled()
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
            _log.info("the order of the loss's rows could not be checked: %s", first_line(error))
            return False
    return False


def _batches(trajectory: Record) -> Iterator[tuple[StepRecord, list[int]]]:
    for t in range(min(STEPS, trajectory.num_steps)):
        record = trajectory.step(t)
        for met in record.indices:
            indices = list(dict.fromkeys(int(index) for index in met))[:LARGEST]
            if len(indices) > 1:
                yield record, indices


def _same(found: Tensor, expected: Tensor, power: float) -> Tensor:
    """Which rows are equal up to rounding: ``eps ** power`` times the largest."""
    if not found.is_floating_point():
        return found == expected
    finite = expected[expected.isfinite()]
    allowed = torch.finfo(found.dtype).eps ** power * (finite.abs().max() if len(finite) else 0.0)
    return ((found - expected).abs() <= allowed) | (found.isnan() & expected.isnan()) | (found == expected)


def _jittered(value: Tensor) -> Tensor:
    if not value.is_floating_point() or not value.numel():
        return value
    random = torch.Generator().manual_seed(0)
    size = max(float(value.double().square().mean().sqrt()), 0.1)
    return value + 0.1 * size * torch.randn(value.shape, generator=random).to(value)
