"""The random generators a training step can draw from: capture, restore, and leave as found."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
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
        """Keep only the generators whose state differs in ``later``; ``None`` if there are none."""
        used = {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != getattr(later, field.name)
        }
        return RandomState(**used) if used else None

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
        before.restore()


def _byte_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
