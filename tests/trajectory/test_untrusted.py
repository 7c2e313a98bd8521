"""What is read back was written by who knows whom: each way of lying has its own clear error."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_format import Row, read_rows, write_rows
from recordings import KINDS
from safetensors import numpy as safetensors_numpy
from safetensors.torch import load_file, save_file
from torch import nn

from dit_mlflow import InputError, Trajectory, TrajectoryError, Window, Workload, WorkloadError, parse_windows, track
from dit_mlflow.trajectory import State
from dit_mlflow.trajectory import manifest as manifest_module
from dit_mlflow.trajectory.manifest import (
    CheckpointEntry,
    ModelLayout,
    OptimizerLayout,
    TensorLayout,
    WorkloadReference,
)
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


def rows_changed(folder: Path, change: Callable[[list[Row]], Any], number: int = -1) -> None:
    """Change the steps of one file."""
    path = sorted(folder.glob("steps*"))[number]
    rows = read_rows(safetensors_numpy.load_file(path))
    change(rows)
    write_rows(rows, path)
    edit(folder, lambda manifest: None)


def tensors_changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], pattern: str = "check*") -> None:
    path = sorted(folder.glob(pattern))[-1]
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    edit(folder, lambda manifest: None)


def put(**values: Any) -> Callable[[list[Row]], None]:
    return lambda rows: rows[0].update(values)


def settings(**changes: Any) -> Callable[[list[Row]], None]:
    def change(rows: list[Row]) -> None:
        groups = json.loads(rows[0]["hyperparameters"])
        groups[0].update(changes)
        rows[0]["hyperparameters"] = json.dumps(groups).encode()

    return change


BILLION = 10**9

MANIFESTS: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "a billion steps": (
        lambda m: (m["steps"][-1].update(stop=BILLION), m.update(num_steps=BILLION, epoch_ends=[BILLION])),
        r"steps-00004\.safetensors is not a usable record of steps: it has \d steps; expected 99999999\d or more",
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
        r"torch.optim.SGD cannot be built with the recorded settings .*Invalid learning rate",
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
        ('{"format": 3, "format": 3, ', "not a trajectory manifest"),
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


@pytest.mark.parametrize("number", [1, 2, 4, -1, 10**400])
def test_manifest_of_another_format_is_named_with_what_to_do(number: int, tmp_path: Path) -> None:
    KINDS["momentum"](tmp_path / "t")
    edit(tmp_path / "t", lambda m: m.update(format=number, versions={"dit-mlflow": "0.0.9"}, surprise=1))
    message = rf"has format {str(number)[:20]}, and .* reads format 3 alone: record .* again, or open it .* '0\.0\.9'"
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(tmp_path / "t")


@pytest.mark.parametrize("number", ["3", None, True, 3.5, [3]])
def test_manifest_of_no_format_is_refused(number: Any, tmp_path: Path) -> None:
    KINDS["momentum"](tmp_path / "t")
    edit(tmp_path / "t", lambda m: m.update(format=number))
    with pytest.raises(TrajectoryError, match="not a trajectory manifest: it has no format number; 3 is expected"):
        Trajectory.open(tmp_path / "t")


def test_manifest_of_any_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)  # A terabyte, of which nothing is on the disk.
    with pytest.raises(TrajectoryError, match="1099511627776 bytes, expected 67108864 at most"):
        Trajectory.open(tmp_path)


@pytest.mark.parametrize("target", ["/proc/kmsg", "/proc/self/mem", "/etc/passwd"])
def test_a_manifest_that_is_a_link_out_of_the_folder_is_not_read(target: str, tmp_path: Path) -> None:
    """The first has no end, the second cannot be read."""
    if not Path(target).exists():
        pytest.skip(f"this system has no {target}")
    (tmp_path / "manifest.json").symlink_to(target)
    with pytest.raises(TrajectoryError, match=r"manifest\.json is a link that leaves the folder"):
        Trajectory.open(tmp_path)


def test_a_manifest_of_very_many_faults_is_refused_at_once(tmp_path: Path) -> None:
    KINDS["momentum"](tmp_path / "t")
    edit(tmp_path / "t", lambda m: m.update(epoch_ends=["x"] * 500_000))
    begun = time.perf_counter()
    with pytest.raises(TrajectoryError, match="500000 values are not what is expected in their places"):
        Trajectory.open(tmp_path / "t")
    edit(tmp_path / "t", lambda m: m.update(epoch_ends=[[]] * 2_000_000))
    with pytest.raises(TrajectoryError, match="more than 4000000 values"):
        Trajectory.open(tmp_path / "t")
    assert time.perf_counter() - begun < 10


def test_a_manifest_that_could_not_be_read_again_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many states of many parameters, each with a number of its own."""
    names = [f"layer.{number}" for number in range(100)]
    manifest = manifest_module.Manifest(
        complete=True,
        num_steps=0,
        num_samples=None,
        epoch_ends=(),
        model=ModelLayout(
            name="m", parameters={name: TensorLayout(shape=(), dtype="float32") for name in names}, buffers={}
        ),
        optimizer=OptimizerLayout(name="Adam", defaults={}, groups=(tuple(names),)),
        steps=(),
        checkpoints=tuple(
            CheckpointEntry(step=step, files=(), scalars={name: {"step": step} for name in names}) for step in range(50)
        ),
        files={},
        workload=None,
        dataset=None,
        versions={},
        threads=1,
    )
    manifest.encode()
    for limit in ("MOST_VALUES", "LARGEST"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dit_mlflow.trajectory.manifest.{limit}", 10_000)
            with pytest.raises(TrajectoryError, match=r"50 stored states of 100 parameters.*checkpoint_every"):
                manifest.encode()


def test_a_shape_beyond_63_bits_is_refused(tmp_path: Path) -> None:
    KINDS["momentum"](tmp_path / "t")
    path = sorted((tmp_path / "t").glob("check*"))[-1]
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]

    step = next(key for key in header if key != "__metadata__").partition("/")[0]
    header[f"{step}/parameters/x"] = {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [len(data), len(data)]}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    edit(tmp_path / "t", lambda m: None)
    with pytest.raises(TrajectoryError, match=f"{path.name}: '{step}/parameters/x' cannot be read"):
        Trajectory.open(tmp_path / "t").check_record()


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


STEPS: dict[str, tuple[str, Callable[[list[Row]], Any], str]] = {
    "a step left out": ("momentum", lambda rows: rows.pop(1), "it has 4 steps; expected 5 or more"),
    "steps out of order": ("momentum", lambda rows: rows.reverse(), "its steps are not numbered 1 … 5"),
    "a step twice": ("momentum", lambda rows: rows.insert(0, rows[0]), "its steps are not numbered 1 … 5"),
    "a sample before the first": (
        "momentum",
        put(indices=[[0, -1]], coefficients=None),
        r"there is sample \[-1\]; the manifest has 0 … 23",
    ),
    "a sample after the last": ("momentum", put(indices=[[0, 24]], coefficients=None), r"there is sample \[24\]"),
    "no samples": ("momentum", put(indices=[[]], coefficients=None), "in steps 1 … 5, a batch has no samples"),
    "no batches": ("momentum", put(indices=[], coefficients=None, random_states=[]), "a step has no batches"),
    "negative epoch": ("momentum", put(epoch=-1), "an epoch is negative"),
    "coefficients too few": ("momentum", put(coefficients=[[0.1]]), "as many coefficients as sample indices"),
    "coefficients to spare": ("momentum", put(coefficients=[[0.1] * 9]), "as many coefficients as sample indices"),
    "infinite coefficient": (
        "momentum",
        lambda rows: rows[0]["coefficients"][0].__setitem__(0, float("inf")),
        "a coefficient is not finite",
    ),
    "coefficient that is no number": (
        "momentum",
        lambda rows: rows[4]["coefficients"][0].__setitem__(7, float("nan")),
        "a coefficient is not finite",
    ),
    "unknown parameter": (
        "momentum",
        put(no_gradient=b'["7.weight"]'),
        "no_gradient names '7.weight', which is no param",
    ),
    "unknown frozen one": ("momentum", put(zero_gradient=b'["x"]'), "zero_gradient names 'x', which is no parameter"),
    "neither nor": (
        "momentum",
        put(no_gradient=b'["0.weight"]', zero_gradient=b'["0.bias", "0.weight"]'),
        "a gradient is None and 0 at once",
    ),
    "unknown module": (
        "momentum",
        put(evaluation_mode=b'["9"]'),
        "step 1 was recorded with module '9' in evaluation mode",
    ),
    "a name alone": ("momentum", put(evaluation_mode=b'"x"'), "evaluation_mode is not a list of names"),
    "names that are none": ("momentum", put(no_gradient=b"[1]"), "no_gradient is not a list of names"),
    "names that are not JSON": ("momentum", put(zero_gradient=b"x"), "zero_gradient is not JSON"),
    "names that are not text": ("momentum", put(no_gradient=b'["\xff"]'), "no_gradient is not JSON: 'utf-8' codec"),
    "text of another kind": ("momentum", put(evaluation_mode="[]".encode("utf-16")), "is not JSON: 'utf-8' codec"),
    "settings that are none": ("momentum", put(hyperparameters=b"{"), "hyperparameters is not JSON"),
    "settings without end": ("momentum", put(hyperparameters=b"[" * 10**5), "hyperparameters is not JSON: .* deep"),
    "settings of no group": ("momentum", put(hyperparameters=b"1"), "not those of 2 parameter groups"),
    "settings of one group": ("momentum", put(hyperparameters=b"[{}]"), "not those of 2 parameter groups"),
    "settings left out": ("momentum", put(hyperparameters=b"[{}, {}]"), r"hyperparameters lack \['lr'"),
    "settings said twice": ("momentum", put(hyperparameters=b'[{"lr": 1, "lr": 2}, {}]'), "'lr' is there twice"),
    "other parameters": ("momentum", settings(params=[1]), "or hold 'params'"),
    "a rate that is a word": ("momentum", settings(lr="fast"), "'lr' is not of the kind of its default 0.2"),
    "a rate beyond 64 bits": ("momentum", settings(lr=-(2**63)), "'lr' is not of the kind of its default 0.2"),
    "a rate of any size": ("momentum", settings(lr=10**4000), "'lr' is not of the kind of its default 0.2"),
    "a rate that is none": (
        "momentum",
        settings(lr=None),
        "SGD cannot make step 1 with the recorded settings",
    ),
    "one beta": ("dropout", settings(betas=[0.9]), "'betas' is not of the kind"),
    "a beta that diverges": ("dropout", settings(betas=[0.9, 1.5]), "torch.optim.Adam cannot make step 1"),
    "a state of nothing": ("dropout", put(random_states=[{}, None]), "a random state is that of no generator"),
    "a state cut short": (
        "dropout",
        lambda rows: rows[0]["random_states"][0].update(torch=b"0" * 100),
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


def resize(name: str, size: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda t: t.update({name: torch.cat([t[name], t[name]])[:size]})


def at(name: str, place: int, value: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda t: t[name].__setitem__(place, value)


ARRAYS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "one left out": (lambda t: t.pop("loss"), r"it lacks the tensors \['loss'\]"),
    "one too many": (lambda t: t.update(x=torch.zeros(1)), r"or has others, \['x'\]"),
    "another dtype": (
        lambda t: t.update(epoch=t["epoch"].int()),
        r"epoch has shape \[8\] and dtype int32; expected \[n\], int64",
    ),
    "flags of another dtype": (lambda t: t.update(has_loss=t["has_loss"].bool()), "has_loss has .* dtype bool"),
    "two dimensions": (lambda t: t.update(indices=t["indices"][:, None]), r"indices has shape \[64, 1\]"),
    "none": (lambda t: t.update(step=torch.tensor(1)), r"step has shape \[\] and dtype int64"),
    "an epoch too few": (resize("epoch", 7), "epoch has 7 elements; expected 8"),
    "a state too few": (resize("random_cuda", 15), "random_cuda has 15 elements; expected 16"),
    "a flag that is neither": (at("has_loss", 2, 2), "has_loss is neither 0 nor 1"),
    "coefficients without a flag": (at("has_coefficients", 2, 0), "as many coefficients as sample indices"),
    "coefficients that are two": (at("has_coefficients", 2, 255), "has_coefficients is neither 0 nor 1"),
    "an offset before 0": (at("step_offsets", 0, -1), "step_offsets does not lead from 0 to 16 in 8 parts"),
    "an offset after the end": (at("step_offsets", 8, 17), "step_offsets does not lead from 0 to 16 in 8 parts"),
    "offsets that turn": (
        at("micro_batch_offsets", 3, 2),
        "micro_batch_offsets does not lead from 0 to 64",
    ),
    "an offset beyond all": (at("micro_batch_offsets", 3, 2**62), "micro_batch_offsets does not lead from 0 to 64"),
    "offsets too few": (resize("step_offsets", 8), "step_offsets does not lead from 0 to 16 in 8 parts"),
    "no offsets": (resize("dictionary_offsets", 0), "dictionary_offsets does not lead from 0 to"),
    "no batches": (resize("micro_batch_offsets", 0), "step_offsets does not lead from 0 to -1 in 8 parts"),
    "a dictionary that is longer": (resize("dictionary", 9), "dictionary_offsets does not lead from 0 to 9"),
    "offsets that wrap": (
        lambda t: t.update(dictionary_offsets=torch.tensor([0, 2**63 - 1, -(2**63), -1, len(t["dictionary"])])),
        "dictionary_offsets does not lead from 0 to",
    ),
    "no entry": (at("hyperparameters", 0, -1), r"hyperparameters refers to entry \[-1\] of the dictionary"),
    "an entry after the last": (at("no_gradient", 7, 18), r"refers to entry \[18\] of the dictionary, which has 18"),
    "an entry beyond all": (
        at("zero_gradient", 7, 2**63 - 1),
        r"zero_gradient refers to entry \[9223372036854775807\]",
    ),
    "a state before none": (at("random_torch", 0, -2), r"random_torch refers to entry \[-2\]"),
    "a state that is text": (at("random_torch", 0, 0), r"a stored random state \(torch\) is no state of that"),
    "text that is a state": (at("evaluation_mode", 0, 5), "evaluation_mode is not JSON"),
    "a state of another": (
        lambda t: t.update(random_cuda=t["random_torch"].clone()),
        r"a stored random state \(cuda\) is no state of that generator: it has 2\d+ bytes, expected 16",
    ),
    "states out of order": (at("random_micro_batch", 1, 0), "random_micro_batch does not increase within 0 … 15"),
    "a state before the first": (at("random_micro_batch", 0, -1), "random_micro_batch does not increase within 0 … 15"),
    "a state after the last": (at("random_micro_batch", 15, 16), "random_micro_batch does not increase within 0 … 15"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_steps_that_lie_are_refused(name: str, tmp_path: Path) -> None:
    change, message = ARRAYS[name]
    _, workload = KINDS["dropout"](tmp_path / "t")
    tensors_changed(tmp_path / "t", change, "steps*")
    with pytest.raises(
        TrajectoryError, match=rf"steps-00004\.safetensors is not a usable record of steps: .*{message}"
    ):
        Trajectory.open(tmp_path / "t").verify(workload)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"PAR1", b"\xff" * 8, b"\xff" * 100, (2).to_bytes(8, "little") + b"{}x"),
        (10**9).to_bytes(8, "little") + b"{}",
        (60).to_bytes(8, "little") + b'{"step":{"dtype":"I64","shape":[99],"data_offsets":[0,792]}}',
    ],
)
@pytest.mark.parametrize("kind", ["steps", "checkpoints"])
def test_what_is_no_safetensors_file_is_refused(kind: str, content: bytes, tmp_path: Path) -> None:
    _, workload = KINDS["momentum"](tmp_path / "t")
    path = sorted((tmp_path / "t").glob(f"{kind}*"))[-1]
    path.write_bytes(content)
    edit(tmp_path / "t", lambda manifest: None)
    with pytest.raises(TrajectoryError, match=f"{path} is not a readable safetensors file"):
        Trajectory.open(tmp_path / "t").verify(workload)


def test_rows_that_do_not_count_are_not_looked_at(tmp_path: Path) -> None:
    """After a resume, a file holds steps that did not happen."""
    trajectory, workload = KINDS["resumed"](tmp_path / "t")
    expected = list(trajectory.states(workload, 0, 7))
    nonsense = {"step": 77, "epoch": -1, "indices": [[10**9]], "coefficients": [[float("nan")]]}
    nonsense |= {"hyperparameters": b"no JSON", "no_gradient": b'["x"]', "random_states": [{"torch": b"none"}]}

    def change(rows: list[Row]) -> None:
        assert len(rows) == 5
        rows[4].update(nonsense)

    rows_changed(tmp_path / "t", change, 0)
    changed = Trajectory.open(tmp_path / "t")
    assert changed.verify(workload).max_drift == 0
    for one, other in zip(changed.states(workload, 0, 7), expected, strict=True):
        assert all(torch.equal(one.parameters[name], value) for name, value in other.parameters.items())


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
        "gives the parameters of the checkpoint bit for bit, but not its optimizer's state: 'exp_avg' of '0.weight'",
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


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def double(value: float) -> bytes:
    return struct.pack("<d", value)


@pytest.mark.parametrize(
    ("field", "state"),
    [
        *[("torch", content) for content in (b"", b"x" * 5056, bytes(5055), words(0), words(632), words(2**32 - 1))],
        ("torch", words(632, *[0] * 632)),  # No generator of torch's is in this state.
        ("torch", words(631, *[1] * 631)),
        ("torch", words(632, *[1] * 633)),
        ("torch", words(632, *[1] * 632, 632, 1)),
        *[("cuda", content) for content in (b"", bytes(15))],
        *[("python", content) for content in (b"", b"[]", bytes(2507), bytes(2509), words(*[1] * 624))],
        ("python", words(*[1] * 624, 625) + double(0.5)),
        ("python", words(*[1] * 624, 624) + double(float("inf"))),
        *[("numpy", content) for content in (b"", b"{}", bytes(2511), bytes(2513))],
        *[("numpy", words(*[1] * 624, at, 0) + double(0.0)) for at in (625, 2**31, 2**32 - 1)],
        ("numpy", words(*[1] * 624, 0, 2) + double(0.0)),
        *[("numpy", words(*[1] * 624, 0, 1) + double(gauss)) for gauss in (float("inf"), float("nan"))],
    ],
)
def test_random_states_that_are_none_are_refused(field: str, state: bytes) -> None:
    with pytest.raises(TrajectoryError, match=rf"a stored random state \({field}\) is no state of that generator"):
        RandomState.decode(field, state)


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


def test_what_a_trusted_record_names_is_not_called_unless_it_makes_a_workload(tmp_path: Path) -> None:
    _, workload = KINDS["momentum"](tmp_path / "t")
    KINDS_WORKLOAD[:] = [workload]
    named = WorkloadReference(reference=f"{__name__}:cautious", settings={"size": 5})
    assert load_recorded(named, tmp_path / "t", trusted=True).settings == {"size": 5}
    for reference in (f"{__name__}:destroy", "shutil:rmtree", "os:remove"):
        with pytest.raises(WorkloadError, match="not annotated to return one and is not called"):
            load_recorded(WorkloadReference(reference=reference, settings={"path": "/"}), tmp_path / "t", trusted=True)


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
