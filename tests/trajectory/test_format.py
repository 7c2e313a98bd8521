"""docs/format.md, held against what is recorded: read with json and safetensors alone, it is what the library reads."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import plain_format
import pytest
import torch
from plain_loop import record
from recordings import KINDS
from safetensors.numpy import load_file
from torch.optim import SGD
from workloads import digits_model, sample_losses

from dit_mlflow import Trajectory
from dit_mlflow.trajectory.manifest import DTYPES, CheckpointEntry, Manifest

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def drawing(directory: Path) -> tuple[Trajectory, None]:
    """All generators of the CPU draw, torch's holds a normal number back, and some losses are logged."""

    def loss(model: Any, batch: Any) -> Any:
        draws = torch.randn(1).item(), random.gauss(0, 1), np.random.randn()  # noqa: NPY002
        return sample_losses(model, batch) + 1e-3 * sum(draws)

    model = digits_model()
    return record(directory, model, SGD(model.parameters(), lr=0.1), loss=loss), None


RECORDINGS = {**KINDS, "drawing": drawing}


@pytest.mark.parametrize("kind", RECORDINGS)
def test_steps_read_by_the_page_are_those_of_the_trajectory(kind: str, tmp_path: Path) -> None:
    trajectory, _ = RECORDINGS[kind](tmp_path / "t")
    rows = plain_format.read_steps(tmp_path / "t")
    assert len(rows) == trajectory.num_steps > 0
    for t, row in enumerate(rows):
        step = trajectory.step(t)
        assert (row["step"], row["epoch"], row["loss"]) == (t, step.epoch, step.loss)
        assert row["indices"] == [part.tolist() for part in step.indices]
        assert row["coefficients"] == (step.coefficients and [part.tolist() for part in step.coefficients])
        assert json.loads(row["hyperparameters"]) == json.loads(json.dumps(step.hyperparameters))
        for name in plain_format.NAME_SETS:
            assert set(json.loads(row[name])) == getattr(step, name)
        decoders = {
            "torch": plain_format.torch_state,
            "cuda": lambda stored: stored,
            "python": plain_format.python_state,
            "numpy": plain_format.numpy_state,
        }
        for stored, state in zip(row["random_states"], step.random_states, strict=True):
            found = {name: decoders[name](content) for name, content in (stored or {}).items()}
            given = {} if state is None else {k: value for k, value in state._asdict().items() if value is not None}
            assert found == given
    if kind == "drawing":
        assert rows[1]["random_states"][0].keys() == {"torch", "python", "numpy"}


@pytest.mark.parametrize("kind", KINDS)
def test_states_read_by_the_page_are_those_of_the_trajectory(kind: str, tmp_path: Path) -> None:
    trajectory, _ = KINDS[kind](tmp_path / "t")
    for t in trajectory.checkpoint_steps:
        state = trajectory.checkpoint(t)
        expected = {f"parameters/{name}": value for name, value in state.parameters.items()}
        expected |= {f"buffers/{name}": value for name, value in state.buffers.items()}
        for name, entry in state.optimizer.items():
            expected |= {f"optimizer/{key}/{name}": value for key, value in entry.items()}
        found = plain_format.tensors_of_state(tmp_path / "t", t)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[path], value.numpy()) for path, value in expected.items())


def test_batches_read_by_the_page_are_those_of_the_trajectory(tmp_path: Path) -> None:
    trajectory, _ = KINDS["batches"](tmp_path / "t")
    for t in range(trajectory.num_steps):
        found = plain_format.tensors_of_batch(tmp_path / "t", t)
        expected = trajectory.batches(t)
        assert expected is not None
        assert found.keys() == {f"{m}/{p}" for m, batch in enumerate(expected) for p in range(len(batch))}
        for m, batch in enumerate(expected):
            assert all(np.array_equal(found[f"{m}/{p}"], tensor.numpy()) for p, tensor in enumerate(batch))


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the table that follows a heading, by the name in their first column."""
    section = PAGE.split(f"\n## {heading}\n")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section.split("\n\n**")[0].split("\n## ")[0], re.MULTILINE)
    return {name: rest.split(" | ") for name, rest in rows}


def test_page_names_every_tensor_of_steps(tmp_path: Path) -> None:
    trajectory, _ = KINDS["dropout"](tmp_path / "t")
    tensors = load_file(tmp_path / "t" / trajectory.manifest.steps[1].file)
    references = max(tensors[name].max() for name in ("hyperparameters", *plain_format.NAME_SETS, "random_torch"))
    lengths = {
        "S": len(tensors["step"]),
        "S + 1": len(tensors["step"]) + 1,
        "M + 1": int(tensors["step_offsets"][-1]) + 1,
        "N": int(tensors["micro_batch_offsets"][-1]),
        "≤ N": int(tensors["micro_batch_offsets"][-1]),
        "R": len(tensors["random_micro_batch"]),
        "D + 1": references + 2,
        "bytes": int(tensors["dictionary_offsets"][-1]),
    }
    found = {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    assert found == {name: (dtype, (lengths[length],)) for name, (dtype, length, _) in table("Steps").items()}


def test_page_names_every_field_and_dtype() -> None:
    assert [*table("manifest.json")] == [*Manifest.model_fields]
    assert [*table("Checkpoints")] == [*CheckpointEntry.model_fields]
    listed = PAGE.split("A dtype is one of ")[1].split(". A file name")[0]
    assert re.findall(r"`(\w+)`", listed) == [*DTYPES]
    assert f"# The trajectory format, number {Manifest.model_fields['format'].default}" in PAGE
