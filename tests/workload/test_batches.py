"""Tensors in batches of any kind: moved in copies, in a stable order, and replaced."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_mlflow.workload.batches import tensors_of, to_like, with_tensors


@dataclass
class Nested:
    x: Tensor
    inner: dict[str, Any]
    made: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.made += 1


Named = namedtuple("Named", "x y")


class Swapped(Named):
    """Takes its fields in another order."""

    def __new__(cls, y: Any, x: Any) -> Swapped:
        return super().__new__(cls, x, y)


class Couple(tuple[Any, ...]):
    """A tuple that is not made of one argument, with an attribute."""

    def __new__(cls, one: Any, other: Any) -> Couple:
        made = super().__new__(cls, (one, other))
        made.also = one  # type: ignore[attr-defined]
        return made


class Tagged(dict[str, Any]):
    """A dict with an attribute, which its constructor does not take."""

    def __init__(self, *content: Any) -> None:
        super().__init__(*content)
        self.tag = "none"


def tagged() -> Tagged:
    found = Tagged({"x": x()})
    found.tag = "ours"
    found.also = x()  # type: ignore[attr-defined]
    return found


def x() -> Tensor:
    return torch.arange(3.0)


KINDS: list[Any] = [
    x(),
    [x(), (x(), "a")],
    {"x": x(), "n": None},
    OrderedDict(x=x(), y=x()),
    defaultdict(list, x=[x()]),
    UserDict({"x": x()}),
    MappingProxyType({"x": x()}),
    Named(x(), 1),
    Swapped(1, x()),
    Couple(x(), 1),
    Nested(x(), {"y": [x()]}),
    SimpleNamespace(x=x(), deep=SimpleNamespace(y=[x()], of=int, mode=torch.float16)),
    tagged(),
]


@pytest.mark.parametrize("batch", KINDS, ids=lambda batch: type(batch).__name__)
def test_tensors_are_moved_in_copies(batch: Any) -> None:
    before = tensors_of(batch)
    assert before
    moved = to_like(batch, torch.device("cpu"), torch.float64, fresh=True)
    assert type(moved) is type(batch)
    after = tensors_of(moved)
    assert [value.dtype for value in after] == [torch.float64] * len(before)
    for value in after:
        value.mul_(0)
    assert all(torch.equal(value, x()) for value in tensors_of(batch))
    numbered = [torch.full((2,), float(place)) for place in range(len(before))]
    given = tensors_of(with_tensors(batch, numbered))
    assert all(torch.equal(one, other) for one, other in zip(given, numbered, strict=True))


def test_what_is_not_a_tensor_is_kept() -> None:
    moved = to_like(Nested(x(), {}), torch.device("cpu"), None)
    assert moved.made == 1
    assert (
        to_like(SimpleNamespace(deep=SimpleNamespace(mode=torch.float16)), torch.device("cpu"), None).deep.mode
        is torch.float16
    )
    assert to_like(tagged(), torch.device("cpu"), None).tag == "ours"
    assert to_like({"n": np.arange(2.0)}, torch.device("cpu"), torch.float32)["n"].dtype == np.float32


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_tensors_that_share_memory_share_it_in_the_copy(dtype: torch.dtype | None) -> None:
    whole = torch.arange(40.0).reshape(10, 4)
    rows = whole[2:8]
    batch = {"x": rows, "first": rows[:, :2], "again": [rows], "apart": torch.ones(3), "other": whole[8:]}
    moved = to_like(batch, torch.device("cpu"), dtype, fresh=True)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(tensors_of(moved), tensors_of(batch), strict=True))
    moved["first"].zero_()
    assert not moved["x"][:, :2].any() and moved["x"][:, 2:].all() and torch.equal(moved["again"][0], moved["x"])
    assert rows[:, :2].any(), "the given batch is left alone"
    assert moved["x"].untyped_storage().nbytes() == rows.numel() * moved["x"].element_size(), "and no more is copied"
