"""Set modes by the modules' own ``train()`` and ``eval()``, which may do more than set a flag."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

from dit_mlflow.errors import UnsupportedError


def act(model: nn.Module) -> bool:
    """Whether a module of ``model`` overrides ``train()`` or ``eval()``."""
    return any(
        name in vars(module) or getattr(type(module), name) is not getattr(nn.Module, name)
        for module in model.modules()
        for name in ("train", "eval")
    )


def set_modes(modules: Mapping[str, nn.Module], evaluating: Set[str]) -> None:
    """Put every module into its mode by its own methods.

    Args:
        modules: the model's, by name, the model first.
        evaluating: names of the modules in evaluation mode.
    """
    root = next(iter(modules.values()))
    training = "" not in evaluating
    # Twice, since some methods do something only if the mode changes.
    root.train(not training)
    root.train(training)
    for name, module in modules.items():
        if module.training == (name in evaluating):
            module.train(name not in evaluating)
            module.training = name not in evaluating


def check_modes(model: nn.Module) -> None:
    """Refuse a model whose parameters or buffers depend on its mode.

    Raises:
        UnsupportedError: ``train()`` or ``eval()`` of a module changes them (adapters that are merged into weights).

    Cost: a copy of the model, if :func:`act`.
    """
    if not act(model):
        return
    tried = copy.deepcopy(model).train()
    with torch.no_grad():
        for number, value in enumerate(tried.parameters()):
            if value.is_floating_point():
                # Adapters are often 0 at first, so that merging them has no effect.
                random = torch.Generator().manual_seed(number)
                value.add_(0.1 + 0.1 * torch.rand(value.shape, generator=random).to(value))
    before = {name: value.clone() for name, value in _tensors(tried).items()}
    for set_mode in (tried.eval, tried.train):
        set_mode()
        now = _tensors(tried)
        changed = [
            name
            for name in [*before, *now]
            if name not in now or name not in before or not torch.equal(before[name], now[name])
        ]
        if changed:
            where = ".".join(changed[0].split(".")[:-1])
            owner = type(tried.get_submodule(where)).__name__ if where in dict(tried.named_modules()) else "?"
            raise UnsupportedError(
                f"{changed[0]!r} (of a {owner}) is changed by {set_mode.__name__}() of the model: weights that depend "
                "on the mode cannot be followed from step to step. Train without merging (loralib: merge_weights=False)"
                " and merge afterwards"
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for part in (model.named_parameters(), model.named_buffers()) for name, value in part}
