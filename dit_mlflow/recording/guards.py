"""Refuse training that cannot be recorded truthfully, by name and as early as possible."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from operator import is_
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from dit_mlflow.errors import TrajectoryError, UnsupportedError
from dit_mlflow.replay.optimizers import every, groups_of, hyperparameters
from dit_mlflow.told import logger_of
from dit_mlflow.torch_internals import forward_pre_hooks, has_gradient_hook, tensor_slots, version
from dit_mlflow.trajectory.step_record import Hyperparameters
from dit_mlflow.workload.modes import check_modes
from dit_mlflow.workload.workload import Optimizers

_log = logger_of(__name__)

_INSIST = (
    "or insist with TrajectoryRecorder(..., low_precision=True); its documentation says what the scores are then worth"
)


def check_model(model: nn.Module, low_precision: bool, hooked: set[str]) -> None:
    """Refuse models that cannot be recorded, before training starts.

    Args:
        hooked: see :func:`check_parameters`.

    Raises:
        UnsupportedError: several processes train the model; its parameters are in low precision or have no shape; or
            a module cannot be copied or differentiated, or changes weights with the mode.
        TrajectoryError: ``model`` is a running average.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise UnsupportedError(
                f"training runs in {processes} processes (torch.distributed): this one gets only a part of each batch, "
                "so the samples of a step are not known; record training in one process"
            )
    sharded = {"FullyShardedDataParallel", "FSDPModule"}
    if any(cls.__name__ in sharded for module in model.modules() for cls in type(module).__mro__):
        raise UnsupportedError(
            f"{type(model).__name__} is sharded (FSDP): its parameters are not whole tensors; record training of the "
            "plain model in one process"
        )
    if isinstance(model, AveragedModel):
        raise TrajectoryError(
            "the model is an AveragedModel, which no optimizer steps: record the trained model, the one whose "
            "parameters the optimizer holds; recording it does not disturb the averaging"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UnsupportedError(
                f"parameter {name!r} has no shape yet (a Lazy module): build the model with its sizes, or run a batch "
                "through it when it is built; build the optimizer after that"
            )
    for name, module in model.named_modules():
        if any(isinstance(hook, WeightNorm) for hook in forward_pre_hooks(module)):
            raise UnsupportedError(
                f"{name or 'the model'} is normalised by torch.nn.utils.weight_norm, whose modules cannot be copied; "
                "use torch.nn.utils.parametrizations.weight_norm"
            )
        if any(isinstance(hook, BasePruningMethod) for hook in forward_pre_hooks(module)):
            raise UnsupportedError(
                f"{name or 'the model'} is pruned by torch.nn.utils.prune, whose modules cannot be copied; make it "
                "permanent (prune.remove) and keep the mask by torch.nn.utils.parametrize"
            )
        if getattr(module, "scale_grad_by_freq", False):
            raise UnsupportedError(
                f"{name or 'the model'} is an {type(module).__name__}(scale_grad_by_freq=True), whose gradient is not "
                "that of the loss; train without it"
            )
    check_modes(model)
    check_parameters(dict(model.named_parameters()), hooked)
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise UnsupportedError(
                f"parameter {name!r} is complex ({_plain(parameter.dtype)}), which is not supported; keep its real and "
                "imaginary parts as two real parameters (torch.view_as_complex in forward)"
            )
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and not low_precision:
            raise UnsupportedError(
                f"parameter {name!r} is in {_plain(parameter.dtype)}: second derivatives, which influence needs, are "
                f"noise in low precision. Train in float32, {_INSIST}"
            )


def check_parameters(parameters: Mapping[str, Tensor], hooked: set[str]) -> None:
    """Refuse trained parameters that share memory, and warn of those whose gradients are changed; both may come late.

    Args:
        parameters: the model's, by name.
        hooked: the names that were warned of; the others are added.

    Raises:
        UnsupportedError: two parameters have the same memory, and one of them is trained.
    """
    places: dict[int, str] = {}
    new: list[str] = []
    for name, parameter in parameters.items():
        other = places.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
        if other != name and (parameter.requires_grad or parameters[other].requires_grad):
            raise UnsupportedError(
                f"parameters {other!r} and {name!r} share memory (tied through .data, or by a new Parameter): the "
                "optimizer steps it twice, which a copy of the model does not do. Tie them by one Parameter: "
                "output.weight = embedding.weight"
            )
        if name not in hooked and has_gradient_hook(parameter):
            new.append(name)
    if new:
        hooked.update(new)
        _log.warning(
            "parameter %r%s has a gradient hook, which a replay does not run: if it changes gradients (a mask), the "
            "replay differs from the record. Put masks into the model (torch.nn.utils.parametrize)",
            *(new[0], f" (and {len(new) - 1} more)" if new[1:] else ""),
        )


class AutocastCheck:
    """A forward pre-hook that refuses ``torch.autocast`` in training.

    It has no other attribute than a device type, since copies of the model copy it too.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __call__(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled() and torch.is_autocast_enabled(self._device_type):
            dtype = _plain(torch.get_autocast_dtype(self._device_type))
            raise UnsupportedError(
                f"the model is trained under torch.autocast ({dtype}): second derivatives, which influence needs, are "
                f"noise in low precision. Train without autocast, {_INSIST}"
            )


def check_scaler() -> None:
    """Refuse an optimizer step made by a ``GradScaler``; call it in a hook of the step.

    Raises:
        UnsupportedError: an enabled ``GradScaler`` is among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None and (frame := frame.f_back) is not None:
        # One that is disabled only calls optimizer.step().
        if frame.f_code is torch.amp.GradScaler.step.__code__ and frame.f_locals["self"].is_enabled():
            raise UnsupportedError(
                "the optimizer is stepped by a GradScaler, which skips steps and belongs to training in low precision, "
                f"where second derivatives are noise. Train in float32 without it, {_INSIST}"
            )


class Groups:
    """An optimizer's param groups; in training, their settings may change, their parameters may not.

    Nor may its state be another than its own steps made (``load_state_dict``, ``state.clear()``); the same, saved and
    loaded back, is none.
    """

    def __init__(self, optimizer: Optimizers) -> None:
        self._optimizer = optimizer
        # Kept, so that no other tensor gets the id of one of them.
        self._params = [[*group["params"]] for group in groups_of(optimizer)]
        self._ids = [tuple(map(id, params)) for params in self._params]
        self._seen: list[dict[str, Any]] = []
        self._settings: tuple[Hyperparameters, ...] = ()
        self._may_change_in_place = False
        self.note_state()

    def note_state(self) -> None:
        """Remember where the optimizer's state is now."""
        self._states = [(one.state, len(one.state)) for one in every(self._optimizer)]

    def settings(self) -> tuple[Hyperparameters, ...]:
        """The hyperparameters of each group; the same object while they do not change.

        Raises:
            UnsupportedError: groups have been added, or parameters exchanged or added to a group.
            TrajectoryError: the state is another one than :meth:`note_state` saw.
        """
        for one, (state, size) in zip(every(self._optimizer), self._states, strict=True):
            replaced = one.state is not state and (size or one.state) and not _same_state(state, one.state)
            if replaced or len(one.state) < size:
                raise TrajectoryError(
                    f"the state of {type(one).__name__} was replaced or cleared since its last step, or since the "
                    "recorder was entered (load_state_dict, state.clear()), which a replay does not do; do it before "
                    "the with block, and begin a new recorder after it"
                )
        groups = [{**group, "params": tuple(map(id, group["params"]))} for group in groups_of(self._optimizer)]
        if groups == self._seen and not self._may_change_in_place:
            return self._settings
        if [group["params"] for group in groups] != self._ids:
            raise UnsupportedError(
                "the optimizer's parameter groups changed during recording (add_param_group, or other parameters put "
                "in); begin a new recorder after the change"
            )
        self._seen, self._settings = groups, hyperparameters(self._optimizer)
        values = [value for group in groups for value in group.values()]
        self._may_change_in_place = any(isinstance(value, (Tensor, list)) for value in values)
        return self._settings


def _same_state(noted: Mapping[Any, Any], current: Mapping[Any, Any]) -> bool:
    return noted.keys() == current.keys() and all(equal(entry, current[key]) for key, entry in noted.items())


class Structure:
    """The modules, parameters and buffers of a model, by place: in training, their values change and they stay.

    Buffers may be assigned anew (``self.mean = …``), and so may tensors that stand in for parameters. Of modules, one
    that holds no tensors may be replaced by its like, and others may be attached (a loss, a metric, a running average
    of the model): they are no part of what is recorded, and only a container applies what it is given unasked.

    Cost: 0.15 microseconds per module at each check.
    """

    def __init__(self, model: nn.Module) -> None:
        # In parallel lists, since a loop over all places in Python takes as long as a small step.
        self._slots: list[dict[str, Any]] = []
        self._known: list[tuple[str, str, list[str], bool]] = []
        self._owners: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        for name, module in model.named_modules():
            may_gain = not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
            for kind in _KINDS:
                slots = tensor_slots(module, kind)
                self._slots.append(slots)
                self._known.append((kind, name, list(slots), kind == "modules" and may_gain))
                for key, value in slots.items():
                    if isinstance(value, (nn.Module, nn.Parameter, type(None))):
                        self._owners.append(slots)
                        self._keys.append(key)
                        self._values.append(value)
        self._sizes = list(map(len, self._slots))

    def check(self, step: int) -> bool:
        """``step`` is about to be made; returns whether modules came or were replaced, as they may.

        Raises:
            UnsupportedError: a buffer has come or gone.
            TrajectoryError: modules or parameters are not those that there were at the beginning.
        """
        values = list(map(dict.get, self._owners, self._keys))
        sizes = list(map(len, self._slots))
        if sizes == self._sizes and all(map(is_, values, self._values)):
            return False
        noted = {
            (id(owner), key): value for owner, key, value in zip(self._owners, self._keys, self._values, strict=True)
        }
        for slots, (kind, name, keys, may_gain) in zip(self._slots, self._known, strict=True):
            for key in dict.fromkeys([*keys, *slots]):
                if key in keys and key in slots:
                    before = noted.get((id(slots), key), slots[key])
                    if slots[key] is before or (may_gain and before is None) or _alike(before, slots[key]):
                        continue
                elif may_gain and key not in keys:
                    continue
                where = f"{name}.{key}" if name else key
                if kind == "buffers":
                    refuse_change("buffer", where, step)
                raise TrajectoryError(
                    f"{kind[:-1]} {where!r} of the model was put in, taken out, moved or replaced before step {step}, "
                    "and the optimizer still steps what it was given: pruning, parametrizing, tying weights, other "
                    "layers? Do it before the with block, and begin a new recorder after it"
                )
        self._sizes, self._values = sizes, values
        return True


def _alike(before: Any, now: Any) -> bool:
    """Whether both are modules of the same kind and settings, without tensors, so that one does what the other did."""
    return (
        isinstance(before, nn.Module)
        and type(before) is type(now)
        and not any(slots for module in (before, now) for kind in _KINDS for slots in [tensor_slots(module, kind)])
        and repr(before) == repr(now)
    )


_KINDS: tuple[Literal["modules", "parameters", "buffers"], ...] = ("modules", "parameters", "buffers")


def refuse_change(kind: str, name: str, step: int) -> NoReturn:
    """Raise :class:`UnsupportedError` for a tensor that has come, gone or got another layout by ``step``."""
    raise UnsupportedError(
        f"{kind} {name!r} was made, removed or given another shape or type by step {step}; give it its form when the "
        "model is built (register_buffer in __init__): every state must have the same parts"
    )


class ChangeCheck:
    """Detects changes of parameters between two steps of the recorded optimizer.

    The tensors' version counters show changes in place, but not assignments through ``.data`` or fused optimizers. So
    all values are compared too after the first step and after each whose state is stored, which detects a loop that
    makes such changes at every step, and after each other step some elements, which detects weights that are averaged
    or loaded.

    Args:
        parameters: the model's, by name.

    Cost: 0.1 microseconds per parameter, twice a step, and 15 microseconds.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._tensors = list(parameters.values())
        whole = [name for name, value in parameters.items() if value.requires_grad and value.is_contiguous()]
        self._probed = [*dict.fromkeys([*whole[:1], *whole[-1:]])]
        self.note(None)

    def note(self, values: Mapping[str, Tensor] | None) -> None:
        """Remember the parameters as they are now; ``values``: copies, if there are any."""
        self._values = values
        self._versions = list(map(version, self._tensors))
        self._elements = {} if values is not None else {name: self._probe(name).clone() for name in self._probed}

    def _probe(self, name: str) -> Tensor:
        return self._parameters[name].detach().reshape(-1)[:8]

    def changed(self, waits: bool = False) -> list[str]:
        """The names of the parameters that have changed since.

        Args:
            waits: for an accelerator, to compare elements there too.
        """
        now = list(map(version, self._tensors))
        if self._values is not None:
            return [name for name, value in self._values.items() if not same(value, self._parameters[name])]
        if now == self._versions:
            elements = self._elements.items()
            return [
                name
                for name, noted in elements
                if (waits or noted.device.type == "cpu") and not same(noted, self._probe(name))
            ]
        names = zip(self._parameters, now, self._versions, strict=True)
        return [name for name, found, noted in names if found != noted]

    def check(self, step: int, waits: bool = False) -> None:
        """Raise :class:`TrajectoryError` if parameters have :meth:`changed` since; ``step`` is about to be made."""
        changed = self.changed(waits)
        if changed and step == 0:
            raise TrajectoryError(
                f"parameters changed between entering the recorder and the first optimizer step ({changed[0]!r} is the "
                "first); load weights and make earlier steps before the with block, so that the trajectory starts "
                "where training does. A layer that renormalises its weights (Embedding(max_norm=...)) is not supported"
            )
        if changed:
            raise TrajectoryError(
                f"parameter {changed[0]!r} changed between step {step - 1} and step {step}, and not by the recorded "
                "optimizer: a second optimizer, clamping, weights loaded into the model or averaged, or a layer that "
                "renormalises its weights (Embedding(max_norm=...)) may do that, and replay cannot. Make all of it "
                "inside recorder.one_step(), as Workload.step; or put constraints into the model "
                "(torch.nn.utils.parametrize), and load other weights into a copy of the model (copy.deepcopy)"
            )


def equal(some: Mapping[Any, Any], others: Mapping[Any, Any]) -> bool:
    """Whether the entries are the same, and tensors among them :func:`same`."""
    if some.keys() != others.keys():
        return False
    return all(
        isinstance(others[name], Tensor) and same(value, others[name])
        if isinstance(value, Tensor)
        else value == others[name]
        for name, value in some.items()
    )


def same(noted: Tensor, current: Tensor) -> bool:
    """Whether all values are equal; NaN equals NaN."""
    current = current.detach().to(noted.device)
    return torch.equal(noted, current) or torch.allclose(noted, current, rtol=0.0, atol=0.0, equal_nan=True)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
