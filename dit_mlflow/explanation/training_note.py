"""The note of a training run: what was trained, and how influence is computed from there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from dit_mlflow.command import command
from dit_mlflow.explanation.markdown import escaped
from dit_mlflow.replay import Trajectory
from dit_mlflow.told import text_of
from dit_mlflow.workload import comes_with_package

MENTIONED = 8
"""Most settings of the workload that are named."""

UNNAMED = "package.module:function"
"""In the place of a workload where the trajectory names none that can be typed."""


def training_note(run_id: str, trajectory: Trajectory) -> str:
    """Markdown for the run that recorded ``trajectory``."""
    workload = trajectory.manifest.workload
    reference = "" if workload is None else workload.reference
    settings = {} if workload is None else workload.settings
    parts = [
        f"{_trained(trajectory, reference, settings)} {_recorded(trajectory)}",
        "**Which training samples mattered, and when?**",
        f"```\n{command('influence', training_run=run_id, **naming(reference))}\n```",
        "In Python:",
        "\n".join(["```", *_python(run_id, reference), "```"]),
    ]
    return "\n\n".join(parts)


def naming(reference: str) -> dict[str, str]:
    """The option that names the workload, which a record may not do for code from elsewhere."""
    if comes_with_package(reference):
        return {}
    return {"workload": _typed(reference)}


def _typed(reference: str) -> str:
    """The reference, if it can be typed: anything else would end a code block, fill a note, or be no word."""
    return reference if re.fullmatch(r"[\w./:~ -]{1,200}", reference) else UNNAMED


def _trained(trajectory: Trajectory, reference: str, settings: Mapping[str, Any]) -> str:
    manifest = trajectory.manifest
    parameters = sum(math.prod(layout.shape) for layout in manifest.model.parameters.values())
    what = escaped(reference) or escaped(manifest.model.name)
    named = ", ".join(f"{name}={text_of(value)}" for name, value in list(settings.items())[:MENTIONED])
    epochs, steps = len(manifest.epoch_ends), trajectory.num_steps
    data = f" on {manifest.num_samples} samples" if manifest.num_samples is not None else ""
    return (
        f"Trained {what}{f' ({escaped(named)})' if named else ''}: {parameters:,} parameters, {steps} "
        f"step{'s' * (steps != 1)} of {escaped(manifest.optimizer.name)} in {epochs} epoch{'s' * (epochs != 1)}{data}."
    )


def _recorded(trajectory: Trajectory) -> str:
    files = trajectory.manifest.files
    size = sum(entry.size for entry in files.values())
    unit, divisor = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6) if size >= 1e5 else ("kB", 1e3)
    state = "" if trajectory.complete else " **Training was interrupted; the steps before can be used.**"
    return (
        f"Any state of it can be rebuilt from the artifact `trajectory/`: {len(trajectory.manifest.checkpoints)} "
        f"checkpoints and the record of every step, {size / divisor:.1f} {unit} in {len(files)} files.{state}"
    )


def _python(run_id: str, reference: str) -> list[str]:
    lines = [
        "from dit_mlflow import load_workload, parse_windows, track",
        "from dit_mlflow.tracking import load_trajectory",
        f'trajectory = load_trajectory("{run_id}")',
        f"workload = load_workload({json.dumps(_typed(reference))}, **trajectory.manifest.workload.settings)",
        'track(trajectory, workload, parse_windows("5", trajectory)).top(10)',
    ]
    if not reference:
        lines[0] = lines[0].replace("load_workload", "Workload")
        lines[3] = "workload = Workload(model, loss, train_set, validation_set)  # and what else the loop did"
    return lines
