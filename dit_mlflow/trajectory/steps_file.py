"""Write and read ``steps-NNNNN.safetensors``: steps as flat arrays with offsets, laid out as docs/format.md says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.trajectory.manifest import DTYPES as STATE_DTYPES
from dit_mlflow.trajectory.manifest import Manifest, StepsFile
from dit_mlflow.trajectory.step_record import Hyperparameters, StepFields, StepRecord
from dit_mlflow.trajectory.tensor_file import TensorFile
from dit_mlflow.trajectory.untrusted import parse_json
from dit_mlflow.workload.random_state import RandomState

Value = TypeVar("Value")

_NAME_SETS = ("evaluation_mode", "no_gradient", "zero_gradient")
_GENERATORS = {f"random_{name}": name for name in RandomState._fields}
_PER_STEP = ("step", "epoch", "has_loss", "loss", "has_coefficients", "hyperparameters", *_NAME_SETS)
DTYPES = {
    **dict.fromkeys(_PER_STEP, "int64"),
    "has_loss": "uint8",
    "loss": "float64",
    "has_coefficients": "uint8",
    "step_offsets": "int64",
    "micro_batch_offsets": "int64",
    "indices": "int64",
    "coefficients": "float64",
    "random_micro_batch": "int64",
    **dict.fromkeys(_GENERATORS, "int64"),
    "dictionary_offsets": "int64",
    "dictionary": "uint8",
}
"""The tensors of a file. All have one dimension."""

LONGEST_TEXT = 1000
"""Characters of a hyperparameter that is a string."""


def steps_tensors(steps: Sequence[StepFields]) -> dict[str, Tensor]:
    """The tensors of a file of these steps."""
    dictionary: dict[bytes, int] = {}

    def number(content: bytes) -> int:
        return dictionary.setdefault(content, len(dictionary))

    batches = [part for step in steps for part in step["indices"]]
    weights = [part for step in steps for part in step["coefficients"] or ()]
    weighted = [part for step in steps if step["coefficients"] is not None for part in step["indices"]]
    if list(map(len, weights)) != list(map(len, weighted)):
        raise ValueError("a micro-batch has not as many coefficients as sample indices")
    states = [state for step in steps for _, state in zip(step["indices"], step["random_states"], strict=True)]
    drawn = {position: state.encode() for position, state in enumerate(states) if state is not None}
    # The recorder hands out the same object for as long as no setting changes.
    settings = {id(step["hyperparameters"]): step["hyperparameters"] for step in steps}
    settings_numbers = {key: number(_json(value)) for key, value in settings.items()}
    name_sets = {tuple(step[name]) for step in steps for name in _NAME_SETS}  # type: ignore[literal-required]
    names_numbers = {names: number(_json(names)) for names in sorted(name_sets)}
    content: dict[str, Any] = {
        "step": [step["index"] for step in steps],
        "epoch": [step["epoch"] for step in steps],
        "has_loss": [step["loss"] is not None for step in steps],
        "loss": [0.0 if step["loss"] is None else step["loss"] for step in steps],
        "has_coefficients": [step["coefficients"] is not None for step in steps],
        "hyperparameters": [settings_numbers[id(step["hyperparameters"])] for step in steps],
        "step_offsets": _offsets(len(step["indices"]) for step in steps),
        "micro_batch_offsets": _offsets(map(len, batches)),
        "indices": np.concatenate(batches),
        "coefficients": np.concatenate([[], *weights]),
        "random_micro_batch": list(drawn),
    }
    for name in _NAME_SETS:
        content[name] = [names_numbers[tuple(step[name])] for step in steps]  # type: ignore[literal-required]
    for name, generator in _GENERATORS.items():
        content[name] = [-1 if (part := state[generator]) is None else number(part) for state in drawn.values()]
    content["dictionary_offsets"] = _offsets(map(len, dictionary))
    content["dictionary"] = np.frombuffer(bytearray(b"".join(dictionary)), np.uint8)
    return {name: torch.from_numpy(np.asarray(content[name], dtype)) for name, dtype in DTYPES.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _offsets(lengths: Iterable[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def read_steps(path: Path, part: StepsFile, manifest: Manifest) -> list[StepRecord]:
    """The steps ``part.start … part.stop - 1``, the first ones of the file; later ones are ignored.

    Args:
        path: of the file.
        part: the steps that belong to the trajectory.
        manifest: that sample indices, parameter names, parameter groups and their settings must agree with.

    Raises:
        TrajectoryError: it is not a record of these steps.

    Cost: about 5 microseconds a step, and 20 to 80 for each random state. Memory: a small multiple of the file's size.
    """
    file = TensorFile(path)
    try:
        arrays = _arrays(file)
        if len(arrays["step"]) < part.stop - part.start:
            raise ValueError(f"it has {len(arrays['step'])} steps; expected {part.stop - part.start} or more")
        return _Reader(arrays, range(part.start, part.stop), manifest).steps()
    except (TrajectoryError, ValueError) as error:
        raise TrajectoryError(f"{path} is not a usable record of steps: {error}") from error


def _arrays(file: TensorFile) -> dict[str, np.ndarray]:
    """All tensors of a file, after a check of their dtypes, lengths and offsets."""
    lacking, unknown = sorted(DTYPES.keys() - {*file.names}), sorted({*file.names} - DTYPES.keys())
    if lacking or unknown:
        raise ValueError(f"it lacks the tensors {lacking}, or has others, {unknown[:9]}")
    for name, dtype in DTYPES.items():
        layout = file.layout(name)
        if layout.dtype != dtype or len(layout.shape) != 1:
            raise ValueError(f"{name} has shape {list(layout.shape)} and dtype {layout.dtype}; expected [n], {dtype}")
    arrays = {name: file.tensor(name).numpy() for name in DTYPES}
    steps, draws = len(arrays["step"]), len(arrays["random_micro_batch"])
    for name, length in (*((name, steps) for name in _PER_STEP), *((name, draws) for name in _GENERATORS)):
        if len(arrays[name]) != length:
            raise ValueError(f"{name} has {len(arrays[name])} elements; expected {length}")
    micro_batches = len(arrays["micro_batch_offsets"]) - 1
    _check_offsets("step_offsets", arrays, steps, micro_batches)
    _check_offsets("micro_batch_offsets", arrays, micro_batches, len(arrays["indices"]))
    _check_offsets("dictionary_offsets", arrays, len(arrays["dictionary_offsets"]) - 1, len(arrays["dictionary"]))
    for name in ("has_loss", "has_coefficients"):
        if (arrays[name] > 1).any():
            raise ValueError(f"{name} is neither 0 nor 1")
    samples = np.diff(arrays["micro_batch_offsets"][arrays["step_offsets"]])
    if samples[arrays["has_coefficients"] == 1].sum() != len(arrays["coefficients"]):
        raise ValueError("as many coefficients as sample indices are expected, in the steps that have them")
    places = arrays["random_micro_batch"]
    if (places[1:] <= places[:-1]).any() or (places < 0).any() or (places >= micro_batches).any():
        raise ValueError(f"random_micro_batch does not increase within 0 … {micro_batches - 1}")
    return arrays


def _check_offsets(name: str, arrays: dict[str, np.ndarray], parts: int, total: int) -> None:
    offsets = arrays[name]
    ends = len(offsets) == parts + 1 > 0 and offsets[0] == 0 and offsets[-1] == total
    # Compared, not subtracted: their difference may exceed 64 bits.
    if not ends or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{name} does not lead from 0 to {total} in {parts} parts")


class _Reader:
    """Reads the first steps of a file, which have ``numbers``, array by array."""

    def __init__(self, arrays: dict[str, np.ndarray], numbers: range, manifest: Manifest) -> None:
        self._arrays = arrays
        self._numbers = numbers
        self._manifest = manifest
        self._step_offsets = arrays["step_offsets"][: len(numbers) + 1]
        self._micro_batches = int(self._step_offsets[-1])
        self._micro_batch_offsets = arrays["micro_batch_offsets"][: self._micro_batches + 1]
        self._parameters = frozenset(manifest.model.parameters)

    def steps(self) -> list[StepRecord]:
        numbers = self._numbers
        if not np.array_equal(self._column("step"), np.arange(numbers.start, numbers.stop)):
            raise ValueError(f"its steps are not numbered {numbers.start} … {numbers.stop - 1}")
        epochs = self._column("epoch")
        self._need(epochs.min() >= 0, "an epoch is negative")
        losses = zip(self._column("loss").tolist(), self._column("has_loss").tolist(), strict=True)
        absent = self._name_sets("no_gradient", known=self._parameters)
        zero = self._name_sets("zero_gradient", known=self._parameters)
        pairs = set(zip(absent, zero, strict=True))
        self._need(all(a.isdisjoint(b) for a, b in pairs), "a gradient is None and 0 at once")
        columns = (
            numbers,
            epochs.tolist(),
            self._indices(),
            self._coefficients(),
            self._decoded("hyperparameters", self._column("hyperparameters"), self._groups),
            [loss if given else None for loss, given in losses],
            self._random_states(),
            self._name_sets("evaluation_mode"),
            absent,
            zero,
        )
        return [StepRecord(*row) for row in zip(*columns, strict=True)]

    def _need(self, condition: bool | np.bool_, problem: str) -> None:
        if not condition:
            raise ValueError(f"in steps {self._numbers.start} … {self._numbers.stop - 1}, {problem}")

    def _column(self, name: str) -> np.ndarray:
        return self._arrays[name][: len(self._numbers)]

    def _by_step(self, of_micro_batches: list[Value]) -> list[tuple[Value, ...]]:
        return [tuple(of_micro_batches[a:b]) for a, b in pairwise(self._step_offsets.tolist())]

    def _indices(self) -> list[tuple[np.ndarray, ...]]:
        offsets = self._micro_batch_offsets
        self._need(bool((self._step_offsets[1:] > self._step_offsets[:-1]).all()), "a step has no batches")
        self._need(bool((offsets[1:] > offsets[:-1]).all()), "a batch has no samples")
        samples = self._arrays["indices"][: offsets[-1]]
        known = self._manifest.num_samples or 0
        outside = samples[(samples < 0) | (samples >= known)]
        self._need(not len(outside), f"there is sample {outside[:1]}; the manifest has 0 … {known - 1}")
        return self._by_step(_split(samples, offsets))

    def _coefficients(self) -> list[tuple[np.ndarray, ...] | None]:
        given = self._column("has_coefficients")
        sizes = np.diff(self._micro_batch_offsets) * np.repeat(given, np.diff(self._step_offsets))
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        factors = self._arrays["coefficients"][: offsets[-1]]
        self._need(bool(np.isfinite(factors).all()), "a coefficient is not finite")
        parts = zip(self._by_step(_split(factors, offsets)), given.tolist(), strict=True)
        return [part if is_given else None for part, is_given in parts]

    def _random_states(self) -> list[tuple[RandomState | None, ...]]:
        places = self._arrays["random_micro_batch"]
        places = places[places < self._micro_batches]
        fields = [
            self._decoded(name, self._arrays[name][: len(places)], partial(RandomState.decode, field), least=-1)
            for name, field in _GENERATORS.items()
        ]
        found: list[RandomState | None] = [None] * self._micro_batches
        for place, *values in zip(places.tolist(), *fields, strict=True):
            self._need(any(value is not None for value in values), "a random state is that of no generator")
            found[place] = RandomState(*values)
        return self._by_step(found)

    def _name_sets(self, name: str, known: frozenset[str] | None = None) -> list[frozenset[str]]:
        """Sets of names by step; only those in ``known``, if that is given."""

        def decode(content: bytes) -> frozenset[str]:
            names = self._json(name, content)
            if not isinstance(names, list) or not all(isinstance(word, str) for word in names):
                raise ValueError(f"{name} is not a list of names")
            if known is not None and (other := sorted({*names} - known)):
                raise ValueError(f"{name} names {other[0]!r}, which is no parameter of the model")
            return frozenset(names)

        return self._decoded(name, self._column(name), decode)

    def _groups(self, content: bytes) -> tuple[Hyperparameters, ...]:
        """One object per parameter group, with every setting of the optimizer; values are numbers or lists of them."""
        groups = self._json("hyperparameters", content)
        layout = self._manifest.optimizer
        self._need(
            isinstance(groups, list) and len(groups) == len(layout.groups) and all(isinstance(g, dict) for g in groups),
            f"hyperparameters are not those of {len(layout.groups)} parameter groups",
        )
        for group in groups:
            lacking = [name for name in layout.defaults if name not in group]
            self._need(not lacking and "params" not in group, f"hyperparameters lack {lacking}, or hold 'params'")
            for name, value in group.items():
                default = layout.defaults.get(name)
                alike = any(kind(value) and (default is None or kind(default)) for kind in (_is_scalar, _is_text))
                alike |= _is_vector(value) and (default is None or (_is_vector(default) and len(value) == len(default)))
                alike |= _is_kept(value) and name not in layout.defaults
                self._need(alike, f"hyperparameter {name!r} is not of the kind of its default {default!r}")
        return tuple(
            # JSON has no tuples; optimizers expect them (betas).
            {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}
            for group in groups
        )

    def _json(self, name: str, content: bytes) -> Any:
        try:
            return parse_json(content)
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error

    def _decoded(self, name: str, numbers: np.ndarray, decode: Callable[[bytes], Value], least: int = 0) -> list[Value]:
        """``decode`` of the dictionary's entries, called once for each distinct one; ``None`` for -1."""
        bounds = self._arrays["dictionary_offsets"]
        known = len(bounds) - 1
        outside = numbers[(numbers < least) | (numbers >= known)]
        self._need(not len(outside), f"{name} refers to entry {outside[:1]} of the dictionary, which has {known}")
        distinct: dict[int, Any] = {-1: None}
        for number in np.unique(numbers).tolist():
            if number >= 0:
                distinct[number] = decode(self._arrays["dictionary"][bounds[number] : bounds[number + 1]].tobytes())
        return [distinct[number] for number in numbers.tolist()]


def _split(flat: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    return [flat[a:b] for a, b in pairwise(offsets.tolist())]


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < LONGEST_TEXT


def _is_vector(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_scalar(part) or _is_text(part) for part in value)


def _is_kept(value: Any) -> bool:
    """Whether it stands for a tensor of one number, see :func:`dit_mlflow.replay.optimizers.hyperparameters`."""
    known = isinstance(value, dict) and value.keys() == {"tensor", "dtype"}
    return known and _is_scalar(value["tensor"]) and value["tensor"] is not None and value["dtype"] in STATE_DTYPES
