"""Reading the generators is quick, and never misses a draw."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dit_mlflow.workload.random_state import RandomState, preserved_random_state

DRAWS: dict[str, Callable[[], Any]] = {
    "python": random.random,
    "python, a normal held back": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy, a normal held back": np.random.randn,
    "numpy, other distributions": lambda: np.random.binomial(50, 0.4),  # noqa: NPY002
    "torch": lambda: torch.rand(1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_is_seen_and_taken_back(name: str) -> None:
    draw = DRAWS[name]
    for _ in range(5):
        before = RandomState.capture()
        assert before.used_since(RandomState.capture()) is None
        drawn = draw()
        used = before.used_since(RandomState.capture())
        assert used is not None
        assert [field for field, value in used._asdict().items() if value is not None] == [name.split(",")[0]]
        used.restore()
        assert draw() == drawn


def test_captured_states_are_the_generators_own() -> None:
    order = random.Random(0)
    saved = [np.random.get_state()]  # noqa: NPY002
    actions = [
        *DRAWS.values(),
        lambda: np.random.seed(3),  # noqa: NPY002
        lambda: random.seed(3),
        lambda: saved.append(np.random.get_state()),  # noqa: NPY002
        lambda: np.random.set_state(order.choice(saved)),  # noqa: NPY002
    ]
    for _ in range(500):
        order.choice(actions)()
        found = RandomState.capture()
        name, key, *rest = np.random.get_state()  # noqa: NPY002
        assert found.numpy == (name, np.asarray(key).tobytes(), *rest)
        assert found.python == random.getstate()
        assert found.torch == torch.get_rng_state().numpy().tobytes()
        stored = {name: part for name, part in found.encode().items() if part is not None}
        assert RandomState(**{name: RandomState.decode(name, part) for name, part in stored.items()}) == found


def test_only_what_was_drawn_from_is_put_back() -> None:
    before = RandomState.capture()
    with preserved_random_state():
        for draw in DRAWS.values():
            draw()
    assert RandomState.capture() == before


def test_another_numpy_generator_is_read_as_it_is() -> None:
    own = np.random.get_bit_generator()  # type: ignore[attr-defined]
    try:
        np.random.set_bit_generator(np.random.MT19937(1))  # type: ignore[attr-defined]
        before = RandomState.capture()
        np.random.rand()  # noqa: NPY002
        assert before.numpy != RandomState.capture().numpy
    finally:
        np.random.set_bit_generator(own)  # type: ignore[attr-defined]
