"""State ``s_t = (theta_t, o_t, b_t)``: parameters, optimizer state, buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})
"""Optimizer state that depends on hyperparameters and step count alone, one number per parameter: it carries no
influence, keeps its dtype, and is the same for copies of a model side by side."""


@dataclass(frozen=True, eq=False)
class State:
    """One point of a training trajectory.

    Attributes:
        parameters: every parameter of the model by name, whether or not the optimizer holds it.
        buffers: every buffer by name, persistent or not.
        optimizer: tensors and numbers by key, by parameter name; empty for a parameter that was never stepped.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor], counters: bool = True) -> State:
        """Apply ``function`` to every tensor, or to all but the :data:`COUNTERS`."""
        return State(
            {name: function(value) for name, value in self.parameters.items()},
            {name: function(value) for name, value in self.buffers.items()},
            {
                name: {
                    key: function(value) if isinstance(value, Tensor) and (counters or key not in COUNTERS) else value
                    for key, value in entry.items()
                }
                for name, entry in self.optimizer.items()
            },
        )

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> State:
        """Move to ``device``, floating tensors to ``dtype``, except :data:`COUNTERS`."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return self.map(move, counters=False)

    def side_by_side(self, copies: int) -> State:
        """Views of the state with a leading dimension ``copies``; :data:`COUNTERS` are one for all."""
        return self.map(lambda value: value.expand(copies, *value.shape), counters=False)

    def copy(self, over: State | None = None) -> State:
        """The same values in tensors of its own.

        Args:
            over: a state of the same training that is no longer needed; its tensors are overwritten and reused, except
                those that it shares with this state, which stay.
        """

        def copied(value: Any, spare: Any) -> Any:
            if value is spare or not isinstance(value, Tensor):
                return value
            return spare.copy_(value) if isinstance(spare, Tensor) else value.clone()

        spare = over or State({})
        with torch.no_grad():
            return State(
                {name: copied(value, spare.parameters.get(name)) for name, value in self.parameters.items()},
                {name: copied(value, spare.buffers.get(name)) for name, value in self.buffers.items()},
                {
                    name: {key: copied(value, spare.optimizer.get(name, {}).get(key)) for key, value in entry.items()}
                    for name, entry in self.optimizer.items()
                },
            )

    def without_optimizer_values(self) -> State:
        """The same tensors, with ``None`` for every value of the optimizer's state."""
        optimizer: dict[str, dict[str, Any]] = {name: dict.fromkeys(entry) for name, entry in self.optimizer.items()}
        return State(self.parameters, self.buffers, optimizer)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        entries = [value for entry in self.optimizer.values() for value in entry.values() if isinstance(value, Tensor)]
        return sum(value.nbytes for value in (*self.parameters.values(), *self.buffers.values(), *entries))

    def load_into(self, model: nn.Module) -> nn.Module:
        """Copy parameters and buffers into ``model`` (of the same layout) and return it."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.parameters[name])
            for name, buffer in model.named_buffers():
                buffer.copy_(self.buffers[name])
        return model


def drifts(replayed: State, recorded: State, origin: State) -> dict[str, float]:
    """How far a replay missed each tensor of a recorded state, relative to how far training moved it.

    ``max |replayed - recorded| / max |recorded - origin|`` of every parameter and buffer; 0 means bit for bit,
    1 that the replay is as wrong as standing still. Each tensor has its own scale, since learning rates differ
    and running statistics can move a thousand times as far as weights. To tolerate rounding, the denominator is at
    least :data:`LEAST_WAY` times the longest way of any parameter (for gradients that are 0 but for rounding), and at
    least the size at which 8 units in the last place reach :data:`REPLAY_TOLERANCE`. NaN equals NaN.
    """
    ways = {name: _distance(value, origin.parameters[name]) for name, value in recorded.parameters.items()}
    longest = max((way for name, way in ways.items() if _floats(recorded.parameters[name])), default=0.0)
    found: dict[str, float] = {}
    for part in ("parameters", "buffers"):
        for name, value in getattr(recorded, part).items():
            missed = _distance(getattr(replayed, part)[name], value)
            way = ways[name] if part == "parameters" else _distance(value, getattr(origin, part)[name])
            if missed and _floats(value):
                rounding = 8 * _largest(value) * torch.finfo(value.dtype).eps / REPLAY_TOLERANCE
                way = max(way, rounding, LEAST_WAY * longest if part == "parameters" else 0.0)
            found[name] = _ratio(missed, way)
    return found


def other_optimizer_state(replayed: State, recorded: State) -> str | None:
    """What differs between the optimizers' states; ``None`` if nothing does, or the replay did not keep them.

    Differences count from :data:`REPLAY_TOLERANCE` times the largest value under the same key of any parameter:
    gradients that are 0 but for rounding (a bias before a softmax) differ between machines.
    """
    found, expected = ({n: entry for n, entry in s.optimizer.items() if entry} for s in (replayed, recorded))
    scales: dict[str, float] = {}
    for entry in expected.values():
        for key, value in entry.items():
            scales[key] = max(scales.get(key, 0.0), _largest(torch.as_tensor(value)))
    for name in expected.keys() | found.keys():
        ours, theirs = found.get(name, {}), expected.get(name, {})
        if ours.keys() != theirs.keys():
            return f"that of {name!r} has {sorted(theirs)}, the replay {sorted(ours)}"
        for key, value in theirs.items():
            if ours[key] is None:
                continue
            missed = _distance(torch.as_tensor(ours[key]), torch.as_tensor(value))
            if _ratio(missed, scales[key]) > (0 if key in COUNTERS else REPLAY_TOLERANCE):
                return f"{key!r} of {name!r}"
    return None


REPLAY_TOLERANCE = 1e-3
"""Largest of :func:`drifts` that a replay may have. Another order of summation gives about 1e-6 in
float32; a wrong loss, coefficient or batch gives 1e-2 to 1."""


LEAST_WAY = 1e-3
"""Share of the longest way of any parameter that is the least scale of another's drift."""


def _floats(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest difference of any element; infinite if shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    if torch.equal(one, other):
        return 0.0
    if not _floats(one):
        one, other = one.double(), other.double()
    return _largest((one - other).masked_fill((one == other) | (one.isnan() & other.isnan()), 0))


def _ratio(miss: float, allowed: float) -> float:
    if miss == 0.0:
        return 0.0
    return miss / allowed if 0.0 < allowed < float("inf") else float("inf")


def _largest(value: Tensor) -> float:
    if value.numel() == 0:
        return 0.0
    largest = (value if _floats(value) else value.double()).abs().max().item()
    return float("inf") if largest != largest else largest
