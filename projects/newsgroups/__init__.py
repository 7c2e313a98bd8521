"""20 Newsgroups: posts on PC against posts on Mac hardware as TF-IDF (the paper's setting), with optional damage.

See README.md in this folder for the settings, the files and how the defaults were chosen.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

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

from .posts import GROUPS, read_posts

Damage = Literal["flip", "class_flip", "hard_flip", "duplicate", "ood"]

PRESETS: dict[Preset, dict[str, Recipe]] = {
    # Chosen by validation accuracy alone; ``python projects/choose_defaults.py projects/newsgroups`` prints the table.
    "default": {"logreg": Recipe(lr=0.03), "dnn": Recipe(lr=0.1)},
    "paper": {
        "logreg": Recipe(lr=0.1, decay="sqrt", l2=None),
        # The paper's 64, as the authors split 200 samples: four batches of 50.
        "dnn": Recipe(lr=0.1, decay="sqrt", l2=1e-3, batch_size=50),
    },
}

SIZES: dict[tuple[Preset, str], int] = {("paper", "dnn"): 200}
"""Samples in each split, if not 256."""


def workload(
    model: Literal["logreg", "dnn"] = "dnn",
    preset: Preset = "default",
    data_dir: str | None = None,
    n_train: int | None = None,
    n_validation: int | None = None,
    n_test: int | None = None,
    data_seed: int = 0,
    corrupt: float = 0.1,
    corrupt_seed: int = 0,
    corruption: Damage = "flip",
    hidden: int = 8,
    epochs: int = 21,
    batch_size: int | None = None,
    optimizer: OptimizerName = "sgd",
    lr: float | None = None,
    decay: Decay | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    l2: float | None = None,
) -> Workload:
    """Posts of comp.sys.ibm.pc.hardware (label 0) against comp.sys.mac.hardware (label 1).

    TF-IDF without English stop words, ``min_df=0.001``, ``max_df=0.2``, each value standardised; words, idf, means and
    deviations are those of the training posts alone, after the damage.

    Args:
        model: ``logreg`` one linear layer, ``dnn`` one hidden layer of 8 with ReLU.
        preset: ``paper`` sets ``lr``, ``decay``, ``l2``, ``batch_size`` and the number of samples as the authors' code
            does; what is given wins.
        data_dir: the by-date archive (20news-bydate.tar.gz, which is read as it is), its folder, or what it unpacks to;
            default: downloaded through scikit-learn.
        n_train, n_validation, n_test: posts in each split, drawn without overlap, the last from the later posts that
            the archive keeps for testing; default 256, for ``dnn`` with ``preset=paper`` 200.
        data_seed: seed of the split.
        corrupt, corrupt_seed, corruption: share of training samples to damage, seed of the choice, and what is done to
            them; see :func:`dit_mlflow.examples.corrupt`. ``ood`` puts posts of other groups in their place.
        hidden: width of the ``dnn``'s hidden layer.
        epochs, batch_size: of training; default 21 and 64 (four batches of 50 where there are 200 samples).
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
    size = SIZES.get((preset, model), 256)
    n_train, n_validation, n_test = (size if given is None else given for given in (n_train, n_validation, n_test))
    posts = read_posts(data_dir, with_others=corruption == "ood")
    drawn = split(posts.pool, n_train, n_validation, n_test, data_seed, "posts", posts.test)
    vectorizer = TfidfVectorizer(stop_words="english", min_df=0.001, max_df=0.2)

    def tfidf(of: np.ndarray) -> np.ndarray:
        return np.asarray(vectorizer.transform(of).toarray())

    damaged = damage(
        drawn.train.inputs,
        drawn.train.labels,
        corruption,
        corrupt,
        corrupt_seed,
        len(GROUPS),
        posts.others,
        features=lambda of: np.asarray(vectorizer.fit_transform(of).toarray()),
    )
    texts = damaged.inputs
    vectorizer.fit(texts)
    training = tfidf(texts)

    def prepared(samples: Labelled) -> Labelled:
        return Labelled(standardised(tfidf(samples.inputs), training, "pixel"), samples.labels)

    return classification(
        Splits(
            prepared(Labelled(texts, damaged.labels)),
            prepared(drawn.validation),
            prepared(drawn.test) if len(drawn.test) else drawn.test,
        ),
        network(model, (training.shape[1],), 2, hidden),
        recipe,
        Captions(
            GROUPS,
            labels=damaged.labels,
            truth=drawn.train.labels,
            corrupted=damaged.indices,
            kind=corruption,
            noun="from",
            notes=notes("text", "another group"),
            detail=lambda index: f"“{_beginning(texts[index])}”",
        ),
        show=lambda index: str(texts[index]),
        settings={"data_dir": posts.source, "n_train": n_train, "n_validation": n_validation, "n_test": n_test},
    )


def _beginning(text: str) -> str:
    line = " ".join(text[:400].split())
    return line if len(line) <= 60 else f"{line[:60]}…"
