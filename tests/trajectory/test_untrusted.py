"""What is read back was written by who knows whom: each way of lying has its own clear error."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from recordings import KINDS
from safetensors.torch import load_file, save_file
from torch import nn

from dit_mlflow import InputError, Trajectory, TrajectoryError, Window, Workload, WorkloadError, parse_windows, track
from dit_mlflow.trajectory import State
from dit_mlflow.trajectory.manifest import WorkloadReference
from dit_mlflow.trajectory.parquet_size import count_rows
from dit_mlflow.trajectory.state import drifts, other_optimizer_state
from dit_mlflow.workload import load_recorded
from dit_mlflow.workload.random_state import RandomState

Manifest = dict[str, Any]


def edit(folder: Path, change: Callable[[Manifest], Any]) -> None:
    """Change the manifest, and put hashes and sizes right."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    change(manifest)
    path.write_text(json.dumps(manifest))


def rows_changed(folder: Path, change: Callable[[list[dict[str, Any]]], Any], **options: Any) -> None:
    path = sorted(folder.glob("*.parquet"))[-1]
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path, **options)
    edit(folder, lambda manifest: None)


def tensors_changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], pattern: str = "check*") -> None:
    path = sorted(folder.glob(pattern))[-1]
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    edit(folder, lambda manifest: None)


def put(name: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[0].update({name: value})


def settings(**changes: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        groups = json.loads(rows[0]["hyperparameters"])
        groups[0].update(changes)
        rows[0]["hyperparameters"] = json.dumps(groups)

    return change


BILLION = 10**9

MANIFESTS: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "a billion steps": (
        lambda m: (m["steps"][-1].update(stop=BILLION), m.update(num_steps=BILLION, epoch_ends=[BILLION])),
        r"parquet is not a usable record of steps: it has \d steps; expected 99999999\d or more",
    ),
    "a number beyond all": (lambda m: m.update(num_steps=10**400), r"num_steps: Input should be less than"),
    "epochs beyond the end": (
        lambda m: m.update(epoch_ends=[3, BILLION]),
        "the last epoch ends at step 1000000000 of 6",
    ),
    "epochs without steps": (lambda m: m.update(epoch_ends=[3, 3, 6]), "epoch_ends do not increase"),
    "epochs that are not": (lambda m: m.update(epoch_ends=[2, 6]), r"epochs end at \(2, 6\), those of the steps at"),
    "no samples": (lambda m: m.update(num_samples=None), "there are steps, but no samples"),
    "fewer samples": (lambda m: m.update(num_samples=3), r"there is sample \[\d+\]; the manifest has 0 … 2"),
    "checkpoint after the end": (lambda m: m["checkpoints"][-1].update(step=7), "must start at step 0 and end by"),
    "dtype that is an attribute": (
        lambda m: m["model"]["parameters"]["0.weight"].update(dtype="__class__"),
        "'0.weight' has the unknown dtype '__class__'",
    ),
    "another shape": (
        lambda m: m["model"]["parameters"]["0.weight"].update(shape=[64, 6]),
        r"'parameters/0.weight' of step 0 has shape \[6, 64\] and dtype float32; the manifest says shape \[64, 6\]",
    ),
    "a parameter too many": (
        lambda m: m["model"]["parameters"].update(x={"shape": [BILLION, BILLION], "dtype": "float64"}),
        "the state of step 0 has no 'parameters/x', which the manifest announces",
    ),
    "a buffer too few": (lambda m: m["model"]["buffers"].popitem(), "is no part of the recorded model or optimizer"),
    "no parameters": (lambda m: m["model"].update(parameters={}), "the model has no parameters"),
    "nothing trained": (lambda m: m["optimizer"].update(groups=[]), "the optimizer holds no parameters"),
    "unchanged since never": (
        lambda m: m["checkpoints"][1].update(unchanged={"0": ["parameters/nothing"]}),
        "'parameters/nothing' of step 1 is to be found with step 0, where it is not",
    ),
    "unchanged, and here": (
        lambda m: m["checkpoints"][1].update(unchanged={"0": ["parameters/0.weight"]}),
        "or is there twice",
    ),
    "numbers of nobody": (lambda m: m["checkpoints"][1].update(scalars={"x": {"step": 1}}), "of no trained parameter"),
    "a number too large": (
        lambda m: m["checkpoints"][1].update(scalars={"0.weight": {"step": 10**300}}),
        "a number is too large",
    ),
    "its own name as a file": (
        lambda m: m["files"].update({"manifest.json": {"sha256": "0" * 64, "size": 1}}),
        "not a plain file name",
    ),
    "no hash": (lambda m: next(iter(m["files"].values())).update(sha256="0"), "String should match pattern"),
    "settings of the wrong kind": (
        lambda m: m["optimizer"]["defaults"].update(lr="fast"),
        "hyperparameter 'lr' is not of the kind of its default 'fast'",
    ),
    "settings that cannot be": (
        lambda m: m["optimizer"]["defaults"].update(lr=-1.0),
        r"torch.optim.SGD cannot be built with the settings that are recorded, .*Invalid learning rate",
    ),
    "batches that are not there": (lambda m: m.update(batches=m["steps"]), "is not a readable shard"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    change, message = MANIFESTS[name]
    _, workload = KINDS["momentum"](tmp_path / "t")
    edit(tmp_path / "t", change)
    begun = time.perf_counter()
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(tmp_path / "t").verify(workload)
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not a trajectory manifest"),
        ('{"a": ' * 100_000, "not a trajectory manifest"),
        ("", "not a trajectory manifest"),
        ('{"format": 2, "format": 2, ', "not a trajectory manifest"),
    ],
)
def test_what_is_no_manifest_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(tmp_path)


def test_manifest_that_says_a_thing_twice_is_refused(tmp_path: Path) -> None:
    KINDS["momentum"](tmp_path / "t")
    path = tmp_path / "t" / "manifest.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": true, "complete": false'))
    with pytest.raises(TrajectoryError, match="'complete' is there twice"):
        Trajectory.open(tmp_path / "t")


def test_manifest_of_any_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)  # A terabyte, of which nothing is on the disk.
    with pytest.raises(TrajectoryError, match="1099511627776 bytes, expected 67108864 at most"):
        Trajectory.open(tmp_path)


def test_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    trajectory, workload = KINDS["momentum"](tmp_path / "t")
    path = tmp_path / "t" / trajectory.manifest.steps[0].file
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TrajectoryError, match=f"{path} is a link that leaves the folder"):
        Trajectory.open(tmp_path / "t")
    path.unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "t" / "beside")
    path.symlink_to("beside")
    (tmp_path / "linked").symlink_to(tmp_path / "t")
    assert Trajectory.open(tmp_path / "linked").verify(workload).max_drift == 0


STEPS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], Any], str]] = {
    "a step left out": ("momentum", lambda rows: rows.pop(1), "it has 4 steps; expected 5 or more"),
    "steps out of order": ("momentum", lambda rows: rows.reverse(), "its steps are not numbered 1 … 5"),
    "a sample before the first": (
        "momentum",
        put("indices", [[0, -1]]),
        r"there is sample \[-1\]; the manifest has 0 … 23",
    ),
    "a sample after the last": ("momentum", put("indices", [[0, 24]]), r"there is sample \[24\]"),
    "no samples": ("momentum", put("indices", [[]]), "a batch has no samples"),
    "no batches": ("momentum", put("indices", []), "a batch has no samples"),
    "no sample number": ("momentum", put("indices", [[None]]), "a number is missing"),
    "negative epoch": ("momentum", put("epoch", -1), "an epoch is negative"),
    "coefficients to spare": (
        "momentum",
        put("coefficients", [[0.1]]),
        "step 1: as many coefficients as sample indices",
    ),
    "infinite coefficient": (
        "momentum",
        lambda rows: rows[0]["coefficients"][0].__setitem__(0, float("inf")),
        "a coefficient is not finite",
    ),
    "unknown parameter": (
        "momentum",
        put("no_gradient", ["7.weight"]),
        "no_gradient names '7.weight', which is no param",
    ),
    "unknown frozen one": ("momentum", put("zero_gradient", ["x"]), "zero_gradient names 'x', which is no parameter"),
    "neither nor": (
        "momentum",
        lambda rows: rows[0].update(no_gradient=["0.weight"], zero_gradient=["0.weight"]),
        "a gradient is None and 0 at once",
    ),
    "unknown module": (
        "momentum",
        put("evaluation_mode", ["9"]),
        "step 1 was recorded with module '9' in evaluation mode",
    ),
    "settings that are none": ("momentum", put("hyperparameters", "{"), "hyperparameters are not JSON"),
    "settings without end": ("momentum", put("hyperparameters", "[" * 10**5), "hyperparameters are not JSON"),
    "settings of one group": ("momentum", put("hyperparameters", "[{}]"), "not those of 2 parameter groups"),
    "settings left out": ("momentum", put("hyperparameters", "[{}, {}]"), r"hyperparameters lack \['lr'"),
    "other parameters": ("momentum", settings(params=[1]), "or hold 'params'"),
    "a rate that is a word": ("momentum", settings(lr="fast"), "'lr' is not of the kind of its default 0.2"),
    "a rate that is none": ("momentum", settings(lr=None), "torch.optim.SGD cannot make step 1 with the settings"),
    "one beta": ("dropout", settings(betas=[0.9]), "'betas' is not of the kind"),
    "a beta that diverges": ("dropout", settings(betas=[0.9, 1.5]), "torch.optim.Adam cannot make step 1"),
    "states to spare": ("dropout", lambda rows: rows[0]["random_state"].pop(), "one random state per micro-batch"),
    "a state cut short": (
        "dropout",
        lambda rows: rows[0]["random_state"][0].update(torch=b"0" * 100),
        r"a stored random state \(torch\) is no state of that generator",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_lie_are_refused(name: str, tmp_path: Path) -> None:
    kind, change, message = STEPS[name]
    _, workload = KINDS[kind](tmp_path / "t")
    rows_changed(tmp_path / "t", change)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(tmp_path / "t").verify(workload)


def test_steps_in_groups_are_refused(tmp_path: Path) -> None:
    _, workload = KINDS["momentum"](tmp_path / "t")
    rows_changed(tmp_path / "t", lambda rows: None, row_group_size=2)
    with pytest.raises(TrajectoryError, match=r"steps-00004\.parquet .* its rows are in 3 groups; expected one"):
        Trajectory.open(tmp_path / "t").verify(workload)


def test_rows_that_do_not_count_are_not_looked_at(tmp_path: Path) -> None:
    """After a resume, a file holds steps that did not happen."""
    trajectory, workload = KINDS["resumed"](tmp_path / "t")
    expected = list(trajectory.states(workload, 0, 7))
    first = tmp_path / "t" / trajectory.manifest.steps[0].file
    table = pq.read_table(first)
    assert len(table) == 5
    rows = table.to_pylist()
    rows[4].update(step=77, indices=[[10**9]], hyperparameters="no JSON", no_gradient=["x"])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), first)
    edit(tmp_path / "t", lambda manifest: None)
    changed = Trajectory.open(tmp_path / "t")
    assert changed.verify(workload).max_drift == 0
    for one, other in zip(changed.states(workload, 0, 7), expected, strict=True):
        assert all(torch.equal(one.parameters[name], value) for name, value in other.parameters.items())


@pytest.mark.parametrize("column", ["indices", "hyperparameters"])
def test_steps_that_would_unpack_to_any_size_are_refused(column: str, tmp_path: Path) -> None:
    """Ten million samples, or 200 MB of text, in a file of less than a megabyte."""
    _, workload = KINDS["momentum"](tmp_path / "t")
    path = tmp_path / "t" / "steps-00004.parquet"
    table = pq.read_table(path)
    size = 10**7
    values: Any = pa.array(["x" * 10**6] * 5)
    if column == "indices":
        flat = pa.array(np.zeros(size, np.int64))
        inner = pa.ListArray.from_arrays(pa.array([0, size] + [size] * 4, pa.int32()), flat)
        values = pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), inner)
    else:
        values = pa.array(["".join(random.Random(0).choices("xy", k=10)) * 4 * 10**6] * 5)
    table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), values)
    pq.write_table(table, path, compression="zstd", use_dictionary=column == "indices")
    assert path.stat().st_size < 10**6
    edit(tmp_path / "t", lambda manifest: None)
    with pytest.raises(TrajectoryError, match=r"its \d+ bytes would unpack to \d+, more than the \d+ that a record"):
        Trajectory.open(tmp_path / "t").verify(workload)


@pytest.mark.parametrize("field", ["num_values", "total_uncompressed_size"])
def test_footer_that_says_less_than_the_pages_is_refused(field: str, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": np.zeros(10**6, np.int64)}), path, use_dictionary=False, compression="zstd")
    assert count_rows(path) == 10**6
    content = bytearray(path.read_bytes())
    said = varint(getattr(pq.read_metadata(path).row_group(0).column(0), field))
    at = content.index(said, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    if field == "num_values":  # The number of rows is the same, and comes first.
        at = content.index(said, at + 1)
    content[at : at + len(said)] = varint(1000, len(said))
    path.write_bytes(content)
    assert getattr(pq.read_metadata(path).row_group(0).column(0), field) == 1000
    with pytest.raises(ValueError, match="its pages are not what its footer says"):
        count_rows(path)


def varint(value: int, length: int = 0) -> bytes:
    """A Thrift integer, in ``length`` bytes at least."""
    value, found = 2 * value, []
    while value > 127 or len(found) + 1 < length:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x15\x00\x15\x10\x18\x01x\x2c\x15\x02\x00\x00", "lacks what it must say"),  # a text for a size
        (b"\x15\x00\x15\x10\x15\x05\x2c\x15\x02\x00\x00", "a page has a negative size"),
        (b"\x15\x00\x15\x10\x15\x10\x00", "lacks what it must say"),  # no number of values
        (b"\x15\x08\x15\x10\x15\x10\x00", "lacks what it must say"),  # of an unknown kind
        (b"\x15" + b"\xff" * 30, "a number of more than 64 bits"),
        (b"\x1c" * 10**5, "a struct without an end"),
        (b"\x1b", "Thrift type 11 has no place here"),
        (b"\x19\xf8\xff\xff\xff\xff\x7f", "a list of more elements than there are bytes"),
    ],
)
def test_page_without_a_readable_header_is_refused(header: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": np.arange(10**5)}), path, use_dictionary=False, compression="none")
    content, start = bytearray(path.read_bytes()), 4
    content[start : start + len(header)] = header
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        count_rows(path)


TENSORS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no step": ("momentum", lambda t: t.update(x=torch.zeros(1)), "is not a readable shard: invalid literal"),
    "a step written otherwise": (
        "momentum",
        lambda t: t.update({"04/x": torch.zeros(1)}),
        "'04/x' does not begin with",
    ),
    "left out": ("momentum", lambda t: t.pop("4/buffers/1.running_mean"), "has no 'buffers/1.running_mean'"),
    "added": ("momentum", lambda t: t.update({"4/buffers/x": torch.zeros(1)}), "'buffers/x' of step 4 is no part of"),
    "other dtype": (
        "momentum",
        lambda t: t.update({"4/parameters/0.bias": torch.zeros(6, dtype=torch.float64)}),
        r"'parameters/0.bias' of step 4 has shape \[6\] and dtype float64; the manifest says .* dtype float32",
    ),
    "state of nobody": (
        "momentum",
        lambda t: t.update({"4/optimizer/momentum_buffer/x": torch.zeros(1)}),
        "is no part of the recorded model or optimizer",
    ),
    "state of another shape": (
        "dropout",
        lambda t: t.update({"4/optimizer/exp_avg/0.bias": torch.zeros(7)}),
        r"'optimizer/exp_avg/0.bias' of step 4 has shape \[7\] .*; expected those of the parameter, shape \[6\]",
    ),
    "a counter of many": (
        "dropout",
        lambda t: t.update({"4/optimizer/step/0.bias": torch.zeros(6)}),
        "expected one number",
    ),
    "state under another name": (
        "dropout",
        lambda t: t.update({"4/optimizer/exp/0.bias": t.pop("4/optimizer/exp_avg/0.bias")}),
        "not its optimizer's state: that of '0.bias' has|cannot make step 4",
    ),
    "the last state's optimizer": (
        "dropout",
        lambda t: t["9/optimizer/exp_avg/0.weight"].mul_(1.01),
        "meets the parameters of the checkpoint bit for bit, but not its optimizer's state: 'exp_avg' of '0.weight'",
    ),
    "the last state's counter": (
        "dropout",
        lambda t: t["9/optimizer/step/0.weight"].add_(1),
        "not its optimizer's state: 'step' of '0.weight'",
    ),
    "the last state's count of batches": (
        "momentum",
        lambda t: t["6/buffers/1.num_batches_tracked"].add_(1),
        "replaying up to step 6 misses the checkpoint there by 0.33",
    ),
    "not a number": (
        "momentum",
        lambda t: t["6/parameters/0.bias"].fill_(float("nan")),
        "step 6 misses the checkpoint",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_lie_are_refused(name: str, tmp_path: Path) -> None:
    kind, change, message = TENSORS[name]
    _, workload = KINDS[kind](tmp_path / "t")
    tensors_changed(tmp_path / "t", change)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(tmp_path / "t").verify(workload)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"2/1/0": torch.zeros(1)}),
            "the tensors of step 2 are not numbered by its 1 micro-batches",
        ),
        (lambda t: t.update({"2/0/x": torch.zeros(1)}), "the tensors of step 2 are not numbered"),
        (lambda t: t.pop("2/0/0"), "the tensors of step 2 are not numbered"),
        (lambda t: t.pop("2/0/1"), "a stored batch has 1 tensors; the workload's have 2"),
        (lambda t: t["2/0/1"].fill_(10**9), "the workload's loss fails on the record of step 2: IndexError: Target"),
        (lambda t: t.update({"2/0/0": torch.zeros(8, 3)}), "the workload's loss fails on the record of step 2"),
    ],
)
def test_batches_that_lie_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    _, workload = KINDS["batches"](tmp_path / "t")
    tensors_changed(tmp_path / "t", change, "batches*")
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(tmp_path / "t").verify(workload)


@pytest.mark.parametrize(
    ("field", "state"),
    [
        *[("torch", content) for content in (b"", b"x" * 5056, bytes(5055))],
        *[("cuda", content) for content in (b"", bytes(15))],
        *[("python", content) for content in (b"", b"[]", b"[3, [1, 2], null]", b"\xff", b"[" * 10**5)],
        ("python", json.dumps([3, [1] * 624 + [625], None]).encode()),
        ("python", json.dumps([3, [1] * 624 + [624], "gauss"]).encode()),
        ("python", json.dumps([3, [-1] * 624 + [624], None]).encode()),
        *[("numpy", content) for content in (b"", b"{}", b'["MT19937", [], 0, 0, 0.0]')],
        *[("numpy", json.dumps(["MT19937", [1] * 624, at, 0, 0.0]).encode()) for at in (625, -1, 10**9, "x", None)],
        ("numpy", json.dumps(["MT19937", [2**32] * 624, 0, 0, 0.0]).encode()),
        ("numpy", json.dumps(["MT19937", [0.5] * 624, 0, 0, 0.0]).encode()),
        ("numpy", json.dumps(["PCG64", [1] * 624, 0, 0, 0.0]).encode()),
    ],
)
def test_random_states_that_are_none_are_refused(field: str, state: bytes) -> None:
    stored = {**RandomState().encode(), field: state}
    with pytest.raises(TrajectoryError, match=rf"a stored random state \({field}\) is no state of that generator"):
        RandomState.decode(stored)


def test_steps_and_states_that_are_not_there_are_named(tmp_path: Path) -> None:
    trajectory, _ = KINDS["momentum"](tmp_path / "t")
    with pytest.raises(InputError, match=r"step 6 was asked; the trajectory has 6 \(0 … 5\)"):
        trajectory.step(6)
    with pytest.raises(InputError, match=r"the state of step 2 is not stored; those of \(0, 1, 4, 6\) are"):
        trajectory.checkpoint(2)


def test_windows_of_a_billion_steps_are_parsed_at_once(tmp_path: Path) -> None:
    _, workload = KINDS["momentum"](tmp_path / "t")
    edit(tmp_path / "t", MANIFESTS["a billion steps"][0])
    trajectory = Trajectory.open(tmp_path / "t")
    assert parse_windows("epochs", trajectory) == [Window(0, BILLION)]
    assert len(parse_windows("8", trajectory)) == 8
    begun = time.perf_counter()
    with pytest.raises(TrajectoryError, match=r"expected 99999999\d or more"):
        track(trajectory, workload, parse_windows("epochs", trajectory))
    assert time.perf_counter() - begun < 2


def test_buffers_by_other_names_are_named(tmp_path: Path) -> None:
    trajectory, workload = KINDS["momentum"](tmp_path / "t")

    def other() -> nn.Module:
        model = workload.build_model()
        model.register_buffer("extra", torch.zeros(1))
        return model

    with pytest.raises(TrajectoryError, match="buffer 'extra' is in the workload only"):
        trajectory.verify(Workload(other, workload.loss, workload.train_set, workload.validation_set))


def destroy(path: str) -> None:
    raise AssertionError(f"{path} would be gone")


def cautious(size: int = 3) -> Workload:
    return KINDS_WORKLOAD[0]


KINDS_WORKLOAD: list[Workload] = []


def test_what_a_record_names_is_not_called_unless_it_makes_a_workload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = tmp_path / "inner"
    _, workload = KINDS["momentum"](tmp_path / "t")
    KINDS_WORKLOAD[:] = [workload]
    named = WorkloadReference(reference=f"{__name__}:cautious", settings={"size": 5})
    assert load_recorded(named, tmp_path).settings == {"size": 5}
    for reference in (f"{__name__}:destroy", "shutil:rmtree", "os:remove"):
        with pytest.raises(WorkloadError, match="not annotated to return one and is not called"):
            load_recorded(WorkloadReference(reference=reference, settings={"path": "/"}), tmp_path)
    (tmp_path / "t" / "__init__.py").write_text("raise AssertionError('this is run')")
    for reference in (str(tmp_path / "t"), f"{tmp_path}/x/../t"):
        with pytest.raises(WorkloadError, match="is code inside of the trajectory"):
            load_recorded(WorkloadReference(reference=reference, settings={}), tmp_path / "t")
    (tmp_path / "t" / "evil.py").write_text("raise AssertionError('this is run')")
    for folder, reference in ((tmp_path / "t", "evil:f"), (tmp_path, "t.evil:f"), (tmp_path.parent, "inner.t.evil:f")):
        monkeypatch.chdir(folder)
        with pytest.raises(WorkloadError, match="is code inside of the trajectory"):
            load_recorded(WorkloadReference(reference=reference, settings={}), tmp_path / "t")
    for reference in (":f", "..x:f", "a b:f", "\0", "x" * 5000):
        with pytest.raises(WorkloadError):
            load_recorded(WorkloadReference(reference=reference, settings={}), tmp_path)


def largest_drift(replayed: State, recorded: State, origin: State) -> float:
    return max(drifts(replayed, recorded, origin).values())


def test_drift_of_integers_and_of_what_never_moved() -> None:
    begun = State({"w": torch.zeros(2)}, {"n": torch.tensor(0), "mask": torch.tensor([0.0, -float("inf")])})
    there = State({"w": torch.ones(2)}, {"n": torch.tensor(4), "mask": begun.buffers["mask"]})
    assert largest_drift(there, there, begun) == 0
    off = State({"w": torch.tensor([1.0, 1.0001])}, dict(there.buffers))
    assert largest_drift(off, there, begun) == pytest.approx(1e-4, rel=1e-2)
    miscounted = State(dict(there.parameters), {**there.buffers, "n": torch.tensor(3)})
    assert largest_drift(miscounted, there, begun) == 0.25


def test_drift_is_that_of_the_worst_tensor_whatever_the_others_moved() -> None:
    begun = State({"slow": torch.zeros(2), "fast": torch.zeros(2)}, {"running_var": torch.ones(2)})
    there = State({"slow": torch.full((2,), 1e-4), "fast": torch.ones(2)}, {"running_var": torch.full((2,), 5000.0)})
    standing = State({**there.parameters, "slow": begun.parameters["slow"]}, there.buffers)
    assert largest_drift(standing, there, begun) == pytest.approx(0.1, rel=1e-3)
    fast_off = State({**there.parameters, "fast": torch.full((2,), 0.9)}, there.buffers)
    assert largest_drift(fast_off, there, begun) == pytest.approx(0.1, rel=1e-3)
    statistics_off = State(there.parameters, {"running_var": torch.full((2,), 4500.1)})
    assert largest_drift(statistics_off, there, begun) == pytest.approx(0.1, rel=1e-2)
    # A gradient that is 0 but for rounding, which another machine rounds otherwise.
    noise = State({**begun.parameters, "fast": torch.ones(2), "slow": torch.full((2,), 1e-8)}, there.buffers)
    other = State({**noise.parameters, "slow": torch.full((2,), -1e-8)}, there.buffers)
    assert largest_drift(other, noise, begun) < 1e-4


def test_other_optimizer_state_is_told() -> None:
    def state(**entry: Any) -> State:
        return State({}, {}, {"w": entry})

    mean = torch.tensor([1.0, 2.0])
    assert other_optimizer_state(state(step=3.0, mean=mean), state(step=torch.tensor(3.0), mean=mean)) is None
    assert other_optimizer_state(state(mean=mean), state(mean=mean * 1.0001)) is None
    assert other_optimizer_state(state(mean=mean), state(mean=mean * 1.01)) == "'mean' of 'w'"
    noise = State({}, {}, {"w": {"mean": mean}, "b": {"mean": torch.tensor([1e-9])}})
    assert other_optimizer_state(State({}, {}, {**noise.optimizer, "b": {"mean": torch.zeros(1)}}), noise) is None
    assert other_optimizer_state(state(step=3.0), state(step=torch.tensor(4.0))) == "'step' of 'w'"
    assert other_optimizer_state(state(mean=None), state(mean=mean)) is None
    assert "'w' has ['mean'], the replay []" in str(other_optimizer_state(State({}), state(mean=mean)))
