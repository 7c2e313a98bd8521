"""Many processes at once on one store, many steps, many samples, many windows."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from benchmarks.faults import work
from benchmarks.faults.counting import KINDS, Row, compared, counted, place
from benchmarks.faults.processes import codes
from benchmarks.stores import Missing
from dit_mlflow import Trajectory, Window, Workload, parse_windows, track, train
from dit_mlflow.explanation import Checks
from dit_mlflow.tracking import log_trajectory, run_influence

RECORDERS = 8
JOBS = 20


def recorders(folder: Path, sizes: dict[str, int]) -> list[Row]:
    """8 processes record into one store at once; each logs its loss every ten steps."""
    rows: list[Row] = []
    for kind in KINDS:
        steps = sizes["recorder steps"] if kind == "server" else sizes["recorder steps elsewhere"]
        row: Row = {"store": kind, "runs": RECORDERS, "steps tried": RECORDERS * steps}
        rows.append(row)
        try:
            with place(kind, folder / kind) as here:
                begun = time.perf_counter()
                workers = [here.recorder(seed, steps, metric_every=10) for seed in range(RECORDERS)]
                row["exit 0"] = codes(workers).count(0)
                row["seconds"] = round(time.perf_counter() - begun, 1)
                found = here.looked_at(workers)
        except Missing as error:
            row["not measured"] = str(error)
            continue
        row |= {"FINISHED": sum(one["status"] == "FINISHED" for one in found), **counted(found)}
        row["metrics"] = f"{sum(one['metrics'] for one in found)} of {RECORDERS * (steps // 10)}"
    return rows


def jobs(folder: Path, sizes: dict[str, int]) -> list[Row]:
    """20 main jobs at once on a server, some on other stores, each with a training of its own from the same seeds."""
    reference = quiet_scores(folder)
    rows: list[Row] = []
    for kind in KINDS:
        count = sizes["jobs"] if kind == "server" else sizes["jobs elsewhere"]
        row: Row = {"store": kind, "jobs": count}
        rows.append(row)
        try:
            with place(kind, folder / kind) as here:
                begun = time.perf_counter()
                workers = [here.asking(number) for number in range(count)]
                row["exit 0"] = codes(workers).count(0)
                row["seconds"] = round(time.perf_counter() - begun, 1)
                status = here.answer("statuses", work.statuses, here.experiment)
                row["runs"] = sum(status.values())
                row["FINISHED"] = status.get("FINISHED", 0)
                scores = here.answer("scores", work.scores_of, [worker.noted() for worker in workers])
        except Missing as error:
            row["not measured"] = str(error)
            continue
        row |= compared(scores, reference)
    return rows


def quiet_scores(folder: Path) -> list[float]:
    """The scores of one job, undisturbed."""
    with place("SQLite", folder / "alone") as here:
        run_id = here.answer("job", work.ask, here.experiment)
        (found,) = here.answer("scores", work.scores_of, [run_id])
    return list(found)


@contextmanager
def measured(rows: list[Row], stage: str) -> Iterator[Row]:
    """Adds a row: seconds on the clock and of the CPU, memory at the beginning of the block and at most inside it."""
    # The process's largest size is counted from here on.
    Path("/proc/self/clear_refs").write_text("5")
    row: Row = {"stage": stage}
    before, clock, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    yield row
    row |= {
        "seconds": round(time.perf_counter() - clock, 1),
        "CPU seconds": round(time.process_time() - cpu, 1),
        "MiB before": before,
        "MiB at most": _memory("VmHWM"),
    }
    rows.append(row)


def _memory(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return round(int(found[1]) / 1024)


def many_steps(ready: Callable[[], None], steps: int) -> list[Row]:
    """Record a long training of 64-6-3, open, replay and sweep it."""
    rows: list[Row] = []
    settings: dict[str, Any] = {"optimizer": lambda model: SGD(model.parameters(), lr=0.05), "batch_size": 8}
    workload = Workload(
        model=work.network,
        loss=work.losses,
        train_set=work.data(),
        validation_set=work.data(),
        epochs=steps // 8 + 1,
        **settings,
    )
    name = f"{steps:,} steps"
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "t"
        with measured(rows, f"{name}: recording") as row:
            trajectory = train(workload, path, max_steps=steps)
        row["result"] = f"{trajectory.num_steps:,} steps, {_size(path)}"
        with measured(rows, f"{name}: opening") as row:
            trajectory = Trajectory.open(path)
        row["result"] = f"{trajectory.num_steps:,} steps"
        with measured(rows, f"{name}: verify") as row:
            drift = trajectory.verify(workload).max_drift
        row["result"] = f"largest difference {drift:g}"
        with measured(rows, f"{name}: track, 1 window") as row:
            scores = track(trajectory, workload, [Window(0, steps)]).scores
        row["result"] = f"{scores.size} scores, finite: {bool(torch.isfinite(torch.from_numpy(scores)).all())}"
    return rows


def _size(path: Path) -> str:
    files = [file.stat().st_size for file in path.iterdir()]
    return f"{sum(files) / 1e6:,.0f} MB in {len(files)} files"


def linear(samples: int) -> Workload:
    """Logistic regression on made-up data of two classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples + 256, 8, generator=generator)
    targets = (inputs.sum(1) + torch.randn(samples + 256, generator=generator) > 0).long()
    return Workload(
        model=lambda: nn.Linear(8, 2),
        loss=work.losses,
        train_set=TensorDataset(inputs[:samples], targets[:samples]),
        validation_set=TensorDataset(inputs[samples:], targets[samples:]),
        optimizer=lambda model: SGD(model.parameters(), lr=0.5),
        batch_size=4096,
        epochs=1,
    )


def many_samples(ready: Callable[[], None], samples: int) -> list[Row]:
    """Train on many samples, then the whole answer in a store: scores, tables, plots, report."""
    name = f"{samples:,} samples"
    return _answered(name, linear(samples), "1", None)


def many_windows(ready: Callable[[], None], windows: int) -> list[Row]:
    """The whole answer for many windows: a child run each."""
    workload = Workload(
        model=work.network,
        loss=work.losses,
        train_set=work.data(),
        validation_set=work.data(),
        optimizer=lambda model: SGD(model.parameters(), lr=0.05),
        batch_size=8,
        epochs=windows // 4,
    )
    return _answered(f"{windows} windows", workload, str(windows), 2 * windows)


def _answered(name: str, workload: Workload, windows: str, steps: int | None) -> list[Row]:
    rows: list[Row] = []
    mlflow.set_experiment("reliability")
    with tempfile.TemporaryDirectory() as temporary:
        with measured(rows, f"{name}: recording") as row:
            trajectory = train(workload, Path(temporary) / "t", max_steps=steps)
        row["result"] = f"{trajectory.num_steps:,} steps, {_size(trajectory.directory)}"
        with mlflow.start_run() as run:
            log_trajectory(trajectory)
        asked = parse_windows(windows, trajectory)
        with measured(rows, f"{name}: track") as row:
            scores = track(trajectory, workload, asked).scores
        row["result"] = f"{scores.size:,} scores"
        with measured(rows, f"{name}: the whole answer in a SQLite store, without retraining") as row:
            found = run_influence(run.info.run_id, trajectory, workload, asked, "local", Checks())
    page = Path(mlflow.artifacts.download_artifacts(run_id=found.run.info.run_id, artifact_path="influence"))
    sizes = ", ".join(f"{one} {(page / one).stat().st_size / 1e6:.1f} MB" for one in ("report.html", "scores.parquet"))
    status = work.statuses(lambda: None, "reliability")
    row["result"] = f"{sizes}; {status.get('FINISHED', 0)} of {sum(status.values())} runs FINISHED"
    return rows


def size(folder: Path, sizes: dict[str, int]) -> list[Row]:
    """Samples and windows, one after the other."""
    rows: list[Row] = []
    for function, count in ((many_samples, sizes["samples"]), (many_windows, sizes["windows"])):
        with place("SQLite", folder / function.__name__) as here:
            rows += here.answer("answer", function, count)
    return rows


def length(folder: Path, sizes: dict[str, int]) -> list[Row]:
    """Steps."""
    with place("SQLite", folder / "steps") as here:
        worker = here.worker("steps", many_steps, sizes["steps"])
        code = worker.exit_code(1400)
        if code:
            return [{"stage": f"{sizes['steps']:,} steps", "result": f"ended with {code}: {worker.said[-500:]}"}]
        return list(worker.noted())


assert os.name == "posix", "what is measured here needs /proc, signals and limits of POSIX"
