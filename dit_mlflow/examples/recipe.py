"""How a ready workload trains: a preset's settings, the user's in place of them, and the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dit_mlflow.errors import WorkloadError

Preset = Literal["default", "paper"]
OptimizerName = Literal["sgd", "adam", "adamw"]
Decay = Literal["none", "sqrt"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of training; the paper's wherever they are the same for all its models.

    Attributes:
        lr: learning rate at step 0.
        decay: ``sqrt`` divides it by ``sqrt(t + 1)`` at step ``t``.
        l2: ``0.5 * l2 * |theta|^2`` in each sample's loss; ``None``: that of cross-validated logistic regression.
        epochs, batch_size: of training.
        optimizer, momentum, weight_decay: of the optimizer; momentum is SGD's.
    """

    lr: float
    decay: Decay = "none"
    l2: float | None = 0.0
    epochs: int = 21
    batch_size: int = 64
    optimizer: OptimizerName = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.l2 is not None and not self.l2 >= 0:
            raise WorkloadError(f"l2 is {self.l2}; expected 0 or more")
        if not 0 <= self.momentum < 1:
            raise WorkloadError(f"momentum is {self.momentum}; expected 0 or more, and less than 1")
        if self.optimizer != "sgd" and self.momentum:
            raise WorkloadError(
                f"momentum={self.momentum} belongs to optimizer=sgd; {self.optimizer} has betas of its own"
            )

    def penalty(self, inputs: np.ndarray, labels: np.ndarray) -> float:
        """``l2``, or ``1 / (C n)`` with the ``C`` that cross-validation on the training samples chooses (5 folds)."""
        if self.l2 is not None:
            return self.l2
        classifier = LogisticRegression(fit_intercept=False, max_iter=1000)
        search = GridSearchCV(classifier, {"C": np.logspace(-4, 4, 10)}, cv=5)
        best = search.fit(inputs, labels).best_params_["C"]
        return 1 / (float(best) * len(labels))


def recipe_for(model: str, preset: Preset, presets: Mapping[Preset, Mapping[str, Recipe]], **given: Any) -> Recipe:
    """The preset's recipe for ``model``, with what is given (not ``None``) in place of it.

    Raises:
        WorkloadError: the preset has none, or the settings contradict each other.
    """
    recipes = presets[preset]
    if model not in recipes:
        raise WorkloadError(f"preset={preset} knows no {model} here; it has {', '.join(recipes) or 'nothing'}")
    return dataclasses.replace(recipes[model], **{name: value for name, value in given.items() if value is not None})


def build_optimizer(module: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over all parameters of ``module``."""
    if recipe.optimizer == "sgd":
        return SGD(module.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    cls = Adam if recipe.optimizer == "adam" else AdamW
    return cls(module.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)


def inverse_sqrt(optimizer: Optimizer) -> LambdaLR:
    """Learning rate over ``sqrt(t + 1)``."""
    return LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))
