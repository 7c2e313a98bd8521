"""Queries: the differentiable scalars of a model that influence is computed on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dit_mlflow.errors import InputError
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.replay.not_finite import named, refuse_diverged
from dit_mlflow.told import text_of, told
from dit_mlflow.trajectory import Record, State
from dit_mlflow.workload import Workload, floating_one, to_like
from dit_mlflow.workload.batches import Batch

Dataset = Literal["validation", "training", "test"]
CHUNK = 1024
"""Largest number of validation samples per forward pass."""


NAME_CHARACTERS = 500
"""Most characters of a query's name, which is :func:`told`: one line."""


@dataclass(frozen=True, eq=False)
class Query:
    """A named scalar of the model, computed in evaluation mode, with the same random draws of torch every time.

    Attributes:
        name: appears in every result.
        function: ``function(model) -> scalar tensor``, differentiable. It may be called with float64 parameters,
            so it should move its data to the parameters' dtype (:func:`dit_mlflow.workload.to_like`).
        rows: ``rows(model) -> [B]``, the values of single samples that the scalar is computed from; ``None`` = unknown.
    """

    name: str
    function: Callable[[nn.Module], Tensor]
    rows: Callable[[nn.Module], Tensor] | None = None

    def __post_init__(self) -> None:
        # It may hold a label from data, and goes to Parquet, databases and terminals.
        object.__setattr__(self, "name", told(text_of(self.name, NAME_CHARACTERS), NAME_CHARACTERS))

    def __call__(self, model: nn.Module) -> Tensor:
        value = self.function(model)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"query {self.name!r} returned {shape}; expected a tensor with one element")
        return value.reshape(())


def mean_validation_loss(workload: Workload, samples: Sequence[int] | None = None, of: str = "") -> Query:
    """The mean of ``workload.loss`` over the validation set, the default query, or over some of its samples.

    Args:
        workload: loss and data.
        samples: indices of validation samples; default: all.
        of: what they are, behind the query's name: ``mean_validation_loss of class 7``.

    Cost: one forward pass of the samples per evaluation.
    """
    chosen = np.arange(len(workload.validation_set)) if samples is None else np.asarray(samples)  # type: ignore[arg-type]
    parts = np.array_split(chosen, -(-len(chosen) // CHUNK))
    batches = [(workload.unvarying(workload.validation_set, part), len(part)) for part in parts]

    def rows(model: nn.Module) -> Tensor:
        return torch.cat([workload.sample_losses(model, _moved(batch, model), size) for batch, size in batches])

    return Query(f"mean_validation_loss{f' of {of}' if of else ''}", lambda model: rows(model).mean(), rows)


def sample_losses(workload: Workload, samples: Sequence[int] | None = None, of: Dataset = "validation") -> list[Query]:
    """The loss of single samples, one query each, named ``loss of validation sample 3``.

    With all samples of the validation set, :func:`dit_mlflow.track` gives the influence of every training sample on
    every validation sample.

    Args:
        workload: loss and data sets.
        samples: indices; default: all.
        of: the data set: ``validation``, ``training`` or ``test``.

    Raises:
        InputError: there is no such data set or sample.
    """
    single = _single_samples(workload, samples, of)
    return [loss_of_batch(workload, batch, f"loss of {of} sample {index}") for index, batch in single]


def loss_of_batch(workload: Workload, batch: Batch, name: str) -> Query:
    """The loss of a batch of one sample, as a query with this name."""
    return Query(name, lambda model: workload.sample_losses(model, _moved(batch, model), 1))


def logits(
    workload: Workload, label: int, samples: Sequence[int] | None = None, of: Dataset = "validation"
) -> list[Query]:
    """The model's logit for class ``label`` on single samples, named ``logit 7 of validation sample 3``.

    Args:
        workload: with :attr:`Workload.outputs`, unless ``model(batch[0])`` are the logits. A single output ``z`` per
            sample means the logits ``(-z / 2, z / 2)`` of classes 0 and 1.
        label: class.
        samples, of: as for :func:`sample_losses`.

    Raises:
        InputError: there is no such data set or sample.
    """
    return _output_queries(workload, f"logit {label}", lambda z, y: z[y], samples, of, label)


def margins(workload: Workload, samples: Sequence[int] | None = None, of: Dataset = "validation") -> list[Query]:
    """The logit of a sample's own class minus the largest other one, named ``margin of validation sample 3``.

    Arguments and errors as for :func:`logits`; classes are those of ``Workload.targets``.
    """

    def margin(z: Tensor, y: int) -> Tensor:
        return z[y] - torch.cat([z[:y], z[y + 1 :]]).max()

    return _output_queries(workload, "margin", margin, samples, of)


def probabilities(workload: Workload, samples: Sequence[int] | None = None, of: Dataset = "validation") -> list[Query]:
    """The probability (softmax, sigmoid) of a sample's own class, named ``probability of validation sample 3``.

    Arguments and errors as for :func:`margins`.
    """
    return _output_queries(workload, "probability", lambda z, y: z.softmax(dim=0)[y], samples, of)


def parameter_value(name: str, *position: int) -> Query:
    """One coordinate of a parameter, named ``fc.weight[2, 5]``.

    Raises:
        InputError: when the query is evaluated, if the model has no such parameter or coordinate.
    """

    def function(model: nn.Module) -> Tensor:
        parameters = dict(model.named_parameters())
        if name not in parameters:
            raise InputError(f"query for parameter {name!r}: the model has {sorted(parameters)}")
        shape = parameters[name].shape
        if len(position) != len(shape) or any(not 0 <= at < size for at, size in zip(position, shape, strict=True)):
            raise InputError(f"query for {name}{list(position)}: the parameter has shape {list(shape)}")
        return parameters[name][position]

    return Query(f"{name}{list(position)}", function)


def _output_queries(
    workload: Workload,
    name: str,
    measure: Callable[[Tensor, int], Tensor],
    samples: Sequence[int] | None,
    of: Dataset,
    label: int | None = None,
) -> list[Query]:
    def value(batch: Batch, model: nn.Module) -> Tensor:
        found = workload.class_logits(model, _moved(batch, model), 1)[0]
        of_class = int(workload.class_labels(batch, len(found))[0]) if label is None else label
        if not 0 <= of_class < len(found):
            raise InputError(f"query {name!r} on class {of_class}: the model has classes 0 … {len(found) - 1}")
        return measure(found, of_class)

    single = _single_samples(workload, samples, of)
    return [Query(f"{name} of {of} sample {index}", partial(value, batch)) for index, batch in single]


def _single_samples(workload: Workload, samples: Sequence[int] | None, of: Dataset) -> list[tuple[int, Batch]]:
    sets = {"validation": workload.validation_set, "training": workload.train_set, "test": workload.test_set}
    dataset = sets.get(of)
    if dataset is None:
        known = ", ".join(name for name, given in sets.items() if given is not None)
        raise InputError(f"queries on the {of!r} set: the workload has {known}")
    size = len(dataset)  # type: ignore[arg-type]
    indices = range(size) if samples is None else [int(index) for index in samples]
    outside = [index for index in indices if not 0 <= index < size]
    if outside:
        raise InputError(f"queries on {of} samples {outside[:5]}: expected indices within 0 … {size - 1}")
    return [(index, workload.unvarying(dataset, [index])) for index in indices]


def refuse_not_finite(
    query: Query, value: Tensor, state: State, t: int, dynamics: Dynamics, trajectory: Record | None = None
) -> None:
    """Raise if the query's ``value`` at ``s_t`` is not finite: influence is undefined there.

    Raises:
        TrajectoryError: training diverged.
        InputError: the state is finite, the query is not; names the samples, where :attr:`Query.rows` are known.
    """
    if bool(value.isfinite().all()):
        return
    refuse_diverged(state, t, trajectory)
    who = ""
    if query.rows is not None:
        with torch.no_grad():
            rows = dynamics.evaluate(state.parameters, state.buffers, query.rows)
        who = f", because of {named((~rows.isfinite()).nonzero().flatten().tolist())} of its data"
    raise InputError(
        f"query {query.name!r} is {value.item()} at step {t}{who}, so influence on it is undefined. Look for NaN and "
        "infinity in the query's data, and for training that diverges"
    )


def _moved(batch: Batch, model: nn.Module) -> Batch:
    like = floating_one(model.parameters())
    return to_like(batch, like.device, like.dtype, fresh=True)


def is_loss(name: str) -> bool:
    """Whether a query's name says that it is a loss, of which less is better."""
    return "loss" in re.findall("[a-z]+", name)


def resolve_queries(queries: Sequence[Query] | None, workload: Workload) -> list[Query]:
    """The queries given, or the default; raises :class:`InputError` for none or repeated names."""
    resolved = [mean_validation_loss(workload)] if queries is None else list(queries)
    names = [query.name for query in resolved]
    if not names or len(set(names)) != len(names):
        raise InputError(f"queries are named {names}; expected at least one, with different names")
    return resolved
