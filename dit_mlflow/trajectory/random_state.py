"""The random generators a training step can draw from: capture, restore, and leave as found."""

from __future__ import annotations

import _random
import ctypes
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode


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
        """Read all generators without drawing from them. Cost: a few microseconds, if Python's and NumPy's rest."""
        cuda = _bytes(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None
        return cls(_bytes(torch.default_generator.get_state()), cuda, *_SLOW.read())

    def used_since(self, later: RandomState) -> RandomState | None:
        """Keep only the generators whose state differs in ``later``; ``None`` if there are none."""
        if self == later:
            return None
        return RandomState(**{k: value for k, value in self._asdict().items() if value != getattr(later, k)})

    def restore(self) -> None:
        """Set the captured generators; the others stay as they are."""
        if self.torch is not None:
            torch.set_rng_state(_byte_tensor(self.torch))
        if self.cuda is not None:
            torch.cuda.set_rng_state(_byte_tensor(self.cuda))
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            name, key, *rest = self.numpy
            np.random.set_state((name, np.frombuffer(key, np.uint32), *rest))  # noqa: NPY002

    def encode(self) -> dict[str, bytes | None]:
        """As plain bytes by field, for storage."""
        python = None if self.python is None else json.dumps(self.python).encode()
        numpy = None
        if self.numpy is not None:
            name, key, *rest = self.numpy
            numpy = json.dumps([name, np.frombuffer(key, np.uint32).tolist(), *rest]).encode()
        return {"torch": self.torch, "cuda": self.cuda, "python": python, "numpy": numpy}

    @classmethod
    def decode(cls, stored: Mapping[str, bytes | None]) -> RandomState:
        """The inverse of :meth:`encode`."""
        python = numpy = None
        if stored["python"] is not None:
            version, internal, gauss = json.loads(stored["python"])
            python = (version, tuple(internal), gauss)
        if stored["numpy"] is not None:
            name, key, *rest = json.loads(stored["numpy"])
            numpy = (name, np.asarray(key, np.uint32).tobytes(), *rest)
        return cls(stored["torch"], stored["cuda"], python, numpy)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave every generator as it was found, whatever the body draws."""
    before = RandomState.capture()
    try:
        yield
    finally:
        if (moved := before.used_since(RandomState.capture())) is not None:
            moved.restore()


class _Slow:
    """Python's and NumPy's global generators, read in full only when something in them has moved.

    Reading them number by number takes 10 and 40 microseconds of every training step; few loops draw from them.
    """

    def __init__(self) -> None:
        self._python: Any = random.getstate.__self__  # type: ignore[attr-defined]
        legacy: Any = np.random.get_state.__self__  # type: ignore[attr-defined]
        self._bits = _numpy_bits()
        # Others may keep their state behind a pointer.
        self._is_known = type(self._bits) is np.random.MT19937
        self._python_fields = _fields(self._python, _random.Random)
        self._numpy_fields = (*_fields(legacy, np.random.RandomState), *_fields(self._bits, type(self._bits)))
        self._python_seen: list[Any] = []
        self._numpy_seen: list[Any] = []
        self._states: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())

    def read(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """``random.getstate()``, and the tuple that :class:`RandomState` keeps for NumPy."""
        python = [self._python.gauss_next, *map(_RAW, self._python_fields)]
        if python != self._python_seen:
            self._python_seen, self._states = python, (random.getstate(), self._states[1])
        numpy = [*map(_RAW, self._numpy_fields)] if self._is_known else []
        if numpy != self._numpy_seen or _numpy_bits() is not self._bits or not self._is_known:
            name, key, *rest = np.random.get_state()  # noqa: NPY002
            self._numpy_seen, self._states = numpy, (self._states[0], (name, np.asarray(key).tobytes(), *rest))
        return self._states


def _fields(instance: object, cls: type) -> tuple[Any, Any]:
    """First and last fields that the C type ``cls`` keeps in ``instance``; their bytes are the attribute ``raw``.

    Of a Mersenne twister, these are the position in its 624 words and the first of them. Draws move the position, and
    all words change when it comes round, or with a new seed.
    """
    start, end = id(instance) + object.__basicsize__, id(instance) + cls.__basicsize__
    length = min(128, end - start)
    view = ctypes.c_char * length
    return view.from_address(start), view.from_address(end - length)


_RAW = attrgetter("raw")
_numpy_bits: Callable[[], object] = np.random.get_bit_generator  # type: ignore[attr-defined]
_SLOW = _Slow()


def _bytes(state: torch.Tensor) -> bytes:
    return (ctypes.c_char * state.nbytes).from_address(state.data_ptr()).raw


def _byte_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


class DrawsOf(TorchFunctionMode):
    """Inside it, random numbers for tensors of another floating dtype are drawn in ``dtype`` and then cast.

    A generator gives other numbers for float64 than for float32; a replay in float64 needs those of the record. Dropout
    draws the same mask in every dtype, and factories such as ``torch.randn(3)`` do not depend on the model's dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS_LIKE and kwargs.get("dtype") is None and args[0].is_floating_point():
            return func(*args, **{**kwargs, "dtype": self.dtype}).to(args[0].dtype)
        if func in _DRAWS_INTO and args[0].is_floating_point():
            return args[0].copy_(func(torch.empty_like(args[0], dtype=self.dtype), *args[1:], **kwargs))
        return func(*args, **kwargs)


_DRAWS_LIKE = {torch.rand_like, torch.randn_like}
_DRAWS_INTO = {
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.exponential_,
    torch.Tensor.log_normal_,
    torch.Tensor.cauchy_,
    torch.Tensor.geometric_,
}
