"""The query that a user names in a word: of a class, a group, the worst group, one sample, or an output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation.figures import LOSS
from dit_mlflow.evaluation.metrics import sample_scores
from dit_mlflow.influence import Query, logits, margins, mean_validation_loss, probabilities, sample_losses
from dit_mlflow.methods.given_scores import read_table
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining.changed_data import class_names, sample_classes
from dit_mlflow.retraining.groups import check_groups
from dit_mlflow.workload import Workload
from dit_mlflow.workload.random_state import preserved_random_state

AskedQuery = Callable[[Trajectory], list[Query] | None]
"""The queries on a trajectory; ``None`` = the default one, the mean validation loss."""

SINGLE = {"sample": sample_losses, "margin": margins, "probability": probabilities}
"""Of one validation sample: ``sample:3``."""

FORMS = (
    "class:NAME, group:FILE.csv:NAME, worst_group (of the classes), worst_group:FILE.csv, sample:INDEX, "
    "logit:CLASS:INDEX, margin:INDEX or probability:INDEX, of validation samples; empty for the mean validation loss"
)


def parse_query(text: str, workload: Workload) -> AskedQuery:
    """Parse a query as a user writes it; only the worst group needs the trajectory, whose last state it is asked of.

    - ``class:NAME``: mean loss over the validation samples of a class, by its label or its number;
    - ``group:FILE.csv:NAME``: mean loss over those of a group, by a table of ``sample_index`` and ``group``;
    - ``worst_group``, ``worst_group:FILE.csv``: the class, or the group, of largest mean loss when training has ended;
    - ``sample:INDEX``: the loss of one validation sample;
    - ``logit:CLASS:INDEX``, ``margin:INDEX``, ``probability:INDEX``: an output for one validation sample.

    Raises:
        InputError: the text has another form, or names what is not there.
        UnsupportedError: classes are asked for, and the labels are none.
    """
    form, _, rest = text.strip().partition(":")
    if not form:
        return lambda trajectory: None
    if form == "class":
        return _mean_over(_classes(workload), form, rest, text, workload)
    if form == "group":
        path, name = _file_and_name(rest)
        return _mean_over(_groups(path, workload), form, name, text, workload)
    if form == "worst_group":
        return _worst(_groups(rest, workload) if rest else _classes(workload), workload)
    if form in SINGLE:
        return _asking(SINGLE[form](workload, [_index(rest, text)]))
    if form == "logit":
        label, _, index = rest.rpartition(":")
        classes = _classes(workload)
        place = _place(classes, "class", label, text)
        (found,) = logits(workload, place, [_index(index, text)])
        return _asking([replace(found, name=f"logit of {list(classes)[place]} for validation sample {index}")])
    raise InputError(f"query={text!r} cannot be read; expected {FORMS}")


def _asking(queries: list[Query]) -> AskedQuery:
    return lambda trajectory: queries


def read_groups(path: str, parameter: str, expected: str = "a CSV file") -> dict[str, list[int]]:
    """The groups in a CSV file with the columns ``sample_index`` and ``group``; raises :class:`InputError`."""
    try:
        table = read_table(path, {"group": "str"}, missing=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{parameter}={path!r} cannot be read: {error}; expected {expected}") from error
    if missing := {"sample_index", "group"} - set(table):
        told = ", ".join(map(str, table))
        raise InputError(
            f"{path} has the columns {told}; expected {' and '.join(sorted(missing))} among them, with commas between"
        )
    if not table["group"].str.strip().all():
        line = 2 + int(np.argmin(table["group"].str.strip().astype(bool)))
        raise InputError(f"{parameter}={path!r} names no group in line {line}; expected one for each sample")
    return {str(name): part["sample_index"].tolist() for name, part in table.groupby("group")}


def _file_and_name(text: str) -> tuple[str, str]:
    """``FILE:NAME``, where both may hold colons: the shortest beginning that is a file, else all but the last part."""
    parts = text.split(":")
    for count in range(1, len(parts)):
        path = ":".join(parts[:count])
        with suppress(OSError, ValueError):  # It cannot be the name of a file.
            if Path(path).is_file():
                return path, ":".join(parts[count:])
    return ":".join(parts[:-1]), parts[-1]


def _groups(path: str, workload: Workload) -> dict[str, list[int]]:
    found = read_groups(path, "query")
    check_groups(found, len(workload.validation_set))  # type: ignore[arg-type]
    return {f"group {name}": samples for name, samples in found.items()}


def _classes(workload: Workload) -> dict[str, list[int]]:
    """Validation samples of each class of the training set, by the name that the labels have there."""
    of_training = sample_classes(workload)
    names = class_names(workload, of_training)
    classes = sample_classes(workload, workload.validation_set)
    numbers = range(max(of_training.max(), classes.max()) + 1)
    return {f"class {names.get(number, number)}": np.flatnonzero(classes == number).tolist() for number in numbers}


def _place(groups: Mapping[str, list[int]], kind: str, name: str, text: str) -> int:
    """The place of the group that is named, by its name or, where some classes have names in words, by its number."""
    names = [known.removeprefix(f"{kind} ") for known in groups]
    if name in names:
        return names.index(name)
    # Where all names are numbers themselves, another number is no place among them: digit 0 is not the class "1".
    if kind == "class" and name.isdecimal() and int(name) < len(names) and not all(map(str.isdecimal, names)):
        return int(name)
    raise InputError(f"query={text!r}: there is no {kind} {name!r}; there are {', '.join(names)}")


def _mean_over(groups: Mapping[str, list[int]], kind: str, name: str, text: str, workload: Workload) -> AskedQuery:
    called, samples = list(groups.items())[_place(groups, kind, name, text)]
    if not samples:
        raise InputError(f"query={text!r}: no validation sample is of {called}")
    return _asking([mean_validation_loss(workload, samples, called)])


def _worst(groups: Mapping[str, list[int]], workload: Workload) -> AskedQuery:
    def asked(trajectory: Trajectory) -> list[Query]:
        with preserved_random_state():
            model = workload.build_model()
            trajectory.checkpoint(trajectory.num_steps).load_into(model)
            losses = sample_scores(workload, model.eval(), workload.validation_set)[LOSS]
        means = {name: losses[samples].mean() for name, samples in groups.items() if samples}
        worst = max(means, key=means.__getitem__)
        return [mean_validation_loss(workload, groups[worst], worst)]

    return asked


def _index(number: str, text: str) -> int:
    if not number.isdecimal():
        raise InputError(f"query={text!r}: {number!r} is no index of a validation sample; expected {FORMS}")
    return int(number)
