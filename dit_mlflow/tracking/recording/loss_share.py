"""Measures the factor of each sample's loss in a step of the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_mlflow.replay.substitution import Substitution
from dit_mlflow.told import logger_of
from dit_mlflow.workload.random_state import RandomState, preserved_random_state

logger = logger_of(__name__)

_IGNORED = -100
"""The label that Hugging Face losses leave out."""


@dataclass
class _Forward:
    """One training forward pass: samples, their labels, labels in the step, loss, and ``d objective / d loss``."""

    size: int
    count: int
    shifted_count: int | None
    items: float | None
    loss: Tensor
    factor: float | None = None


class LossShare:
    """Watches a model's training forward passes for ``c_i``, the factor of sample ``i``'s loss in the step.

    A sample's loss is the *sum* over its labels that are not -100. The factor depends on the trainer, the model and
    their versions, so it is measured:

    - ``f``, by which the trainer multiplies the model's loss, is the gradient of the objective by that loss;
    - one more forward pass with twice ``num_items_in_batch`` (labels in all micro-batches of the step), once per
      training, tells whether the model divides by that number or by the labels of the micro-batch.

    Then ``c_i = f / items`` or ``c_i = f / labels of the micro-batch``. :meth:`take` returns ``None`` where the factor
    cannot be known: the model does not see the labels (label smoothing, ``compute_loss_func``), several labels per
    sample are not class numbers, or a micro-batch takes several forward passes.

    Cost: a Python call per micro-batch, and one forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forwards: list[_Forward] = []
        self._divides_by_items: bool | None = None
        self._given_up = False
        self._before: RandomState | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._begins, with_kwargs=True),
            model.register_forward_hook(self._ends, with_kwargs=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._forwards = []

    def take(self, num_batches: int) -> tuple[list[np.ndarray] | None, float | None]:
        """``c_i`` of the step's micro-batches and its objective, where known; ends the step."""
        forwards, self._forwards = self._forwards, []
        factors = [forward.factor for forward in forwards if forward.factor is not None]
        if len(forwards) != num_batches or len(factors) != num_batches:
            return None, None
        objective = sum(factor * forward.loss.item() for factor, forward in zip(factors, forwards, strict=True))
        shares = [self._share(forward, forwards) for forward in forwards]
        known = [share for share in shares if share is not None]
        if len(known) != num_batches:
            return None, objective
        return [np.full(forward.size, share) for forward, share in zip(forwards, known, strict=True)], objective

    def _share(self, forward: _Forward, step: list[_Forward]) -> float | None:
        if forward.factor is None or forward.count == 0:
            return None
        if forward.items is None:
            # Of several labels, it cannot be seen over how many the model averaged.
            return forward.factor / forward.count if forward.shifted_count is None else None
        for counts in ([part.count for part in step], [part.shifted_count for part in step]):
            if None not in counts and sum(counts) == forward.items:  # type: ignore[arg-type]
                count = counts[step.index(forward)]
                if count == forward.items or self._divides_by_items:
                    return forward.factor / forward.items
                return forward.factor / count if self._divides_by_items is False and count else None
        return None

    def _begins(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if _trains(model) and self._divides_by_items is None and "num_items_in_batch" in kwargs:
            self._before = RandomState.capture()

    def _ends(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if not _trains(model):
            return
        forward = _read(kwargs, output)
        if forward is None:
            return
        if forward.loss.requires_grad:

            def note(gradient: Tensor) -> None:
                forward.factor = gradient.item()

            forward.loss.register_hook(note)
        if forward.items is not None and self._divides_by_items is None and not self._given_up:
            self._try(args, kwargs, forward)
        forward.loss = forward.loss.detach().clone()
        self._forwards.append(forward)

    def _try(self, args: Any, kwargs: Mapping[str, Any], forward: _Forward) -> None:
        """Test whether the loss halves when the number of items doubles."""
        if not (first := forward.loss.item()):
            return
        assert self._before is not None
        doubled = {**kwargs, "num_items_in_batch": 2 * kwargs["num_items_in_batch"]}
        # Copies: the pending backward pass allows no in-place change of the buffers, even if undone.
        buffers = {name: value.clone() for name, value in self._model.named_buffers()}
        with preserved_random_state(), torch.no_grad():
            self._before.restore()
            # forward, not a call: the model's hooks, ours among them, must see only the trainer's calls.
            output = Substitution(self._model)(
                dict(self._model.named_parameters()), buffers, lambda model: model.forward(*args, **doubled)
            )
        ratio = float(_loss(output)) / first  # type: ignore[arg-type]
        for divides, expected in ((True, 0.5), (False, 1.0)):
            if abs(ratio - expected) < 1e-3:
                self._divides_by_items = divides
                return
        self._given_up = True
        logger.warning(
            "how %s combines its samples' losses into one was not recognised; give Workload.coefficients",
            type(self._model).__name__,
        )


def _trains(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()


def _read(kwargs: Mapping[str, Any], output: Any) -> _Forward | None:
    labels, loss = kwargs.get("labels"), _loss(output)
    if not isinstance(labels, Tensor) or labels.dim() == 0 or loss is None:
        return None
    several = labels.dim() > 1 and labels.shape[1:].numel() > 1
    if several and labels.is_floating_point():
        return None
    items = kwargs.get("num_items_in_batch")
    counted = labels.ne(_IGNORED)
    return _Forward(
        size=len(labels),
        count=int(counted.sum()),
        shifted_count=int(counted[..., 1:].sum()) if several else None,
        items=None if items is None else float(items),
        loss=loss,
    )


def _loss(output: Any) -> Tensor | None:
    found = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    return found if isinstance(found, Tensor) and found.numel() == 1 else None
