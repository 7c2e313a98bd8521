"""The final model's query gradient in place of the query: the shortcut of the authors' code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit_mlflow import Query, Trajectory, Workload
from dit_mlflow.influence.query import mean_validation_loss


def final_query(trajectory: Trajectory, workload: Workload) -> Query:
    r"""The linear query :math:`q(\theta) = \langle \theta, \nabla q(\theta_T) \rangle`, of the mean validation loss.

    Its gradient is the final model's everywhere. Asked at the windows' ends (``cumulative``) it gives the published
    code's window scores; asked of TracIn, SGD-influence without its Hessians.
    """
    *_, final = trajectory.states(workload, trajectory.num_steps, trajectory.num_steps)
    model = final.load_into(workload.build_model()).eval()
    parameters = dict(model.named_parameters())
    value = mean_validation_loss(workload)(model)
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    gradients = dict(zip(parameters, found, strict=True))

    def linear(at: nn.Module) -> Tensor:
        moved = dict(at.named_parameters())
        return torch.stack([(moved[name] * g.to(moved[name])).sum() for name, g in gradients.items()]).sum()

    return Query("final_query", linear)
