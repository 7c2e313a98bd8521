"""Which steps of a training go another way than those before."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from dit_mlflow.replay.paths import COMBINED, Paths

KINDS = [type(f"Operation{number}", (), {}) for number in range(12)]


def is_new(paths: Paths, index: int, operations: Counter[type], samples: int = 4) -> bool:
    record: Any = SimpleNamespace(index=index, indices=[np.arange(samples)], evaluation_mode=frozenset())
    paths.note(record, operations)
    return paths.is_new(record)


def test_a_network_that_draws_its_layers_is_looked_at_a_few_times() -> None:
    draws, paths = np.random.default_rng(0), Paths()
    drawn = [Counter(KINDS[kind] for kind in draws.choice(len(KINDS) - 1, 5)) for _ in range(300)]
    assert len(set(map(frozenset, drawn))) > 100
    found = [is_new(paths, index, operations) for index, operations in enumerate(drawn)]
    assert found[0]
    assert sum(found) <= COMBINED + len(KINDS)
    assert is_new(paths, 300, Counter([*drawn[0], KINDS[-1]]))


def test_other_counts_fewer_kinds_and_other_sizes_are_new_once() -> None:
    paths = Paths()
    usual = Counter({KINDS[0]: 2, KINDS[1]: 1})
    ways = [(usual, 4), (Counter({KINDS[0]: 3, KINDS[1]: 1}), 4), (Counter({KINDS[0]: 2}), 4), (usual, 3)]
    for first in (True, False):
        assert [is_new(paths, place, *way) for place, way in enumerate(ways)] == [first] * len(ways)
