"""Optimizers by parameter name: describe, read and rebuild them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dit_mlflow.errors import TrajectoryError, UnsupportedError, WorkloadError
from dit_mlflow.trajectory.manifest import DTYPES, OptimizerLayout
from dit_mlflow.trajectory.state import COUNTERS
from dit_mlflow.trajectory.step_record import Hyperparameters
from dit_mlflow.workload.workload import Optimizers, Workload

SUPPORTED: dict[str, type[Optimizer]] = {
    cls.__name__: cls
    for cls in (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
        torch.optim.ASGD,
    )
}
"""Optimizers that the sweep differentiates through PyTorch's own code, as tested against finite differences: all of
``torch.optim`` that accept ``differentiable=True``, except Rprop."""

_REFUSED: dict[type[Optimizer], str] = {
    torch.optim.Rprop: "its step depends on the gradient's sign alone, so that every influence would be 0 or undefined",
    torch.optim.LBFGS: "it evaluates the loss several times per step, and its line search is not differentiable",
    torch.optim.SparseAdam: "it takes sparse gradients alone; use dense ones with Adam",
}


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of ``torch.optim`` that a manifest names; raises :class:`UnsupportedError` for any other."""
    if name not in SUPPORTED:
        raise UnsupportedError(
            f"the trajectory names the optimizer {name!r}; expected one of "
            f"{', '.join('torch.optim.' + known for known in SUPPORTED)}, or another's module and class"
        )
    return SUPPORTED[name]


def is_others(name: str) -> bool:
    """Whether a manifest names an optimizer that :data:`SUPPORTED` lacks (``module.class``), or several (``+``)."""
    return "." in name or "+" in name


def _name(cls: type[Optimizer]) -> str:
    return cls.__name__ if SUPPORTED.get(cls.__name__) is cls else f"{cls.__module__}.{cls.__qualname__}"


def every(optimizer: Optimizers) -> list[Optimizer]:
    """The optimizers, in order, whether one or several by name."""
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer.values())


def groups_of(optimizer: Optimizers) -> list[dict[str, Any]]:
    """The parameter groups of all, one after the other."""
    return [group for one in every(optimizer) for group in one.param_groups]


def describe_optimizer(optimizer: Optimizers, model: nn.Module) -> OptimizerLayout:
    """Class, defaults and parameter names per group; of several, the classes joined by ``+``, what all
    have defaults for, and all groups.

    Raises:
        UnsupportedError: a class in :data:`_REFUSED`.
        TrajectoryError: the optimizer holds tensors that are not parameters of ``model``, or one is held twice.
    """
    for one in every(optimizer):
        if (reason := _REFUSED.get(type(one))) is not None:
            raise UnsupportedError(f"optimizer {type(one).__name__} is not supported: {reason}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [parameter for group in groups_of(optimizer) for parameter in group["params"]]
    foreign = [parameter for parameter in held if id(parameter) not in names]
    if foreign:
        raise TrajectoryError(
            f"the optimizer holds {len(foreign)} tensors (first shape {list(foreign[0].shape)}) that are not "
            "parameters of the recorded model; record one module that holds all that is trained"
        )
    if len({id(parameter) for parameter in held}) < len(held):
        raise TrajectoryError(
            "two of the optimizers hold the same parameter, so that its state has two owners; give each to one of them"
        )
    return OptimizerLayout(
        name="+".join(_name(type(one)) for one in every(optimizer)),
        defaults={
            key: _plain(key, value)
            for key, value in every(optimizer)[0].defaults.items()
            if all(key in one.defaults for one in every(optimizer))
        },
        groups=tuple(tuple(names[id(parameter)] for parameter in group["params"]) for group in groups_of(optimizer)),
    )


def hyperparameters(optimizer: Optimizers) -> tuple[Hyperparameters, ...]:
    """Per group, all settings but ``initial_lr``, as JSON has them.

    A tensor that the optimizer itself keeps in its groups (a counter) becomes ``{"tensor": number, "dtype": name}``;
    settings that are tensors (a learning rate) become numbers. So does Adafactor's ``eps``, if it follows the
    parameters' dtype: a replay in another dtype takes the same.

    Raises:
        UnsupportedError: a setting is neither number, string, ``None`` nor a list of them.
    """
    return tuple(
        {
            key: _plain(key, _resolved(one, group, key, value), kept=key not in one.defaults)
            for key, value in group.items()
            if key not in _NO_SETTINGS
        }
        for one in every(optimizer)
        for group in one.param_groups
    )


def _resolved(optimizer: Optimizer, group: Mapping[str, Any], key: str, value: Any) -> Any:
    if isinstance(optimizer, torch.optim.Adafactor) and key == "eps" and value[0] is None and group["params"]:
        return torch.finfo(group["params"][0].dtype).eps, value[1]
    return value


_NO_SETTINGS = ("params", "param_names", "initial_lr")


def optimizer_state(optimizer: Optimizers, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """Detached dense copies of the state, by parameter name (``names``: ``id(parameter) -> name``).

    Absent values (SGD's momentum before its first step) are left out.

    Raises:
        UnsupportedError: the state belongs to no parameter, or is neither tensor nor number.
    """
    kind = "+".join(type(one).__name__ for one in every(optimizer))
    found: dict[str, dict[str, Any]] = {}
    for parameter, entry in ((key, entry) for one in every(optimizer) for key, entry in one.state.items()):
        if id(parameter) not in names or not isinstance(entry, Mapping):
            raise UnsupportedError(
                f"the optimizer {kind} keeps state that belongs to no parameter ({str(parameter)[:50]!r}), which a "
                "record cannot hold; keep it with a parameter"
            )
        kept = found[names[id(parameter)]] = {}
        for key, value in entry.items():
            if value is None:
                continue
            if key in COUNTERS and isinstance(value, Tensor) and value.dim():
                raise UnsupportedError(
                    f"the optimizer {kind} keeps {key!r} as a tensor of shape {list(value.shape)}, and {key!r} is the "
                    "name of a number in torch's optimizers; give it another name"
                )
            if not isinstance(value, (Tensor, int, float)):
                raise UnsupportedError(
                    f"the optimizer {kind} keeps its state {key!r} of {names[id(parameter)]!r} "
                    f"as a {type(value).__name__}; expected tensors and numbers. Keep it in one tensor"
                )
            kept[key] = value.detach().to_dense().clone() if isinstance(value, Tensor) else value
    return found


def build_optimizer(layout: OptimizerLayout, workload: Workload) -> Optimizer:
    """The recorded optimizer, over no parameters yet: one empty param group for each in the layout.

    If it is not in :data:`SUPPORTED`, the workload builds it: a record is data, and none of its code is run.

    Raises:
        TrajectoryError: it cannot be built, or the workload builds another one.
    """
    if is_others(layout.name):
        return _emptied(layout, workload)
    cls = optimizer_class(layout.name)
    known = inspect.signature(cls).parameters
    defaults = {key: value for key, value in layout.defaults.items() if key in known}
    defaults = {key: tuple(value) if isinstance(value, list) else value for key, value in defaults.items()}
    try:
        return cls([{"params": []} for _ in layout.groups], **defaults)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TrajectoryError(
            f"torch.optim.{layout.name} cannot be built with the recorded settings {defaults}: {error}"
        ) from error


def _emptied(layout: OptimizerLayout, workload: Workload) -> Optimizer:
    if workload.optimizer is None:
        raise TrajectoryError(
            f"the trajectory was recorded with the optimizer {layout.name}, which is none of torch.optim's "
            "differentiable ones, so its code must come from the workload; give Workload(optimizer=lambda model: …)"
        )
    optimizer = emptied(workload.optimizer(workload.build_model()), layout)
    if not isinstance(optimizer, Optimizer):
        raise WorkloadError(
            f"Workload.optimizer gives several ({', '.join(optimizer)}), which only Workload.step takes"
        )
    return optimizer


def emptied(optimizer: Optimizers, layout: OptimizerLayout) -> Optimizers:
    """The same over no parameters, if it is what was recorded; else raises :class:`TrajectoryError`."""
    name, groups = "+".join(_name(type(one)) for one in every(optimizer)), groups_of(optimizer)
    if name != layout.name or len(groups) != len(layout.groups):
        raise TrajectoryError(
            f"the workload's optimizer is {name} with {len(groups)} parameter groups; the trajectory was recorded with "
            f"{layout.name} and {len(layout.groups)}"
        )
    for one in every(optimizer):
        one.state.clear()
    for group in groups:
        group["params"] = []
    return optimizer


def set_hyperparameters(optimizer: Optimizers, recorded: Sequence[Hyperparameters]) -> None:
    """Give each param group its recorded settings."""
    groups = [(group, one.defaults) for one in every(optimizer) for group in one.param_groups]
    if len(recorded) != len(groups):
        raise TrajectoryError(
            f"a step has settings for {len(recorded)} parameter groups; the optimizer was recorded with {len(groups)}"
        )
    for (group, defaults), settings in zip(groups, recorded, strict=True):
        set_group(group, settings, defaults)


def set_group(group: dict[str, Any], settings: Hyperparameters, defaults: Mapping[str, Any]) -> None:
    """Give a param group its recorded settings, and take away what another step has left in it.

    ``defaults``: of the optimizer, whose settings stay.
    """
    for key in group.keys() - settings.keys() - defaults.keys() - {*_NO_SETTINGS}:
        del group[key]
    for key, value in settings.items():
        tensor = isinstance(value, Mapping)
        group[key] = torch.tensor(value["tensor"], dtype=DTYPES[value["dtype"]]) if tensor else value


def _plain(key: str, value: Any, kept: bool = False) -> Any:
    """As JSON has it: numbers, also inside tuples; ``kept``: whether a tensor stays one."""
    if kept and isinstance(value, Tensor) and value.dim() == 0:
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(_plain(key, part) for part in value)
    if value is not None and not isinstance(value, (int, float, str)):
        raise UnsupportedError(
            f"the optimizer's setting {key!r} is a {type(value).__name__}, which a record cannot hold; expected "
            "numbers, strings or lists of them. Keep it as an attribute of the optimizer"
        )
    return value
