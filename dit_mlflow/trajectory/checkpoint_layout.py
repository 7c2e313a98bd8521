"""Check that a stored state has the tensors of its manifest, before any of them is read."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.trajectory.manifest import Manifest, TensorLayout
from dit_mlflow.trajectory.state import COUNTERS


def check_layouts(
    found: Mapping[str, tuple[Path, TensorLayout]], scalars: Mapping[str, Mapping[str, Any]], manifest: Manifest, t: int
) -> None:
    """Check that parameters and buffers are the manifest's, and that the optimizer's state belongs to them.

    Args:
        found: file and layout by path (``parameters/<name>``, ``buffers/<name>``, ``optimizer/<key>/<name>``).
        scalars: the optimizer's plain numbers, by parameter name.
        manifest: what was announced.
        t: the state's step, for messages.

    Raises:
        TrajectoryError: naming the first tensor that is missing, too many, or laid out otherwise.
    """
    expected = {f"parameters/{name}": layout for name, layout in manifest.model.parameters.items()}
    expected |= {f"buffers/{name}": layout for name, layout in manifest.model.buffers.items()}
    for key, layout in expected.items():
        if key not in found:
            raise TrajectoryError(f"the state of step {t} has no {key!r}, which the manifest announces")
        path, given = found[key]
        if given != layout:
            raise TrajectoryError(f"{path}: {key!r} of step {t} has {_text(given)}; the manifest says {_text(layout)}")
    held = {name for group in manifest.optimizer.groups for name in group}
    for key in found.keys() - expected.keys():
        path, given = found[key]
        _check_optimizer_tensor(path, key, given, held, scalars, manifest, t)


def _check_optimizer_tensor(
    path: Path,
    key: str,
    given: TensorLayout,
    held: Set[str],
    scalars: Mapping[str, Mapping[str, Any]],
    manifest: Manifest,
    t: int,
) -> None:
    kind, _, rest = key.partition("/")
    slot, _, owner = rest.partition("/")
    if kind != "optimizer" or owner not in held:
        raise TrajectoryError(f"{path}: {key!r} of step {t} is no part of the recorded model or optimizer")
    if slot in scalars.get(owner, ()):
        raise TrajectoryError(f"{path}: {key!r} of step {t} is in the manifest as a number, too")
    if "." in manifest.optimizer.name and given.shape:
        # Not torch's: it may keep what it likes.
        return
    if slot in COUNTERS or "." in manifest.optimizer.name:
        alike, expected = given.shape == () and given.dtype in _NUMBERS, "one number"
    else:
        layout = manifest.model.parameters[owner]
        alike, expected = given == layout, f"those of the parameter, {_text(layout)}"
    if not alike:
        raise TrajectoryError(f"{path}: {key!r} of step {t} has {_text(given)}; expected {expected}")


def _text(layout: TensorLayout) -> str:
    return f"shape {list(layout.shape)} and dtype {layout.dtype}"


_NUMBERS = {"float64", "float32", "float16", "bfloat16", "int64", "int32"}
