"""Estimators of influence behind one interface, ours and other distributions'; each is loaded when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dit_mlflow.errors import InputError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.third_party import load_method, owner, registered

if TYPE_CHECKING:
    NAMES: tuple[str, ...]
    """Of all methods: ours, in the order that tables show, then those that other distributions register now."""

_HOMES = {
    "dit": "dit:Dit",
    "expected": "expected:Expected",
    "removal": "removal:Removal",
    "dit_confirmed": "dit_confirmed:DitConfirmed",
    "leave_one_out": "leave_one_out:LeaveOneOut",
    "sgd_influence": "sgd_influence:SgdInfluence",
    "tracin": "tracin:TracIn",
    "tracin_renormalized": "tracin_renormalized:TracInRenormalized",
    "tracin_checkpoints": "tracin_checkpoints:TracInCheckpoints",
    "dvemb": "dvemb:Dvemb",
    "source": "source:Source",
    "influence_function": "influence_function:InfluenceFunction",
    "influence_function_lissa": "influence_function_lissa:InfluenceFunctionLissa",
    "influence_function_arnoldi": "influence_function_arnoldi:InfluenceFunctionArnoldi",
    "influence_function_datainf": "influence_function_datainf:InfluenceFunctionDatainf",
    "influence_function_ekfac": "influence_function_ekfac:InfluenceFunctionEkfac",
    "grad_dot": "grad_dot:GradDot",
    "grad_cos": "grad_cos:GradCos",
    "mirrored_influence": "mirrored_influence:MirroredInfluence",
    "representer_points": "representer_points:RepresenterPoints",
    "trak": "trak:Trak",
    "self_influence": "self_influence:SelfInfluence",
    "loss": "loss:Loss",
    "grad_norm": "grad_norm:GradNorm",
    "aum": "aum:Aum",
    "forgetting_events": "forgetting_events:ForgettingEvents",
    "downsampling": "downsampling:Downsampling",
    "datamodel": "datamodel:Datamodel",
    "data_shapley": "data_shapley:DataShapley",
    "confident_learning": "confident_learning:ConfidentLearning",
    "knn_shapley": "knn_shapley:KnnShapley",
}
"""Name -> module and class in this package, in the order that tables show."""


def method(name: str) -> Method:
    """The method called ``name``, with its default settings.

    Other distributions register theirs as entry points of the group ``dit_mlflow.methods`` (docs/extending/method.md).

    Raises:
        InputError: there is none of that name, or several; or that of another distribution cannot be used.
    """
    others = registered().get(name, [])
    owners = [*(["dit-mlflow itself"] if name in _HOMES else []), *map(owner, others)]
    if len(owners) > 1:
        raise InputError(
            f"method {name!r} is registered by {' and by '.join(owners)}; uninstall all but one, or have one renamed"
        )
    if others:
        return load_method(others[0])
    if name not in _HOMES:
        raise InputError(f"there is no method {name!r}; there are {', '.join(_names())}")
    module, _, cls = _HOMES[name].partition(":")
    found: Method = getattr(import_module(f"dit_mlflow.methods.{module}"), cls)()
    return found


def _names() -> tuple[str, ...]:
    return tuple(dict.fromkeys([*_HOMES, *registered()]))


def __getattr__(name: str) -> Any:
    if name == "NAMES":
        return _names()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["NAMES", "Estimate", "Method", "Question", "method"]
