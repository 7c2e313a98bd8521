"""A trajectory that has been tampered with gives a clear error or the right result, and nothing else.

Every example is a recorded trajectory with one to three mutations, read whole, verified and swept.
``DIT_FUZZ_EXAMPLES`` sets the examples per test, drawn anew each time; without it they are 120, always the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from plain_format import GENERATORS, Row, read_rows, write_rows
from recordings import KINDS
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from torch import Tensor

from dit_mlflow import DitError, Trajectory, Window, Workload, track
from dit_mlflow.trajectory import REPLAY_TOLERANCE, State

EXAMPLES = os.environ.get("DIT_FUZZ_EXAMPLES")
FUZZ = settings(
    max_examples=int(EXAMPLES or 120),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
    # A failing example is small as it is, and shrinking takes its time.
    phases=[Phase.generate, Phase.shrink] if EXAMPLES is None else [Phase.generate],
    print_blob=True,
)
MEMORY = 2**29
"""Bytes that reading may allocate: a hundred times what these trajectories take."""


@dataclass
class Original:
    folder: Path
    workload: Workload
    steps: list[Any]
    checkpoints: dict[int, State]
    batches: list[Any]
    states: list[State]
    scores: np.ndarray


@cache
def original(kind: str) -> Original:
    folder = Path(tempfile.mkdtemp(prefix="dit-fuzz-")) / kind
    torch.manual_seed(0)
    trajectory, workload = KINDS[kind](folder)
    states = list(trajectory.states(workload, 0, trajectory.num_steps))
    return Original(folder, workload, *everything(trajectory), states, swept(trajectory, workload))


@pytest.fixture(scope="module", autouse=True)
def _removed_afterwards() -> Iterator[None]:
    yield
    for kind in KINDS:
        shutil.rmtree(original(kind).folder.parent, ignore_errors=True)
    original.cache_clear()


def everything(trajectory: Trajectory) -> tuple[list[Any], dict[int, State], list[Any]]:
    steps = [trajectory.step(t) for t in range(trajectory.num_steps)]
    checkpoints = {t: trajectory.checkpoint(t) for t in trajectory.checkpoint_steps}
    return steps, checkpoints, [trajectory.batches(t) for t in range(trajectory.num_steps)]


def swept(trajectory: Trajectory, workload: Workload) -> np.ndarray:
    return track(trajectory, workload, [Window(0, trajectory.num_steps)]).scores


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or ``None`` for an error that a user can read; any other is a failure of the test."""
    try:
        with limited_memory():
            return function()
    except DitError as error:
        assert len(str(error)) > 10
        # A message that is printed, also where the mutation is quoted.
        str(error).encode()
        return None


def bits(value: Any) -> Any:
    """Anything that was read, as what can be compared bit for bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    if hasattr(value, "__dataclass_fields__"):
        return bits(vars(value))
    return repr(value) if isinstance(value, float) else value


@contextlib.contextmanager
def copy_of(kind: str) -> Iterator[tuple[Original, Path]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "t"
        shutil.copytree(original(kind).folder, folder)
        yield original(kind), folder


def check_untouched(recorded: Original, folder: Path) -> None:
    """Without the hashes put right: what is read is what was recorded, bit for bit."""
    trajectory = attempt(lambda: Trajectory.open(folder))
    if trajectory is None:
        return
    read = attempt(lambda: everything(trajectory))
    if read is not None:
        assert bits(read) == bits((recorded.steps, recorded.checkpoints, recorded.batches))
    scores = attempt(lambda: swept(trajectory, recorded.workload))
    assert scores is None or bits(scores) == bits(recorded.scores)
    attempt(lambda: trajectory.verify(recorded.workload))


def check_believed(recorded: Original, folder: Path) -> None:
    """With the hashes put right: what verifies has the recorded states, within what a replay may drift."""
    trajectory = attempt(lambda: Trajectory.open(folder))
    if trajectory is None:
        event("refused when opened")
        return
    read = attempt(lambda: everything(trajectory))
    attempt(lambda: swept(trajectory, recorded.workload))
    if attempt(lambda: trajectory.verify(recorded.workload)) is None:
        event("refused when " + ("read" if read is None else "verified"))
        return
    event("believed")
    states = list(trajectory.states(recorded.workload, 0, trajectory.num_steps))
    assert len(states) == len(recorded.states)
    for found, expected in zip(states, recorded.states, strict=True):
        assert_near(found, expected, recorded)


def assert_near(found: State, expected: State, recorded: Original) -> None:
    """Each element within twice the tolerance of how far the tensors of this state move in all of training.

    Not what is stored once for several checkpoints: replay tells its effect on what is trained, and no more.
    """
    first, last = recorded.states[0], recorded.states[-1]
    shared = {
        key
        for entry in Trajectory.open(recorded.folder).manifest.checkpoints
        for keys in entry.unchanged.values()
        for key in keys
    }
    moved = max(
        float((value - getattr(first, part)[name]).abs().max())
        for part in ("parameters", "buffers")
        for name, value in getattr(last, part).items()
        if value.is_floating_point()
    )
    for part in ("parameters", "buffers"):
        for name, value in getattr(expected, part).items():
            if f"{part}/{name}" not in shared:
                miss = (getattr(found, part)[name].double() - value.double()).abs().max()
                assert miss <= (2 * REPLAY_TOLERANCE * moved if value.is_floating_point() else 0), name
    for name, entry in expected.optimizer.items():
        assert found.optimizer[name].keys() == entry.keys()
        for key, value in entry.items():
            # The optimizer's state follows the gradients, which answer to a changed parameter more than it changed.
            largest = max(float(other[key].abs().max()) for other in expected.optimizer.values() if key in other)
            miss = (found.optimizer[name][key] - value).abs().max()
            assert miss <= 20 * REPLAY_TOLERANCE * max(largest, 1e-3), (name, key)


def rehash(folder: Path) -> None:
    """Put the manifest's hashes and sizes right, if another file has not taken its place."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        return
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    path.write_text(json.dumps(manifest))


def flip(draw: Any, path: Path) -> None:
    """Change, cut or insert some bytes."""
    content = bytearray(path.read_bytes())
    at = draw(st.integers(0, max(0, len(content) - 1)))
    match draw(st.sampled_from(["flip", "flip", "set", "cut", "insert", "remove", "repeat"])):
        case "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        case "set":
            content[at] = draw(st.integers(0, 255))
        case "cut":
            del content[at:]
        case "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
        case "remove":
            del content[at : at + draw(st.integers(1, 16))]
        case "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 64))]
    path.write_bytes(content or b"\0")


def files(folder: Path, prefix: str = "") -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith(prefix))


HOSTILE = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 5, 10**9, 2**63 - 1, 2**63, 10**400, -(10**30), 0.5, 1e-9, 1e300]),
    st.sampled_from(
        [float("nan"), float("inf"), -float("inf"), 1.5, -2.0, 0.9999, "", "x", "../x", "/etc/passwd", "\0"]
    ),
    st.sampled_from(["__class__", "float32", "float64", "int64", "bool", "0.weight", "0.bias", "Adam", "SGD", "Rprop"]),
    st.sampled_from([[], [0], ["0.weight"], {}, {"x": 1}, [[]], [None], "9" * 300, "\u202e\x1b[31m", "é" * 50]),
    st.integers(-3, 30),
    st.floats(width=32),
)


def mutate_json(draw: Any, value: Any) -> Any:
    """One change somewhere inside."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        match draw(st.integers(0, 19)):
            case 0:
                del value[key]
            case 1 if isinstance(value, list):
                value.insert(draw(st.integers(0, len(value))), value[key])
            case 2:
                other = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
                value[key], value[other] = value[other], value[key]
            case 3 if isinstance(value, dict):
                value[draw(st.sampled_from(["0", "1", "99", "x", "0.weight", "2.weight", ""]))] = value.pop(key)
            case _:
                value[key] = mutate_json(draw, value[key])
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and draw(st.booleans()):
        return value + draw(st.sampled_from([1, -1, 0.001, 2, 10**12]))
    return draw(HOSTILE)


def mutate_manifest(draw: Any, folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    names = [*manifest, "checkpoints", "steps", "model", "optimizer", "checkpoints", "epoch_ends"]
    name = draw(st.sampled_from(names))
    manifest[name] = mutate_json(draw, manifest[name])
    path.write_text(json.dumps(manifest))


def mutate_steps(draw: Any, folder: Path) -> None:
    path = draw(st.sampled_from(files(folder, "steps")))
    tensors = load_numpy(path)
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # Not every value has a place in an array.
        if draw(st.booleans()):
            rows = read_rows(tensors)
            mutate_rows(draw, rows)
            write_rows(rows, path)
        else:
            mutate_arrays(draw, tensors)
            save_numpy(tensors, path)


def mutate_rows(draw: Any, rows: list[Row]) -> None:
    at, other = (draw(st.integers(0, len(rows) - 1)) for _ in range(2))
    column = draw(st.sampled_from(sorted(rows[at])))
    match draw(st.sampled_from(["cell"] * 8 + ["drop", "double", "swap"])):
        case "cell":
            value = rows[at][column]
            if column == "random_states":
                mutate_random_state(draw, value)
            elif isinstance(value, bytes):
                changed = json.dumps(mutate_json(draw, json.loads(value))).encode()
                rows[at][column] = draw(st.sampled_from([changed, changed, value[1:], b"\xff", b"[" * 10**5]))
            else:
                rows[at][column] = mutate_json(draw, value)
        case "drop":
            del rows[at]
        case "double":
            rows.insert(at, rows[at])
        case "swap":
            rows[at][column], rows[other][column] = rows[other][column], rows[at][column]


def mutate_arrays(draw: Any, tensors: dict[str, np.ndarray]) -> None:
    name, other = (draw(st.sampled_from(sorted(tensors))) for _ in range(2))
    value = tensors[name]
    place = draw(st.integers(0, max(0, len(value) - 1)))
    match draw(
        st.sampled_from(["value"] * 4 + ["move", "drop", "name", "dtype", "shape", "swap", "longer", "shorter"])
    ):
        case "value" if len(value):
            value[place] = draw(st.sampled_from([0, 1, -1, 2, 7, 255, 10**9, 2**62, 2**63 - 1, -(2**63)]))
        case "move" if len(value):
            value[place] += draw(st.sampled_from([1, -1]))
        case "drop":
            del tensors[name]
        case "name":
            tensors[draw(st.sampled_from(["x", "", f"{name}s", other]))] = tensors.pop(name)
        case "dtype":
            dtypes = [np.float64, np.float16, np.int64, np.int32, np.uint64, np.bool_, np.uint8]
            tensors[name] = value.astype(draw(st.sampled_from(dtypes)))
        case "shape":
            tensors[name] = draw(st.sampled_from([value[None], value[:, None], np.asarray(value.sum())]))
        case "swap":
            tensors[name], tensors[other] = tensors[other], value
        case "longer":
            tensors[name] = np.concatenate([value, value[: draw(st.integers(1, 3))]])
        case "shorter":
            tensors[name] = value[: len(value) - draw(st.integers(1, 3))]


def mutate_random_state(draw: Any, states: list[dict[str, bytes] | None]) -> None:
    at = draw(st.integers(0, len(states) - 1))
    state = states[at] or {}
    name = draw(st.sampled_from(GENERATORS))
    stored = bytearray(state.get(name, bytes(2556)))
    stored[draw(st.integers(0, len(stored) - 1))] ^= 255
    key = np.full(624, draw(st.sampled_from([0, 1, 2**32 - 1])), "<u4").tobytes()
    ends = np.array([draw(st.sampled_from([0, 1, 624, 625, 2**31, 2**32 - 1])) for _ in range(4)], "<u4").tobytes()
    candidates = [b"", b"\xff", bytes(16), bytes(2508), bytes(2512), bytes(5056), key + ends, key + ends[:12]]
    content = draw(st.sampled_from([bytes(stored), bytes(stored[:-8]), *candidates, None]))
    changed = state | {name: content}
    states[at] = draw(st.sampled_from([{key: value for key, value in changed.items() if value is not None}, None, {}]))


def mutate_shard(draw: Any, folder: Path) -> None:
    path = draw(st.sampled_from([*files(folder, "checkpoints"), *files(folder, "batches")]))
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    name = draw(st.sampled_from(sorted(tensors)))
    value = tensors[name]
    other = draw(st.sampled_from(sorted(tensors)))
    step, _, rest = name.partition("/")
    match draw(
        st.sampled_from(["name", "step", "shape", "dtype", "value", "value", "value", "all", "drop", "add", "swap"])
    ):
        case "name":
            names = [
                f"{name}x",
                f"{step}/optimizer/exp_avg/0.weight",
                rest,
                f"{step}/",
                "",
                f"0{name}",
                f"{step}/{other}",
            ]
            tensors[draw(st.sampled_from(names))] = tensors.pop(name)
        case "step":
            tensors[f"{draw(st.sampled_from([0, 1, 4, 5, 99, -1, 10**30]))}/{rest}"] = tensors.pop(name)
        case "shape":
            tensors[name] = draw(
                st.sampled_from([value[None], value.reshape(-1), value.reshape(-1)[:1], value.new_zeros(0)])
            )
        case "dtype":
            dtypes = [torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8, torch.float8_e5m2]
            tensors[name] = value.to(draw(st.sampled_from(dtypes)))
        case "value":
            flat = value.reshape(-1)
            place = draw(st.integers(0, max(0, len(flat) - 1)))
            if len(flat) and value.is_floating_point():
                change = draw(st.sampled_from([float("nan"), float("inf"), 1e30, 0.0, -1.0, 1e-6, 1.0, 0.01]))
                flat[place] = flat[place] + change if draw(st.booleans()) else change
            elif len(flat):
                flat[place] += draw(st.sampled_from([1, -1, 10**9]))
        case "all":
            tensors[name] = torch.zeros_like(value) if draw(st.booleans()) else value * 2
        case "drop":
            del tensors[name]
        case "add":
            tensors[draw(st.sampled_from([f"{step}/x", f"{step}/buffers/x", "7/x", f"{name}/0"]))] = value.clone()
        case "swap":
            tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)


def swap_files(draw: Any, folder: Path) -> None:
    one, other = draw(st.sampled_from(files(folder))), draw(st.sampled_from(files(folder, "steps")))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@FUZZ
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_damaged_bytes_are_noticed_or_do_no_harm(data: st.DataObject, kind: str) -> None:
    with copy_of(kind) as (recorded, folder):
        for _ in range(data.draw(st.integers(1, 2))):
            flip(data.draw, data.draw(st.sampled_from(files(folder))))
        check_untouched(recorded, folder)


@FUZZ
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_other_values_in_the_manifest(data: st.DataObject, kind: str) -> None:
    with copy_of(kind) as (recorded, folder):
        for _ in range(data.draw(st.sampled_from([1, 1, 1, 2]))):
            with contextlib.suppress(TypeError, OverflowError):  # What cannot be changed twice.
                mutate_manifest(data.draw, folder)
        check_believed(recorded, folder)


@pytest.mark.slow
@FUZZ
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_other_steps(data: st.DataObject, kind: str) -> None:
    with copy_of(kind) as (recorded, folder):
        mutate_steps(data.draw, folder)
        rehash(folder)
        check_believed(recorded, folder)


@pytest.mark.slow
@FUZZ
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_other_tensors(data: st.DataObject, kind: str) -> None:
    with copy_of(kind) as (recorded, folder):
        mutate_shard(data.draw, folder)
        rehash(folder)
        check_believed(recorded, folder)


@FUZZ
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_files_of_other_content(data: st.DataObject, kind: str) -> None:
    """The reader of safetensors meets bytes that nobody has checked."""
    with copy_of(kind) as (recorded, folder):
        if data.draw(st.integers(0, 9)) == 0:
            swap_files(data.draw, folder)
        for _ in range(data.draw(st.integers(1, 2))):
            flip(data.draw, data.draw(st.sampled_from([path for path in files(folder) if path.suffix != ".json"])))
        rehash(folder)
        check_believed(recorded, folder)
