"""Compiled and parallel models are recorded as what they wrap, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import Net, assert_replays, record, whole
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from workloads import digits_model, digits_workload

from dit_mlflow import TrajectoryRecorder, UnsupportedError, WorkloadError, track
from dit_mlflow.trajectory import REPLAY_TOLERANCE
from dit_mlflow.workload.wrappers import plain_copy


class Compiler:
    """The backend of ``torch.compile`` that runs the captured graph as it is; counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def compiled_in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def compiled_forward(model: nn.Module, backend: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def compiled_part(model: nn.Module, backend: Any) -> nn.Module:
    model.inner = torch.compile(model.inner, backend=backend)
    return model


COMPILATIONS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "wrapper": lambda model, backend: torch.compile(model, backend=backend),
    "in place": compiled_in_place,
    "wrapper, one graph": lambda model, backend: torch.compile(model, backend=backend, fullgraph=True),
    "forward alone": compiled_forward,
    "a part": compiled_part,
    "around a parallel wrapper": lambda model, backend: torch.compile(nn.DataParallel(model), backend=backend),
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", COMPILATIONS)
def test_compiled_model_is_recorded_and_swept_as_what_it_wraps(name: str, tmp_path: Path) -> None:
    plain = Net()
    start = copy.deepcopy(plain)
    backend = Compiler()
    model = COMPILATIONS[name](plain, backend)
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5, momentum=0.9))
    assert backend.graphs > 0
    assert list(trajectory.manifest.model.parameters) == [name for name, _ in start.named_parameters()]
    workload = digits_workload(model=model, optimizer=lambda m: SGD(m.parameters(), lr=0.5, momentum=0.9))
    assert_replays(trajectory, workload, unnamed(model))

    reference = record(tmp_path / "r", start, SGD(start.parameters(), lr=0.5, momentum=0.9))
    expected = track(reference, digits_workload(model=Net, optimizer=None), whole(reference)).scores
    assert np.array_equal(track(trajectory, workload, whole(trajectory)).scores, expected)


def unnamed(model: nn.Module) -> nn.Module:
    """A model with the plain names and the present values of a wrapped one."""
    target = Net()
    with torch.no_grad():
        for mine, given in zip(target.parameters(), model.parameters(), strict=True):
            mine.copy_(given)
    return target


@pytest.mark.usefixtures("fresh_compiler")
def test_training_through_a_differentiated_graph_replays_within_tolerance(tmp_path: Path) -> None:
    model = torch.compile(Net(), backend="aot_eager")
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5))
    assert trajectory.verify(digits_workload(model=model, optimizer=None)).max_drift <= REPLAY_TOLERANCE


@pytest.mark.usefixtures("fresh_compiler")
def test_what_is_compiled_inside_and_outside_and_held_twice_is_plain_in_a_copy() -> None:
    part: Any = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    part = torch.compile(part, backend="eager")
    model: Any = nn.Sequential(part, part)
    model.forward = torch.compile(model.forward, backend="eager")
    copied: Any = plain_copy(model)
    assert [type(module) for module in copied.modules()] == [nn.Sequential, nn.Sequential, nn.Linear]
    assert copied[0] is copied[1]
    nn.init.zeros_(copied[0][0].weight)
    torch.testing.assert_close(copied(torch.ones(2)), copied[0][0].bias)


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def two_processes() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel_is_recorded_as_what_it_wraps(tmp_path: Path) -> None:
    inner = digits_model()
    model = nn.DataParallel(inner)
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5))
    assert_replays(trajectory, digits_workload(model=model), inner)


@pytest.mark.usefixtures("one_process")
def test_distributed_training_in_one_process_is_recorded(tmp_path: Path) -> None:
    inner = digits_model()
    model = DistributedDataParallel(inner)
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.5))
    assert_replays(trajectory, digits_workload(model=model), inner)


@pytest.mark.usefixtures("two_processes")
def test_distributed_training_in_two_processes_is_refused(tmp_path: Path) -> None:
    inner = digits_model()
    for model in (inner, DistributedDataParallel(inner)):
        with pytest.raises(UnsupportedError, match=r"training runs in 2 processes.*a part of each batch"):
            TrajectoryRecorder(model, SGD(model.parameters(), lr=0.5), tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.usefixtures("one_process")
def test_sharded_models_are_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(digits_model(), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedError, match=r"is sharded \(FSDP\)"):
        TrajectoryRecorder(model, SGD(model.parameters(), lr=0.5), tmp_path / "t")


def test_a_model_that_cannot_be_built_is_named() -> None:
    """Of a record's settings, say: as many hidden units as no memory holds."""
    workload = digits_workload(model=lambda: nn.Linear(64, 10**12))
    with pytest.raises(WorkloadError, match=r"the model cannot be built: RuntimeError: .*allocate"):
        workload.build_model()
