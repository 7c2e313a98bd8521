"""UCI Adult: does a person earn more than 50,000 dollars a year? The paper's setting, with optional damage.

See README.md in this folder for the settings, the files and how the defaults were chosen.
"""

from __future__ import annotations

from typing import Literal

from dit_mlflow import Workload, WorkloadError
from dit_mlflow.examples import (
    Captions,
    Decay,
    Labelled,
    OptimizerName,
    Preset,
    Recipe,
    Splits,
    classification,
    network,
    notes,
    recipe_for,
    split,
    standardised,
)
from dit_mlflow.examples import corrupt as damage

from .encoding import COLUMNS, FEATURES, encoded
from .table import people

Damage = Literal["flip", "class_flip", "hard_flip", "duplicate"]

PRESETS: dict[Preset, dict[str, Recipe]] = {
    # Chosen by validation accuracy alone; ``python projects/choose_defaults.py projects/adult`` prints the table.
    "default": {"logreg": Recipe(lr=0.1), "dnn": Recipe(lr=0.1)},
    "paper": {"logreg": Recipe(lr=0.1, decay="sqrt", l2=None), "dnn": Recipe(lr=0.3, decay="sqrt", l2=1e-3)},
}


def workload(
    model: Literal["logreg", "dnn"] = "dnn",
    preset: Preset = "default",
    data_dir: str | None = None,
    n_train: int = 256,
    n_validation: int = 256,
    n_test: int = 256,
    data_seed: int = 0,
    corrupt: float = 0.1,
    corrupt_seed: int = 0,
    corruption: Damage = "flip",
    hidden: int = 8,
    epochs: int = 21,
    batch_size: int = 64,
    optimizer: OptimizerName = "sgd",
    lr: float | None = None,
    decay: Decay | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    l2: float | None = None,
) -> Workload:
    """People of the census of 1994: at most 50,000 dollars a year (label 0) or more (label 1).

    Args:
        model: ``logreg`` one linear layer on the encoded row, ``dnn`` one hidden layer of 8 with ReLU.
        preset: ``paper`` sets ``lr``, ``decay`` and ``l2`` as the authors' code does; what is given wins.
        data_dir: folder with adult.data and adult.test; default: downloaded from OpenML through scikit-learn.
        n_train, n_validation, n_test: samples in each split, drawn without overlap, the last from adult.test.
        data_seed: seed of the split.
        corrupt, corrupt_seed, corruption: share of training samples to damage, seed of the choice, and what is done to
            them before standardisation; see :func:`dit_mlflow.examples.corrupt`.
        hidden: width of the ``dnn``'s hidden layer.
        epochs, batch_size: of training.
        optimizer, lr, momentum, weight_decay: of the optimizer; momentum is SGD's.
        decay: ``sqrt`` divides the learning rate by ``sqrt(t + 1)`` at step ``t``.
        l2: ``0.5 * l2 * |theta|^2`` added to each sample's loss.
    """
    if not 0 <= corrupt <= 1:
        raise WorkloadError(f"corrupt is {corrupt}; expected a share between 0 and 1")
    recipe = recipe_for(
        model,
        preset,
        PRESETS,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        decay=decay,
        momentum=momentum,
        weight_decay=weight_decay,
        l2=l2,
    )
    pool, test, folder = people(data_dir)
    drawn = split(pool, n_train, n_validation, n_test, data_seed, "people", test)
    damaged = damage(drawn.train.inputs, drawn.train.labels, corruption, corrupt, corrupt_seed, 2, features=encoded)
    rows = damaged.inputs
    training = encoded(rows)

    def prepared(samples: Labelled) -> Labelled:
        return Labelled(standardised(encoded(samples.inputs), training, "pixel"), samples.labels)

    def detail(index: int) -> str:
        row = dict(zip(COLUMNS, rows[index], strict=True))
        return f"age {row['age']}, {row['education']}, {row['occupation']}, {row['hours-per-week']} hours a week"

    return classification(
        Splits(prepared(Labelled(rows, damaged.labels)), prepared(drawn.validation), prepared(drawn.test)),
        network(model, (len(FEATURES),), 2, hidden),
        recipe,
        Captions(
            ["<=50K", ">50K"],
            labels=damaged.labels,
            truth=drawn.train.labels,
            corrupted=damaged.indices,
            kind=corruption,
            noun="earns",
            notes=notes("row", "another"),
            detail=detail,
        ),
        show=lambda index: dict(zip(COLUMNS, map(str, rows[index]), strict=True)),
        settings={"data_dir": folder},
    )
