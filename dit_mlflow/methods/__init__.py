"""Estimators of influence behind one interface, ours and other distributions'; each is loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dit_mlflow.errors import InputError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.methods.third_party import load_method, owner, registered

if TYPE_CHECKING:
    NAMES: tuple[str, ...]
    """Names of all methods: ours, in the order of tables, then those that other distributions register."""

_HOMES = {
    "dit": "dit:Dit",
    "expected": "dit:Expected",
    "removal": "removal:Removal",
    "dit_confirmed": "exact:DitConfirmed",
    "leave_one_out": "exact:LeaveOneOut",
    "sgd_influence": "dit:SgdInfluence",
    "tracin": "tracin:TracIn",
    "tracin_renormalized": "tracin:TracInRenormalized",
    "tracin_checkpoints": "tracin:TracInCheckpoints",
    "dvemb": "dvemb:Dvemb",
    "source": "source:Source",
    "influence_function": "newton_step:InfluenceFunction",
    "influence_function_lissa": "newton_step:InfluenceFunctionLissa",
    "influence_function_arnoldi": "newton_step:InfluenceFunctionArnoldi",
    "influence_function_datainf": "fisher:InfluenceFunctionDatainf",
    "influence_function_ekfac": "fisher:InfluenceFunctionEkfac",
    "grad_dot": "at_window_end:GradDot",
    "grad_cos": "at_window_end:GradCos",
    "mirrored_influence": "mirrored_influence:MirroredInfluence",
    "representer_points": "representer_points:RepresenterPoints",
    "trak": "trak:Trak",
    "self_influence": "dit:SelfInfluence",
    "loss": "at_window_end:Loss",
    "grad_norm": "at_window_end:GradNorm",
    "aum": "presentations:Aum",
    "forgetting_events": "presentations:ForgettingEvents",
    "downsampling": "downsampling:Downsampling",
    "datamodel": "datamodel:Datamodel",
    "data_shapley": "data_shapley:DataShapley",
    "confident_learning": "confident_learning:ConfidentLearning",
    "knn_shapley": "knn_shapley:KnnShapley",
    "detect": "detect:Detect",
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
