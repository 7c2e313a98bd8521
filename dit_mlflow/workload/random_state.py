"""Capture and restore the random generators that a training step can draw from."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from dit_mlflow.errors import TrajectoryError, UnsupportedError


class RandomState(NamedTuple):
    """States of the global generators; ``None`` = not captured (not used by the step).

    Attributes:
        torch: bytes of ``torch.get_rng_state()``.
        cuda: bytes of the current CUDA device's generator.
        python: ``random.getstate()``.
        numpy: NumPy's legacy global generator, ``(name, key bytes, position, has_gauss, gauss)``.
    """

    torch: bytes | None = None
    cuda: bytes | None = None
    python: tuple[Any, ...] | None = None
    numpy: tuple[Any, ...] | None = None

    @classmethod
    def capture(cls) -> RandomState:
        """Read all generators without drawing from them."""
        name, key, *rest = np.random.get_state()  # noqa: NPY002
        return cls(
            torch=torch.get_rng_state().numpy().tobytes(),
            cuda=torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else None,
            python=random.getstate(),
            numpy=(name, np.asarray(key).tobytes(), *rest),
        )

    def used_since(self, later: RandomState) -> RandomState | None:
        """The states of the generators whose state differs in ``later``; ``None`` if there are none."""
        if self == later:
            return None
        return RandomState(**{k: value for k, value in self._asdict().items() if value != getattr(later, k)})

    def restore(self) -> None:
        """Set the captured generators; the others stay as they are."""
        if self.torch is not None:
            torch.set_rng_state(_byte_tensor(self.torch))
        if self.cuda is not None:
            if not torch.cuda.is_available():
                raise UnsupportedError(
                    "the recorded step drew random numbers on a GPU, and there is none here; replay it on a machine "
                    "that has one"
                )
            torch.cuda.set_rng_state(_byte_tensor(self.cuda))
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            name, key, *rest = self.numpy
            np.random.set_state((name, np.frombuffer(key, np.uint32), *rest))  # noqa: NPY002

    def encode(self) -> dict[str, bytes | None]:
        """Compact bytes by field, for storage; little-endian, as docs/format.md says."""
        return {
            "torch": None if self.torch is None else _torch_bytes(self.torch),
            "cuda": self.cuda,
            "python": None if self.python is None else _python_bytes(*self.python),
            "numpy": None if self.numpy is None else _numpy_bytes(*self.numpy),
        }

    @staticmethod
    def decode(name: str, stored: bytes) -> Any:
        """One generator's state from what :meth:`encode` made of it; raises :class:`TrajectoryError` otherwise."""
        try:
            return _DECODERS[name](stored)
        except (ValueError, RuntimeError, struct.error) as error:
            raise TrajectoryError(f"a stored random state ({name}) is no state of that generator: {error}") from error


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore every generator afterwards, whatever the body draws."""
    before = RandomState.capture()
    try:
        yield
    finally:
        if (moved := before.used_since(RandomState.capture())) is not None:
            moved.restore()


@contextmanager
def fixed_draws(device: torch.device) -> Iterator[None]:
    """Inside it, torch draws the same numbers every time; its CPU and ``device`` generators are restored afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def seed_generators(seed: int) -> None:
    """Seed all that :meth:`RandomState.capture` reads."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _torch_bytes(state: bytes) -> bytes:
    """Number of 64-bit words, their lower halves, then positions and values of the upper halves that are not 0.

    torch keeps each 32-bit word of its generator in 64 bits.
    """
    words = np.frombuffer(state, "<u8")
    upper = words >> 32
    at = upper.nonzero()[0]
    halves = (words.astype("<u4"), at.astype("<u4"), upper[at].astype("<u4"))
    return b"".join([len(words).to_bytes(4, "little"), *(part.tobytes() for part in halves)])


def _torch(stored: bytes) -> bytes:
    size, halves = int.from_bytes(stored[:4], "little"), np.frombuffer(stored[4:], "<u4").astype("<u8")
    if len(halves) < size or (len(halves) - size) % 2:
        raise ValueError(f"it has {len(halves)} half words, expected {size} and an even number of further ones")
    at, upper = halves[size:].reshape(2, -1)
    if (at >= size).any():
        raise ValueError(f"a position is not among the {size} words")
    words = halves[:size]
    words[at] |= upper << 32
    state = words.tobytes()
    _SCRATCH.set_state(_byte_tensor(state))
    return state


def _cuda(stored: bytes) -> bytes:
    if len(stored) != _CUDA_BYTES:
        raise ValueError(f"it has {len(stored)} bytes, expected {_CUDA_BYTES}")
    return stored


def _python_bytes(_: int, internal: tuple[int, ...], gauss: float | None) -> bytes:
    return _PYTHON.pack(*internal, math.nan if gauss is None else gauss)


def _python(stored: bytes) -> tuple[Any, ...]:
    *internal, gauss = _PYTHON.unpack(stored)
    state = (_PYTHON_VERSION, tuple(internal), None if math.isnan(gauss) else _finite(gauss))
    random.Random().setstate(state)
    return state


def _numpy_bytes(_: str, key: bytes, position: int, has_gauss: int, gauss: float) -> bytes:
    return _NUMPY.pack(key, position, has_gauss, gauss)


def _numpy(stored: bytes) -> tuple[Any, ...]:
    key, position, has_gauss, gauss = _NUMPY.unpack(stored)
    # NumPy itself takes any position, and would read beyond the key.
    if position > 624 or has_gauss > 1:
        raise ValueError(f"expected a position up to 624, and 0 or 1 held back; got {position} and {has_gauss}")
    return ("MT19937", key, position, has_gauss, _finite(gauss))


def _finite(gauss: float) -> float:
    """The second of a pair of normal numbers, which the generator keeps for the next draw."""
    if not math.isfinite(gauss):
        raise ValueError(f"a held back number is {gauss!r}")
    return gauss


_PYTHON_VERSION = 3
"""What ``random.getstate()`` begins with, in every Python 3."""
_PYTHON = struct.Struct("<625Id")
_NUMPY = struct.Struct("<2496s2Id")
_SCRATCH = torch.Generator()
_CUDA_BYTES = 16
_DECODERS = {"torch": _torch, "cuda": _cuda, "python": _python, "numpy": _numpy}


def _byte_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
