"""Tensors of states and batches in safetensors files, named ``step/path``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.trajectory.manifest import TensorLayout
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.tensor_file import TensorFile

Key = TypeVar("Key")

SHARD_BYTES = 256 * 2**20
"""Bytes of tensors in one file at most, unless a single tensor is larger."""

SHARED_BYTES = 4096
"""Bytes; smaller tensors are stored at every checkpoint, changed or not."""

_SAMPLED = 1024
"""Elements that are compared before a whole tensor is."""


class Shard:
    """A safetensors file whose tensors are named by step: ``step/path``.

    Raises:
        TrajectoryError: it is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = TensorFile(path)
        self._keys: dict[int, dict[str, None]] = {}
        try:
            for name in self._file.names:
                step, _, key = name.partition("/")
                if str(int(step)) != step:
                    raise ValueError(f"{name!r} does not begin with a step")
                self._keys.setdefault(int(step), {})[key] = None
        except ValueError as error:
            raise TrajectoryError(f"{path} is not a readable shard: {error}") from error

    def keys(self, step: int) -> Collection[str]:
        """The paths of all tensors of a step."""
        return self._keys.get(step, {}).keys()

    def holds(self, step: int, key: str) -> bool:
        """Whether a tensor is here."""
        return key in self.keys(step)

    def layout(self, step: int, key: str) -> TensorLayout:
        """Shape and dtype of one tensor, by the header alone."""
        return self._file.layout(f"{step}/{key}")

    def tensor(self, step: int, key: str) -> Tensor:
        """A copy of one tensor."""
        return self._file.tensor(f"{step}/{key}")


def packed(sizes: Mapping[Key, int]) -> Iterator[list[Key]]:
    """The keys, in order, in groups whose sizes sum to at most :data:`SHARD_BYTES`, or of one."""
    group: list[Key] = []
    total = 0
    for key, size in sizes.items():
        if group and total + size > SHARD_BYTES:
            yield group
            group, total = [], 0
        group.append(key)
        total += size
    if group:
        yield group


class StoredOnce:
    """Finds the tensors of a state that equal those of an earlier checkpoint, and need not be stored again.

    All bytes must be equal. A sample of elements tells trained tensors apart; if it is equal, the stored tensor is read
    back and compared, so that no copy of frozen ones stays in memory.

    Args:
        load: reads a tensor of a written checkpoint.
    """

    def __init__(self, load: Callable[[int, str], Tensor]) -> None:
        self._load = load
        self._seen: dict[str, tuple[int, Tensor]] = {}
        self._noted: dict[str, tuple[int, Tensor]] = {}

    def home(self, step: int, key: str, value: Tensor, at_hand: Mapping[str, Tensor]) -> int:
        """The step under which ``value`` is stored: an earlier one, or ``step`` itself.

        ``at_hand``: tensors by ``step/key`` that are about to be written.
        """
        if value.nbytes < SHARED_BYTES:
            return step
        sample = _sample(value)
        seen = self._noted.get(key) or self._seen.get(key)
        if seen is not None and _same(seen[1], sample):
            at = f"{seen[0]}/{key}"
            before = at_hand[at] if at in at_hand else self._load(seen[0], key)
            if _same(before, value):
                return seen[0]
        self._noted[key] = (step, sample)
        return step

    def keep(self) -> None:
        """Remember what :meth:`home` was asked since the last call: it has been written."""
        self._seen |= self._noted
        self._noted = {}

    def forget(self) -> None:
        """Forget what :meth:`home` was asked since the last call: it has not been written."""
        self._noted = {}


def _sample(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)].clone()


def _same(one: Tensor, other: Tensor) -> bool:
    # Bytes, so that NaN equals itself and 0 differs from -0.
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def flatten(state: State) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors by ``parameters/<name>``, ``buffers/<name>``, ``optimizer/<key>/<name>``; other numbers apart."""
    tensors = {f"parameters/{name}": value for name, value in state.parameters.items()}
    tensors |= {f"buffers/{name}": value for name, value in state.buffers.items()}
    scalars: dict[str, dict[str, Any]] = {}
    for name, entry in state.optimizer.items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{name}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def unflatten(tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, Any]]) -> State:
    """The inverse of :func:`flatten`."""
    state = State({}, {}, {name: dict(entry) for name, entry in scalars.items()})
    for path, value in tensors.items():
        kind, _, name = path.partition("/")
        if kind == "parameters":
            state.parameters[name] = value
        elif kind == "buffers":
            state.buffers[name] = value
        else:
            key, _, owner = name.partition("/")
            state.optimizer.setdefault(owner, {})[key] = value
    return state
