"""What is read back of steps is what was written, bit for bit; equal parts are read once."""

from __future__ import annotations

import math
import random
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_mlflow.trajectory.manifest import Manifest, ModelLayout, OptimizerLayout, StepsFile, TensorLayout
from dit_mlflow.trajectory.step_record import StepFields, StepRecord
from dit_mlflow.trajectory.steps_file import read_steps, steps_tensors
from dit_mlflow.trajectory.tensor_file import write_tensors
from dit_mlflow.workload.random_state import RandomState, preserved_random_state

LARGEST = 2**63 - 1
(QUIET,) = struct.unpack("<d", bytes.fromhex("010000000000f87f"))  # NaN, with a payload of its own.
FLOATS = st.sampled_from([-0.0, 5e-324, float("inf"), QUIET, 0.1]) | st.floats()
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-LARGEST, LARGEST), FLOATS)
SETTINGS = st.one_of(SCALARS, st.lists(SCALARS, max_size=3).map(tuple))
OTHER_SETTINGS = st.one_of(SETTINGS, st.text(), st.lists(st.text(), max_size=2).map(tuple))
COUNTS = st.one_of(st.integers(0, 5), st.integers(0, LARGEST))


@cache
def captured_states() -> list[RandomState]:
    """States of the generators on the CPU, some with a normal number held back."""
    found = []
    with preserved_random_state():
        for seed in (0, 2**32 - 1):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            for _ in range(4):
                found.append(RandomState.capture())
                torch.randn(1), random.gauss(0, 1), np.random.randn()  # noqa: NPY002
    return found


@st.composite
def random_states(draw: Any) -> RandomState | None:
    """Of some generators."""
    torch_state, python, numpy = (draw(st.sampled_from(captured_states()))[field] for field in (0, 2, 3))
    whole = RandomState(torch_state, draw(st.binary(min_size=16, max_size=16)), python, numpy)
    kept = draw(st.sets(st.sampled_from(RandomState._fields)))
    return RandomState(**{name: getattr(whole, name) for name in kept}) if kept else None


@st.composite
def recorded_steps(draw: Any) -> tuple[Manifest, list[StepFields]]:
    names = draw(st.lists(st.text(), min_size=1, max_size=4, unique=True))
    defaults = draw(st.dictionaries(st.text().filter(lambda name: name != "params"), SETTINGS, max_size=3))
    num_samples = draw(st.integers(1, LARGEST))
    groups = draw(st.integers(1, 3))

    def alike(value: Any) -> st.SearchStrategy[Any]:
        return st.tuples(*[SCALARS] * len(value)) if isinstance(value, tuple) else SCALARS

    @st.composite
    def group(draw: Any) -> dict[str, Any]:
        others = draw(st.dictionaries(st.text().filter(lambda name: name != "params"), OTHER_SETTINGS, max_size=2))
        return others | {name: draw(alike(value)) for name, value in defaults.items()}

    known_settings = draw(st.lists(st.tuples(*[group()] * groups), min_size=1, max_size=3))
    first = draw(st.one_of(st.just(0), st.integers(0, LARGEST - 10)))
    steps: list[StepFields] = []
    for t in range(draw(st.integers(1, 5))):
        sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        indices = [draw(st.tuples(*[st.integers(0, num_samples - 1)] * size)) for size in sizes]
        is_array = draw(st.booleans())
        factors = FLOATS.filter(math.isfinite)
        without_gradient = draw(st.lists(st.sampled_from(names), unique=True))
        zero = draw(st.integers(0, len(without_gradient)))
        steps.append(
            {
                "index": first + t,
                "epoch": draw(COUNTS),
                "indices": [np.array(part) for part in indices] if is_array else list(indices),
                "coefficients": draw(
                    st.none() | st.just([np.array([draw(factors) for _ in range(size)]) for size in sizes])
                ),
                "hyperparameters": draw(st.sampled_from(known_settings)),
                "loss": draw(st.none() | FLOATS),
                "random_states": [draw(random_states()) for _ in sizes],
                "evaluation_mode": draw(st.lists(st.text(), max_size=2, unique=True)),
                "no_gradient": without_gradient[zero:],
                "zero_gradient": without_gradient[:zero],
            }
        )
    return manifest_of(names, defaults, groups, num_samples), steps


def manifest_of(names: list[str], defaults: dict[str, Any], groups: int, num_samples: int) -> Manifest:
    model = ModelLayout(name="", parameters=dict.fromkeys(names, TensorLayout(shape=(), dtype="float32")), buffers={})
    layout = OptimizerLayout(name="SGD", defaults=defaults, groups=((),) * groups)
    nothing: dict[str, Any] = {"epoch_ends": (), "steps": (), "checkpoints": (), "files": {}, "versions": {}}
    nothing |= {"workload": None, "dataset": None, "threads": 1, "num_steps": 0, "complete": False}
    return Manifest(num_samples=num_samples, model=model, optimizer=layout, **nothing)


def written_and_read(manifest: Manifest, steps: list[StepFields], count: int) -> list[StepRecord]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "steps"
        write_tensors(path, steps_tensors(steps))
        start = steps[0]["index"]
        return read_steps(path, StepsFile(file="steps", start=start, stop=start + count), manifest)


def bits_of_written(step: StepFields) -> str:
    coefficients = step["coefficients"] and [part.tobytes() for part in step["coefficients"]]
    return repr(
        (
            *(step["index"], step["epoch"], [np.asarray(part, np.int64).tobytes() for part in step["indices"]]),
            *(coefficients, step["hyperparameters"], step["loss"] is not None and struct.pack("d", step["loss"])),
            *(sorted(step[name]) for name in NAME_SETS),  # type: ignore[literal-required]
        )
    )


def bits_of_read(step: StepRecord) -> str:
    assert all(part.dtype == np.int64 for part in step.indices)
    coefficients = step.coefficients and [part.tobytes() for part in step.coefficients]
    return repr(
        (
            *(step.index, step.epoch, [part.tobytes() for part in step.indices]),
            *(coefficients, step.hyperparameters, step.loss is not None and struct.pack("d", step.loss)),
            *(sorted(getattr(step, name)) for name in NAME_SETS),
        )
    )


NAME_SETS = ("evaluation_mode", "no_gradient", "zero_gradient")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(recorded=recorded_steps(), data=st.data())
def test_what_is_read_is_what_was_written(recorded: tuple[Manifest, list[StepFields]], data: st.DataObject) -> None:
    """Types, order of settings, signs of zeros and payloads of what is not a number among it; repr tells them apart."""
    manifest, steps = recorded
    count = data.draw(st.integers(1, len(steps)))
    found = written_and_read(manifest, steps, count)
    assert list(map(bits_of_read, found)) == list(map(bits_of_written, steps[:count]))
    assert [list(step.random_states) for step in found] == [step["random_states"] for step in steps[:count]]


def plain_step(index: int, **changes: Any) -> StepFields:
    fields: Any = {
        "index": index,
        "epoch": 0,
        "indices": [(0,)],
        "coefficients": None,
        "hyperparameters": ({"lr": 0.1},),
        "loss": None,
        "random_states": [None],
        "evaluation_mode": [],
        "no_gradient": [],
        "zero_gradient": [],
    }
    return fields | changes


def test_each_state_is_read_once_however_often_it_is_combined() -> None:
    """A small file cannot ask for much memory: 64 pairs of 8 states and 8 states are 16 states."""
    states = captured_states()
    pairs = [RandomState(torch=a.torch, python=b.python) for a in states for b in states]
    steps = [plain_step(t, random_states=[state], no_gradient=["w"]) for t, state in enumerate(pairs)]
    found = written_and_read(manifest_of(["w"], {"lr": 0.1}, 1, 1), steps, len(steps))
    read = [state for step in found for state in step.random_states]
    assert read == pairs
    assert len({id(state.torch) for state in read if state}) == len({id(state.python) for state in read if state}) == 8
    assert len({id(step.no_gradient) for step in found}) == len({id(step.hyperparameters) for step in found}) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficients": [np.ones(2)]},
        {"indices": [(0,), (0,)], "coefficients": [np.ones(1)], "random_states": [None, None]},
        {"random_states": []},
        {"random_states": [None, None]},
    ],
)
def test_steps_whose_parts_do_not_belong_together_are_not_written(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not as many coefficients as sample indices|zip\(\) argument 2"):
        steps_tensors([plain_step(0), plain_step(1, **changes)])
