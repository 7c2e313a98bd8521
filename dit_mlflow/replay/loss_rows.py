"""Whether row ``i`` of the per-sample loss depends on sample ``i``, and on no other sample."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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

OTHER_SIZE, SECONDS = 4, 1.0
"""So many times a batch's samples are used in evaluation mode, or as many as can be fetched in so many seconds."""

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


class Rows(NamedTuple):
    """A batch's losses ``[B]``, and the shapes of its tensors."""

    losses: Tensor
    shapes: list[torch.Size]


class RowProbe:
    """Replaces samples of a recorded batch, one at a time, and observes which rows of the loss change.

    Args:
        trajectory, workload: what was recorded.
        record: the step.
        indices: different samples of one of its micro-batches.
        known: samples that other probes of the workload have fetched, by index; is added to.

    Cost: a copy of the model, and eight forward passes, half of them of :data:`OTHER_SIZE` times the samples; about
    forty where samples are coupled.
    """

    def __init__(
        self,
        trajectory: Record,
        workload: Workload,
        record: StepRecord,
        indices: Sequence[int],
        known: MutableMapping[int, Any],
    ) -> None:
        self._workload, self._record = workload, record
        self._indices = list(indices)
        self._known = known
        self._dynamics = Dynamics(workload, trajectory.manifest)
        stored = min(trajectory.checkpoint_steps, key=lambda step: abs(step - record.index))
        state = trajectory.checkpoint(stored).to(self._dynamics.device)
        self._buffers = state.buffers
        self._parameters: Parameters = state.parameters
        self._items = self._fetched(indices)
        self._evaluating = False
        self._drew = False

    def coupled(self) -> bool:
        """Whether rows depend on other samples besides their own, in training or in evaluation mode.

        Raises:
            WorkloadError: rows depend on other samples in place of their own.
        """
        found = self._moves(FEW)
        if not found:
            # If all parameters are 0 at the start, all samples may have the same loss.
            self._parameters = {name: _jittered(value) for name, value in self._parameters.items()}
            found = self._moves(FEW)
        in_training = self._coupled_by(found)
        self._evaluating = True
        self._take_more()
        return self._coupled_by(self._moves(FEW)) or in_training

    def _take_more(self) -> None:
        """Take samples besides the batch's: methods that look at states take other sizes of batches than training."""
        size = min(LARGEST, OTHER_SIZE * len(self._indices), self._workload.num_samples)
        before = frozenset(self._indices)
        others = [index for index in range(size) if index not in before][: size - len(before)]
        if makes_batches(self._workload.train_set):
            self._indices += others
            self._items = self._fetched(self._indices)
            return
        ended = time.monotonic() + SECONDS
        for index in others:
            if time.monotonic() > ended:
                break
            self._indices.append(index)
            self._items.append(self._item(index))

    def _coupled_by(self, few: list[Move]) -> bool:
        if not any(move.others for move in few):
            return False
        found = self._moves(MANY)
        self._refuse_misaligned(found)
        return any(move.others for move in found)

    def _refuse_misaligned(self, found: list[Move]) -> None:
        lost = [move for move in found if not move.own]
        if 2 * len(lost) <= len(found):
            # A loss that couples samples does not depend on their order, unless draws (mixup) belong to positions. Its
            # rows may be those of neighbours too, or all alike, or 0 where others are preferred.
            if self._drew or (not lost and 2 * sum(move.own_most for move in found) >= len(found)):
                return
            if self._follows_order():
                return
            lost = lost or [move for move in found if not move.own_most]
        move = lost[0]
        row = int(move.size.argmax())
        how = f"{'changes less' if move.own else 'does not'}{' (in evaluation mode)' if self._evaluating else ''}"
        raise WorkloadError(
            "Workload.loss gives rows that belong to other samples: with another sample in place of sample "
            f"{self._indices[move.position]}, at place {move.position} of its batch, row {row} changes, and row "
            f"{move.position} {how}. Row i must be the loss of sample i of the batch: return the losses in "
            "the batch's order, not flipped, rolled, sorted or shuffled"
        )

    def _moves(self, count: int) -> list[Move]:
        """The effects of replacing up to ``count`` samples, without those that change nothing.

        If these change no other rows, but a permutation of all samples does not permute the rows alike, they are of
        samples whose rows it shows to be wrong.
        """
        size = len(self._items)
        base = self._rows(range(size))
        found = self._moves_at([position * size // count for position in range(count)], base)
        suspects: list[int] = []
        # Draws (dropout) may belong to positions.
        if found and not self._drew and not any(move.others for move in found):
            order = _cycle(size)
            apart = (~_same(self._rows(order).losses, base.losses[order], 0.5)).nonzero().flatten().tolist()
            suspects = [position for row in apart for position in (row, order[row])]
        if suspects or any(move.others for move in found):
            if not _same(base.losses, self._rows(range(size)).losses, 0.75).all():
                _log.info("the loss draws from generators of its own, so the order of its rows was not checked")
                return []
            found += self._moves_at(list(dict.fromkeys(suspects))[:MANY], base)
        return found

    def _moves_at(self, positions: Sequence[int], base: Rows) -> list[Move]:
        return [move for place in dict.fromkeys(positions) if (move := self._move(place, base)) is not None]

    def _move(self, position: int, base: Rows) -> Move | None:
        size = len(self._items)
        for step in dict.fromkeys((max(1, size // 2), 1)):
            chosen = list(range(size))
            chosen[position] = (position + step) % size
            found, shapes = self._rows(chosen)
            moved = (found - base.losses).abs().nan_to_num(0.0, 0.0, 0.0) * ~_same(found, base.losses, 0.75)
            if moved[position] > 0 and shapes != base.shapes:
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
        return bool(_same(self._rows(order).losses, self._rows(range(len(order))).losses[order], 0.5).all())

    def _rows(self, chosen: Sequence[int]) -> Rows:
        batch = self._batch(chosen)
        shapes = [tensor.shape for tensor in tensors_of(batch)]

        def loss(model: nn.Module) -> Tensor:
            before = RandomState.capture()
            with torch.enable_grad():
                found = self._workload.sample_losses(model, batch, len(chosen)).detach().cpu()
            self._drew = before.used_since(RandomState.capture()) is not None
            return found

        parameters = {
            name: value.detach().requires_grad_(value.is_floating_point()) for name, value in self._parameters.items()
        }
        with preserved_random_state():
            seed_generators(0)
            if self._evaluating:
                return Rows(self._dynamics.evaluate(parameters, self._buffers, loss), shapes)
            self._dynamics.set_modes(self._record)
            left = {name: value.clone() for name, value in self._buffers.items()}
            return Rows(self._dynamics.call(parameters, left, loss), shapes)

    def _batch(self, chosen: Sequence[int]) -> Any:
        items = [self._items[position] for position in chosen]
        if self._workload.collate_fn is not None:
            # It may change them; torch's own copies.
            with OnDeepcopy(lambda tensor: tensor.detach().clone()):
                items = list(map(copy.deepcopy, items))
        with preserved_random_state():
            seed_generators(0)
            joined = (self._workload.collate_fn or default_collate)(items)
        return to_like(joined, self._dynamics.device, None, fresh=True)

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
        if index not in self._known:
            with preserved_random_state():
                seed_generators(index)
                self._known[index] = self._workload.train_set[index]
        return self._known[index]


def samples_are_coupled(
    trajectory: Record,
    workload: Workload,
    first: int = 0,
    last: int | None = None,
    known: MutableMapping[int, bool] | None = None,
) -> bool:
    """Whether rows of the workload's loss depend on other samples of the batch (contrastive terms, batch statistics).

    Checked on one of training's first batches; and, since losses and modes may change in training, on the last one of
    some steps, and of the last epoch that ends among them if that has another size. ``False`` where the check fails.

    Args:
        trajectory, workload: what was recorded.
        first, last: the steps ``first … last - 1`` that are asked about; default: all. No others are read, but for
            training's first: the record may be remote.
        known: what earlier calls found, by step; is added to.

    Raises:
        WorkloadError: rows depend on other samples in place of their own.
    """
    found = {} if known is None else known
    looked_at = list(_batches(trajectory, first, trajectory.num_steps if last is None else last))
    items: dict[int, Any] = {}
    for record, indices in looked_at:
        if record.index in found:
            continue
        found[record.index] = False
        try:
            with preserved_random_state():
                found[record.index] = RowProbe(trajectory, workload, record, indices, items).coupled()
        except WorkloadError:
            del found[record.index]
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
            _log.info("the order of the loss's rows could not be checked: %s", first_line(error))
    return any(found[record.index] for record, _ in looked_at)


def _batches(trajectory: Record, first: int, last: int) -> Iterator[tuple[StepRecord, list[int]]]:
    """Steps of different kinds, each with samples of one of its batches that are all different."""
    usual = _usable(trajectory, range(min(STEPS, trajectory.num_steps)))
    if usual is None:
        return
    yield usual
    ended = max((end for end in trajectory.epoch_ends if first < end <= last), default=last)
    for t in sorted({ended - 1, last - 1} - set(range(usual[0].index + 1))):
        found = _usable(trajectory, [t])
        if found is not None and (t == last - 1 or len(found[1]) != len(usual[1])):
            yield found


def _usable(trajectory: Record, steps: Iterable[int]) -> tuple[StepRecord, list[int]] | None:
    """The first of the steps with a batch of two or more samples."""
    for t in steps:
        record = trajectory.step(t)
        for met in record.indices:
            indices = list(dict.fromkeys(int(index) for index in met))[:LARGEST]
            if len(indices) > 1:
                return record, indices
    return None


def _cycle(size: int) -> list[int]:
    """A permutation in one random cycle: no other one commutes with it, but for its powers."""
    places = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    return [there for _, there in sorted(zip(places, [*places[1:], places[0]], strict=True))]


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
