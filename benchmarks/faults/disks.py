"""Disks that are full or read-only, and file handles that are used up."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults import work
from benchmarks.faults.counting import Place, Row, compared, counted, place, run_of, state_of, steps_of
from benchmarks.faults.load import quiet_scores
from benchmarks.faults.processes import Worker
from dit_mlflow.tracking import load_trajectory

STEPS = 3_000
"""Of a training on a disk; its trajectory takes about a megabyte."""


class NoMount(Exception):
    """This user may not mount a disk of a given size."""


@contextmanager
def disk(path: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of its own in memory."""
    path.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if made.returncode:
        raise NoMount(f"mount: {made.stderr.strip()}; needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Take the space that is left."""
    with suppress(OSError), (path / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def read_only(path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)


def full(folder: Path, sizes: dict[str, int]) -> list[Row]:
    """Disks without space, at five places; read-only disks, at four."""
    rows: list[Row] = []
    cases: dict[str, Callable[[str, Path], Row]] = {
        "full before training: the trajectory's folder": partial(_recording, "SQLite", 64, True),
        "full during training: the trajectory's folder": partial(_recording, "SQLite", 256, False),
        "full during training: the temporary folder, whence a server gets it": partial(_temporary, 256),
        "full while reading: the cache of downloads": partial(_cache, 64, False),
        "full while a job logs: the store's artifacts": partial(_job, 60, False),
        "read-only before training: the trajectory's folder": partial(_recording, "SQLite", None, True),
        "read-only while reading: the trajectory's folder": _reading,
        "read-only while reading: the cache of downloads": partial(_cache, None, True),
        "read-only while a job logs: the store's artifacts": partial(_job, None, True),
    }
    for number, (name, case) in enumerate(cases.items()):
        try:
            rows.append({"disk": name, **case(folder / f"case-{number}")})
        except NoMount as error:
            rows.append({"disk": name, "not measured": str(error)})
    return rows


def _recording(kind: str, kilobytes: int | None, at_once: bool, folder: Path) -> Row:
    with disk(folder / "disk", kilobytes or 10_000) as full, place(kind, folder / "place", full / "artifacts") as here:
        (full / "artifacts").mkdir()
        if kilobytes is None:
            read_only(full)
        elif at_once:
            fill(full)
        return _of_one(here, here.recorder(0, STEPS))


def _temporary(kilobytes: int, folder: Path) -> Row:
    with disk(folder / "disk", kilobytes) as full, place("server", folder / "place") as here:
        return _of_one(here, here.recorder(0, STEPS, {"TMPDIR": str(full)}))


def _of_one(here: Place, worker: Worker) -> Row:
    code = worker.exit_code()
    found = here.looked_at([worker])
    return {
        "exit code": code,
        "run": found[0]["status"],
        "steps trained": steps_of(worker),
        **counted(found),
        "steps in the folder that a message names": _elsewhere(here, worker),
        "said": said(worker),
    }


def _elsewhere(here: Place, worker: Worker) -> int | None:
    kept = work.kept_folder(worker.said)
    if kept is None:
        return None
    return int(here.answer("elsewhere", work.checked_folder, kept, state_of(worker))["steps"])


def said(worker: Worker) -> str:
    """The last line of what a process printed that names an error, shortened."""
    lines = [line.strip() for line in worker.said.splitlines()]
    named = [line for line in lines if "Error" in line or "could not be written" in line or "cannot be" in line]
    text = named[-1] if named else (lines[-1] if lines else "")
    for folder in (worker.folder.parents[1], Path.cwd()):
        text = text.replace(str(folder), "…")
    return text if len(text) <= 200 else text[:120] + " … " + text[-75:]


def _cache(kilobytes: int | None, locked: bool, folder: Path) -> Row:
    with disk(folder / "disk", 10_000) as full, place("server", folder / "place") as here:
        worker = here.recorder(0, STEPS)
        assert worker.exit_code() == 0, worker.said
        (full / "cache").mkdir(mode=0o700)
        if locked:
            read_only(full)
        else:
            fill(full)
        reader = here.worker("read", read, run_of(worker), state_of(worker), DIT_MLFLOW_CACHE=str(full / "cache"))
        return _of_reader(reader)


def _reading(folder: Path) -> Row:
    with disk(folder / "disk", 10_000) as full, place("SQLite", folder / "place", full / "artifacts") as here:
        worker = here.recorder(0, STEPS)
        assert worker.exit_code() == 0, worker.said
        read_only(full)
        return _of_reader(here.worker("read", read, run_of(worker), state_of(worker)))


def read(ready: Callable[[], None], run_id: str, state: str) -> dict[str, Any]:
    return work.checked(load_trajectory(run_id), state)


def _of_reader(reader: Worker) -> Row:
    code = reader.exit_code()
    found = reader.noted()
    if found is None:
        return {"exit code": code, "open": 0, "wrong": 0, "said": said(reader)}
    return {"exit code": code, **counted([found]), "said": found.get("error", "")}


def _job(kilobytes: int | None, locked: bool, folder: Path) -> Row:
    reference = quiet_scores(folder)
    with disk(folder / "disk", kilobytes or 10_000) as full, place("SQLite", folder / "p", full / "a") as here:
        if locked:
            read_only(full)
        worker = here.asking(0)
        code = worker.exit_code()
        runs = here.answer("runs", work.influence_runs, here.experiment)
        scores = here.answer("scores", work.scores_of, runs)
        statuses = here.answer("statuses", work.statuses, here.experiment)
    return {
        "exit code": code,
        "run": ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())),
        **compared(scores, reference),
        "said": said(worker),
    }


def handles(folder: Path, sizes: dict[str, int]) -> list[Row]:
    """No file can be opened from a step on: for 300 steps, or for good."""
    rows: list[Row] = []
    for kind in ("SQLite", "server"):
        for name, at in (
            ("from step 300 to step 600", [(300, use_up), (600, give_back)]),
            ("from step 300 to the end of training", [(300, use_up)]),
        ):
            with place(kind, folder / f"{kind}-{name}") as here:
                worker = here.recorder(0, 900, at=at, flush_seconds=0.05, seconds_per_step=0.002)
                rows.append({"store": kind, "no handles": name, **_of_one(here, worker)})
    return rows


def use_up() -> None:
    """No file can be opened any more; those that are open stay."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def give_back() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1024), hard))
