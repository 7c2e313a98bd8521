"""Move, list and replace the tensors of batches of any type."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_mlflow.errors import TrajectoryError, WorkloadError, first_line

Batch = Any
"""What the collate function returns: a tensor or NumPy array, lists, tuples, dicts and dataclasses of them, or any
object that can be copied."""


def floating_one(tensors: Iterable[Tensor]) -> Tensor:
    """The first tensor of the floating dtype that most elements have: a model of these parameters computes in it.

    Others may come before it: codes of quantised weights, tables of indices, a scale in float64, a table in float16.
    """
    every = list(tensors)
    dtype = most_common((tensor.dtype, tensor.numel()) for tensor in every)
    return next(tensor for tensor in every if tensor.dtype == dtype)


def most_common(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The floating dtype of most elements, from dtypes and numbers of elements; the first one if none is floating."""
    found: dict[torch.dtype, int] = {}
    for dtype, size in sizes:
        found[dtype] = found.get(dtype, 0) + size
    floating = [dtype for dtype in found if dtype.is_floating_point]
    return max(floating or list(found)[:1], key=lambda dtype: found[dtype])


def to_like(batch: Batch, device: torch.device, dtype: torch.dtype | None, fresh: bool = False) -> Batch:
    """Move every tensor of ``batch`` to ``device``, and floating ones to ``dtype`` if one is given.

    Containers are rebuilt; ``fresh`` copies tensors even if they need not move, so that operations in place cannot
    change the given batch. Tensors that share memory with each other share it afterwards. NumPy arrays of numbers count
    as tensors, but stay arrays, in the host's memory.

    Raises:
        WorkloadError: the batch holds an object that cannot be copied.
    """
    met: list[_Place] = []

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=fresh)

    def note(tensor: Tensor) -> Tensor:
        if (place := _place(tensor)) is not None:
            met.append(place)
        return move(tensor)

    moved = map_tensors(batch, note)
    together = _overlapping(met)
    if not together:
        return moved
    parts: dict[_Place, Tensor] = {}

    def move_together(tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in together:
            return move(tensor)
        whole = _, start, end = together[place]
        if whole not in parts:
            parts[whole] = move(tensor.as_strided((end - start,), (1,), start))
        return parts[whole].as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset()) - start)

    return map_tensors(batch, move_together)


_Place = tuple[tuple[int, torch.dtype], int, int]
"""A storage as a dtype, and the first of its elements and the one behind the last that a tensor is made of."""


def _place(tensor: Tensor) -> _Place | None:
    """``None``: it has no elements, or no memory of one piece."""
    if tensor.layout != torch.strided or not tensor.numel() or tensor.is_nested:
        return None
    start = int(tensor.storage_offset())
    end = start + 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.untyped_storage().data_ptr(), tensor.dtype), start, end


def _overlapping(places: Sequence[_Place]) -> dict[_Place, _Place]:
    """The places of tensors that may see what is written into another, each with all that it is connected with."""
    groups: list[list[_Place]] = []
    for place in sorted(places, key=lambda place: (place[0][0], str(place[0][1]), *place[1:])):
        last = groups[-1] if groups else []
        if last and last[0][0] == place[0] and place[1] < max(end for _, _, end in last):
            last.append(place)
        else:
            groups.append([place])
    return {
        place: (group[0][0], group[0][1], max(end for _, _, end in group))
        for group in groups
        if len(group) > 1
        for place in group
    }


def tensors_of(batch: Batch, other: Callable[[Any], Any] | None = None) -> list[Tensor]:
    """The tensors in ``batch``, in the order of its containers, and copies of NumPy arrays of numbers.

    Args:
        other: see :func:`map_tensors`.
    """
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note, other)
    return found


def with_tensors(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """``batch`` with other tensors in place of its own, in the order of :func:`tensors_of`.

    Raises:
        TrajectoryError: the number of tensors differs.
    """
    expected = len(tensors_of(batch))
    if expected != len(tensors):
        raise TrajectoryError(
            f"a stored batch has {len(tensors)} tensors; the workload's have {expected}. It was recorded with "
            "another dataset or collate_fn"
        )
    given = iter(tensors)
    return map_tensors(batch, lambda _: next(given))


_NUMBERS = frozenset(map(np.dtype, ("?", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16")))
"""NumPy's dtypes that torch has too, in this machine's byte order."""


def map_tensors(batch: Batch, function: Callable[[Tensor], Tensor], other: Callable[[Any], Any] | None = None) -> Batch:
    """``batch`` in new containers, with ``function`` applied to its tensors.

    Args:
        other: applied to objects of other types; default: a deep copy, with ``function`` applied to the tensors that
            the object holds.

    Raises:
        WorkloadError: an object that cannot be copied.
    """

    def mapped(value: Any) -> Any:
        return map_tensors(value, function, other)

    if isinstance(batch, Tensor):
        return function(batch)
    if type(batch) is np.ndarray and batch.dtype in _NUMBERS:
        return function(torch.from_numpy(batch.copy())).cpu().numpy()
    if isinstance(batch, Mapping) and (type(batch) is dict or _is_its_content(batch)):
        content = {key: mapped(value) for key, value in batch.items()}
        return content if type(batch) is dict else type(batch)(content)  # type: ignore[call-arg]
    if type(batch) in (list, tuple, torch.Size):
        return type(batch)(map(mapped, batch))
    if isinstance(batch, (list, tuple)):
        # Not by its type, whose constructor may take other arguments.
        made: Any = copy.copy(batch) if isinstance(batch, list) else tuple.__new__(type(batch), map(mapped, batch))
        if isinstance(batch, list):
            list.__setitem__(made, slice(None), list(map(mapped, batch)))
        for name, value in getattr(batch, "__dict__", {}).items():
            object.__setattr__(made, name, mapped(value))
        return made
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        made = copy.copy(batch)
        names = [field.name for field in dataclasses.fields(batch) if hasattr(batch, field.name)]
        for name in dict.fromkeys([*names, *getattr(batch, "__dict__", {})]):
            object.__setattr__(made, name, mapped(getattr(batch, name)))
        return made
    return _copied(batch, function) if other is None else other(batch)


def _is_its_content(batch: Mapping[Any, Any]) -> bool:
    """Whether its type, called with its content, gives an equal mapping."""
    try:
        made: Mapping[Any, Any] = type(batch)(dict(batch))  # type: ignore[call-arg]
        same = made.keys() == batch.keys() and all(made[key] is batch[key] for key in batch)
    except (TypeError, ValueError, LookupError, AttributeError):
        return False
    return same and sorted(getattr(made, "__dict__", {})) == sorted(getattr(batch, "__dict__", {}))


def _copied(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if value is None or isinstance(value, (str, bytes, int, float, complex)):
        return value
    try:
        with OnDeepcopy(function):
            made = copy.deepcopy(value)
        if made is value and tensors_of(getattr(value, "__dict__", {}), other=lambda held: held):
            raise TypeError("its copy is itself")
        return made
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise WorkloadError(
            f"batches hold a {type(value).__qualname__}, which cannot be copied ({first_line(error)}); every step "
            "needs a copy of its batch, since a loss may change it. Give a collate_fn that returns tensors, in lists, "
            "tuples, dicts or dataclasses"
        ) from error


class OnDeepcopy(TorchFunctionMode):
    """Inside it, ``copy.deepcopy`` of a tensor applies ``function`` to it.

    Torch's own copies the whole storage: for a sample that is a view, all of its data set.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._function(args[0]) if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))
