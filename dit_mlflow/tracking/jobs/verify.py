"""Checks that a trajectory is whole and replays: the command ``dit-mlflow verify``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch

from dit_mlflow.errors import InputError, UntrustedError, WorkloadError
from dit_mlflow.replay import Trajectory, Verification
from dit_mlflow.tracking.store.artifacts import load_trajectory
from dit_mlflow.tracking.store.names import TRAJECTORY
from dit_mlflow.trajectory.manifest import FILE_NAME, Manifest, library_versions
from dit_mlflow.workload import Workload, load_recorded, load_workload

SEGMENTS = 20
"""Most segments that are listed; of more, those that drift most."""

Say = Callable[[str], object]


def verify_target(
    target: str, reference: str, settings: Mapping[str, str], say: Say, trust_workload: bool = False
) -> str:
    """Check a trajectory, quick checks first, the replay last.

    Args:
        target: a run's id, or a folder with a trajectory.
        reference: of the workload; empty = the record's own.
        settings: of the workload, over the recorded ones.
        say: called with a line for each check that has passed.
        trust_workload: the user consents to run the workload that the record names, whatever that is.

    Returns:
        The verdict, if nothing is wrong.

    Raises:
        DitError: what is wrong.
    """
    trajectory = open_target(target)
    manifest = trajectory.manifest
    say(f"trajectory     {target}" if Path(target).is_dir() else f"trajectory     of run {target}")
    trajectory.check_record()
    size = sum(entry.size for entry in manifest.files.values())
    stored = "" if manifest.batches is None else ", and every batch"
    say(f"files          {len(manifest.files)}, {_bytes(size)}: whole, by their SHA-256")
    steps, epochs = _counted(trajectory.num_steps, "step"), _counted(len(trajectory.epoch_ends), "epoch")
    checkpoints = _counted(len(manifest.checkpoints), "checkpoint")
    say(
        f"record         {steps} in {epochs} over {trajectory.num_samples or 0} samples, {checkpoints}{stored}: "
        "without a gap"
    )
    say(f"complete       {'yes' if trajectory.complete else 'no: recording broke off; what there is has been checked'}")
    say(f"recorded with  {_other_versions(manifest)}")
    try:
        workload = workload_of(trajectory, reference, settings, trust_workload)
    except WorkloadError as error:
        if reference or settings or trust_workload or isinstance(error, UntrustedError):
            raise
        return f"\nnot replayed: {error}\nWhat can be known without a workload holds."
    say(f"workload       {workload.reference}{'' if reference else ', by the record'}")
    found = trajectory.check_replay(workload)
    say(f"data           {'as recorded, by its digest' if manifest.dataset else 'as many samples as recorded'}")
    return "\n".join(["", *_segments(trajectory, found), "", "Everything holds."])


def open_target(target: str) -> Trajectory:
    """The trajectory of a run, or in a folder (or below it, as ``trajectory/``)."""
    folder = Path(target)
    if folder.is_dir():
        below = folder / TRAJECTORY
        return Trajectory.open(
            below if (below / FILE_NAME).is_file() and not (folder / FILE_NAME).is_file() else folder
        )
    try:
        return load_trajectory(target)
    except InputError as error:
        raise InputError(f"{target!r} is no folder here, and {error}") from error


def workload_of(
    trajectory: Trajectory, reference: str, settings: Mapping[str, str], trust_workload: bool = False
) -> Workload:
    """The workload that the user names, else the recorded one.

    Raises:
        UntrustedError: the record names it, and the user neither names it nor trusts the record.
        WorkloadError: none is known, or it cannot be built.
    """
    recorded = trajectory.manifest.workload
    if recorded is None or reference not in ("", recorded.reference):
        if not reference:
            raise WorkloadError(
                "the trajectory was recorded without a workload; name one that has its model, data and loss: "
                "--workload projects/… or package.module:factory"
            )
        return load_workload(reference, **settings)
    if reference:
        return load_workload(reference, **{**recorded.settings, **settings})
    asked = recorded.model_copy(update={"settings": {**recorded.settings, **settings}})
    return load_recorded(asked, trajectory.directory, trust_workload)


def _other_versions(manifest: Manifest) -> str:
    """Versions and thread counts that differ, so that a replay may not be bit for bit."""
    recorded = {**manifest.versions, "threads": manifest.threads}
    ours = {**library_versions(), "threads": torch.get_num_threads()}
    differ = [
        f"{name} {recorded[name]!s:.40} (here {ours[name]})"
        for name in ours
        if recorded.get(name, ours[name]) != ours[name]
    ]
    return ", ".join(differ) if differ else "the same versions and thread count as here"


def _segments(trajectory: Trajectory, found: Verification) -> list[str]:
    """A table of how far the replay of each segment missed the checkpoint at its end."""
    segments = list(pairwise(trajectory.checkpoint_steps))
    listed = segments
    if len(segments) > SEGMENTS:
        listed = sorted(sorted(segments, key=lambda ends: -found.drift[ends[1]])[:SEGMENTS])
    width = max(9, len(str(trajectory.num_steps)))
    lines = [f"{'from step':>{width}}  {'to step':>{width}}  drift"] if listed else []
    lines += [f"{a:>{width}}  {b:>{width}}  {_drift(found.drift[b])}" for a, b in listed]
    if len(listed) < len(segments):
        lines.append(f"({len(segments) - len(listed)} more segments, which drift no further)")
    last = trajectory.checkpoint_steps[-1]
    if last < trajectory.num_steps:
        lines.append(f"{last:>{width}}  {trajectory.num_steps:>{width}}  replayed; no checkpoint to compare with")
    if not segments:
        return [*lines, "", "max drift      unknown: no state after the first is stored"]
    whole = " (bit for bit)" if found.max_drift == 0 else " of the distance that training moved"
    return [*lines, "", f"max drift      {_drift(found.max_drift)}{whole}"]


def _drift(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _bytes(size: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
