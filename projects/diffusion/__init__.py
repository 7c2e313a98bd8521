"""A small denoising diffusion model (DDPM) of scikit-learn's 8 x 8 digits; noise and timesteps are drawn in the loss.

See README.md in this folder for the settings, how the defaults were chosen, and the timestep-induced bias measured.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from dit_mlflow import Workload, WorkloadError
from dit_mlflow.examples import Decay, Labelled, OptimizerName, Recipe, build_optimizer, inverse_sqrt, split
from dit_mlflow.examples import corrupt as damage

from .network import NoisePredictor, Noising

BRIGHTEST = 16


def workload(
    n_train: int = 128,
    n_validation: int = 128,
    n_test: int = 128,
    data_seed: int = 0,
    corrupt: float = 0.0,
    corrupt_seed: int = 0,
    timesteps: int = 100,
    draws: int = 8,
    hidden: int = 64,
    epochs: int = 40,
    batch_size: int = 32,
    optimizer: OptimizerName = "sgd",
    lr: float = 3.0,
    decay: Decay = "none",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Workload:
    """Predict the noise in noisy digits.

    Args:
        n_train, n_validation, n_test: samples in each split, drawn without overlap; there are 1,797.
        data_seed: seed of the split, and of the fixed draws.
        corrupt, corrupt_seed: share of training images to add noise to for good, and seed of it.
        timesteps: of the noising process, 21 or more.
        draws: timesteps with their noise that each sample carries for evaluation.
        hidden: width of the network's two hidden layers.
        epochs, batch_size: of training.
        optimizer, lr, momentum, weight_decay: of the optimizer; momentum is SGD's.
        decay: ``sqrt`` divides the learning rate by ``sqrt(t + 1)`` at step ``t``.
    """
    for name, value, least in (("timesteps", timesteps, 21), ("draws", draws, 1), ("hidden", hidden, 1)):
        if value < least:
            raise WorkloadError(f"{name} is {value}; expected {least} or more")
    if draws > timesteps:
        raise WorkloadError(f"draws is {draws}; expected at most one for each of the {timesteps} timesteps")
    recipe = Recipe(lr, decay, 0.0, epochs, batch_size, optimizer, momentum, weight_decay)
    noising = Noising(timesteps)
    pixels, labels = load_digits(return_X_y=True)
    pool = Labelled(pixels / BRIGHTEST, labels)
    splits = split(pool, n_train, n_validation, n_test, data_seed, "digits")
    damaged = damage(splits.train.inputs, splits.train.labels, "noise", corrupt, corrupt_seed, 10)

    def dataset(images: np.ndarray, part: int) -> TensorDataset:
        # From 0 … 1 to -1 … 1, the range of the noise.
        inputs = torch.from_numpy(2 * images - 1).float()
        return TensorDataset(inputs, *noising.fixed_draws(len(images), draws, images.shape[1], 3 * data_seed + part))

    def label(index: int) -> str:
        return str(damaged.labels[index])

    def describe(index: int) -> str:
        return f"digit {label(index)}" + (" (noisy image)" if index in damaged.indices else "")

    return Workload(
        model=partial(NoisePredictor, pixels.shape[1], hidden, timesteps),
        loss=noising.sample_losses,
        train_set=dataset(damaged.inputs, 0),
        validation_set=dataset(splits.validation.inputs, 1),
        test_set=dataset(splits.test.inputs, 2) if n_test else None,
        optimizer=partial(build_optimizer, recipe=recipe),
        scheduler=inverse_sqrt if decay == "sqrt" else None,
        batch_size=batch_size,
        epochs=epochs,
        corrupted=tuple(damaged.indices.tolist()),
        describe=describe,
        show=lambda index: damaged.inputs[index].reshape(8, 8).clip(0, 1),
        label=label,
    )
