"""Read a trajectory with json and safetensors alone, as docs/format.md says; write steps, to tamper with them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Row = dict[str, Any]
"""A step: ``step``, ``epoch``, ``loss``; by micro-batch ``indices``, ``coefficients`` (or ``None`` for all) and
``random_states`` (bytes by generator, or ``None``); and what is JSON, as bytes."""

NAME_SETS = ("evaluation_mode", "no_gradient", "zero_gradient")
GENERATORS = ("torch", "cuda", "python", "numpy")


def read_steps(folder: Path) -> list[Row]:
    """All steps of a trajectory."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return [
        row
        for part in manifest["steps"]
        for row in read_rows(load_file(folder / part["file"]))[: part["stop"] - part["start"]]
    ]


def read_rows(tensors: dict[str, np.ndarray]) -> list[Row]:
    """All steps of a file."""
    arrays = {name: tensor.tolist() for name, tensor in tensors.items()}
    content = tensors["dictionary"].tobytes()
    entries = [content[a:b] for a, b in pairwise(arrays["dictionary_offsets"])]
    batches = [arrays["indices"][a:b] for a, b in pairwise(arrays["micro_batch_offsets"])]
    states: list[Any] = [None] * len(batches)
    for number, place in enumerate(arrays["random_micro_batch"]):
        states[place] = {name: entries[at] for name in GENERATORS if (at := arrays[f"random_{name}"][number]) != -1}
    coefficients = iter(arrays["coefficients"])
    rows = []
    for i, (a, b) in enumerate(pairwise(arrays["step_offsets"])):
        factors = None
        if arrays["has_coefficients"][i]:
            factors = [[next(coefficients) for _ in batch] for batch in batches[a:b]]
        rows.append(
            {
                "step": arrays["step"][i],
                "epoch": arrays["epoch"][i],
                "loss": arrays["loss"][i] if arrays["has_loss"][i] else None,
                "indices": batches[a:b],
                "coefficients": factors,
                "random_states": states[a:b],
                **{name: entries[arrays[name][i]] for name in ("hyperparameters", *NAME_SETS)},
            }
        )
    return rows


def write_rows(rows: list[Row], path: Path) -> None:
    """The inverse of :func:`read_rows`, for rows that need not make sense."""
    entries: list[bytes] = []

    def entry(content: bytes) -> int:
        entries.append(content)
        return len(entries) - 1

    batches = [batch for row in rows for batch in row["indices"]]
    states = [state for row in rows for state in row["random_states"]]
    lists: dict[str, list[Any]] = {
        "step": [row["step"] for row in rows],
        "epoch": [row["epoch"] for row in rows],
        "step_offsets": [0, *np.cumsum([len(row["indices"]) for row in rows])],
        "micro_batch_offsets": [0, *np.cumsum([len(batch) for batch in batches])],
        "indices": [index for batch in batches for index in batch],
        "random_micro_batch": [m for m, state in enumerate(states) if state is not None],
        **{name: [entry(row[name]) for row in rows] for name in ("hyperparameters", *NAME_SETS)},
        **{
            f"random_{name}": [entry(state[name]) if name in state else -1 for state in states if state is not None]
            for name in GENERATORS
        },
    }
    factors = [f for row in rows for part in row["coefficients"] or () for f in part]
    save_file(
        {
            **{name: np.array(values, np.int64) for name, values in lists.items()},
            "has_loss": np.array([row["loss"] is not None for row in rows], np.uint8),
            "loss": np.array([row["loss"] or 0 for row in rows], np.float64),
            "has_coefficients": np.array([row["coefficients"] is not None for row in rows], np.uint8),
            "coefficients": np.array(factors, np.float64),
            "dictionary_offsets": np.array([0, *np.cumsum([len(content) for content in entries])], np.int64),
            "dictionary": np.frombuffer(b"".join(entries), np.uint8),
        },
        path,
    )


def torch_state(stored: bytes) -> bytes:
    """``torch.get_rng_state()`` from a dictionary entry."""
    size, *halves = np.frombuffer(stored, "<u4").tolist()
    words, rest = halves[:size], halves[size:]
    for at, upper in zip(rest[: len(rest) // 2], rest[len(rest) // 2 :], strict=True):
        words[at] += upper << 32
    return np.array(words, "<u8").tobytes()


def python_state(stored: bytes) -> tuple[Any, ...]:
    """``random.getstate()`` from a dictionary entry."""
    (gauss,) = np.frombuffer(stored[2500:], "<f8").tolist()
    return 3, tuple(np.frombuffer(stored[:2500], "<u4").tolist()), None if gauss != gauss else gauss


def numpy_state(stored: bytes) -> tuple[Any, ...]:
    """``np.random.get_state()`` from a dictionary entry, its key as bytes."""
    (gauss,) = np.frombuffer(stored[2504:], "<f8").tolist()
    return ("MT19937", stored[:2496], *np.frombuffer(stored[2496:2504], "<u4").tolist(), gauss)


def tensors_of_state(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The tensors of a stored state, by path."""
    checkpoints = {entry["step"]: entry for entry in json.loads((folder / "manifest.json").read_text())["checkpoints"]}

    def stored(at: int) -> dict[str, np.ndarray]:
        tensors = [item for name in checkpoints[at]["files"] for item in load_file(folder / name).items()]
        return {key.partition("/")[2]: value for key, value in tensors if key.startswith(f"{at}/")}

    found = stored(step)
    for home, paths in checkpoints[step]["unchanged"].items():
        found |= {path: stored(int(home))[path] for path in paths}
    return found


def tensors_of_batch(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The stored tensors of a step's batches, by ``micro-batch/place``."""
    parts = json.loads((folder / "manifest.json").read_text())["batches"]
    (name,) = [part["file"] for part in parts if part["start"] <= step < part["stop"]]
    return {key.partition("/")[2]: t for key, t in load_file(folder / name).items() if key.startswith(f"{step}/")}
