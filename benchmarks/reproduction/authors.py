"""The published method as the authors' code does it, for comparison: slow, and with the final model's query."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dit_mlflow import Trajectory, UnsupportedError, Window, Workload
from dit_mlflow.influence.query import mean_validation_loss
from dit_mlflow.methods.tracin import learning_rates


def authors_scores(trajectory: Trajectory, workload: Workload, windows: list[Window]) -> np.ndarray:
    r"""``cumulative`` scores ``[windows, samples]`` of plain SGD, sweep by sweep and sample by sample.

    For every window bound :math:`c`, a sweep from :math:`c` to step 0 begins with the query gradient of the **final**
    model; at each step, the gradient of one sample after the other is formed, and one Hessian-vector product of the
    batch. Written from the paper (arXiv 2502.10793, section 4) and from what its code is known to do; sign and scale
    as everywhere here.

    Raises:
        UnsupportedError: the training did not use SGD.

    Cost: the sum of all bounds in steps, so quadratic in the number of epochs; one backward pass for every sample that
    a step met, and two for its Hessian-vector product.
    """
    if trajectory.manifest.optimizer.name != "SGD":
        raise UnsupportedError(
            f"the published method is for SGD; the training used {trajectory.manifest.optimizer.name}"
        )
    replay = trajectory.replay(workload)
    states = list(replay.forward(0, trajectory.num_steps))
    model = workload.build_model()
    parameters = list(model.parameters())
    states[-1].load_into(model).eval()
    query = torch.autograd.grad(mean_validation_loss(workload)(model), parameters)
    model.train()
    steps = [trajectory.step(t) for t in range(trajectory.num_steps)]
    rates = [next(iter(learning_rates(replay, step).values())) for step in steps]
    influence = {0: np.zeros(workload.num_samples)}
    for bound in sorted({bound for window in windows for bound in (window.start, window.end)} - {0}):
        adjoint, weight_gradients = list(query), np.zeros(workload.num_samples)
        for t in range(bound - 1, -1, -1):
            states[t].load_into(model)
            (batch,) = steps[t].indices
            for sample in batch:
                gradient = torch.autograd.grad(_loss(workload, model, [sample]), parameters)
                product = sum((g * a).sum() for g, a in zip(gradient, adjoint, strict=True))
                weight_gradients[sample] += rates[t] / len(batch) * float(product)
            gradient = torch.autograd.grad(_loss(workload, model, list(batch)), parameters, create_graph=True)
            along = torch.autograd.grad(gradient, parameters, adjoint, allow_unused=True, materialize_grads=True)
            adjoint = [a - rates[t] * h for a, h in zip(adjoint, along, strict=True)]
        influence[bound] = weight_gradients
    return np.stack([influence[window.end] - influence[window.start] for window in windows])


def _loss(workload: Workload, model: nn.Module, samples: list[int]) -> torch.Tensor:
    return workload.loss(model, workload.batch(samples)).mean()
