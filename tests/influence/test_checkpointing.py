"""Gradient checkpointing in training is left out in a replay: whatever form it has, the scores are those without it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import record, whole
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils import checkpoint as module
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts
from workloads import digits_workload

from dit_mlflow import Trajectory, TrajectoryError, UnsupportedError, Workload, leave_one_out, track
from dit_mlflow.replay.checkpointing import WITHOUT_RECOMPUTATION

Run = Callable[[nn.Module, Tensor], Any]


def plain(inner: nn.Module, hidden: Tensor) -> Any:
    return inner(hidden)


def by_the_module(inner: nn.Module, hidden: Tensor) -> Any:
    return module.checkpoint(inner, hidden, use_reentrant=False)


def selective(inner: nn.Module, hidden: Tensor) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return checkpoint(inner, hidden, use_reentrant=False, context_fn=contexts)


def nested(inner: nn.Module, hidden: Tensor) -> Any:
    return checkpoint(partial(checkpoint, inner, use_reentrant=False), hidden, use_reentrant=False)


def sequential(inner: nn.Module, hidden: Tensor, reentrant: bool) -> Any:
    return checkpoint_sequential(inner, 2, hidden, use_reentrant=reentrant)


def decorated(inner: nn.Module, hidden: Tensor) -> Any:
    return checkpoint(use_reentrant=False)(inner)(hidden)  # type: ignore[call-arg, operator]


class Checkpointed(nn.Module):
    """Its inner part is run by ``run``."""

    def __init__(self, run: Run, wrap: Callable[[nn.Module], nn.Module] = lambda inner: inner) -> None:
        super().__init__()
        self.run = run
        self.first = nn.Linear(64, 6)
        self.inner = wrap(nn.Sequential(nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 6), nn.Tanh()))
        self.last = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.run(self.inner, self.first(images)))


def wrapped(how: CheckpointImpl) -> nn.Module:
    return Checkpointed(plain, partial(checkpoint_wrapper, checkpoint_impl=how))


FORMS: dict[str, Callable[[], nn.Module]] = {
    "reentrant": partial(Checkpointed, partial(checkpoint, use_reentrant=True)),
    "not reentrant": partial(Checkpointed, partial(checkpoint, use_reentrant=False)),
    "by the module": partial(Checkpointed, by_the_module),
    "selective": partial(Checkpointed, selective),
    "nested": partial(Checkpointed, nested),
    "sequential": partial(Checkpointed, partial(sequential, reentrant=False)),
    "sequential, reentrant": partial(Checkpointed, partial(sequential, reentrant=True)),
    "wrapper": partial(wrapped, CheckpointImpl.NO_REENTRANT),
    "wrapper, reentrant": partial(wrapped, CheckpointImpl.REENTRANT),
}
if inspect.signature(checkpoint).parameters["function"].default is None:
    # Since torch 2.14.
    FORMS["decorator"] = partial(Checkpointed, decorated)


def trained(folder: Path, model: Callable[[], nn.Module]) -> tuple[Trajectory, Workload]:
    torch.manual_seed(0)
    made = model()
    trajectory = record(folder, made, SGD(made.parameters(), lr=0.5))
    return trajectory, digits_workload(model=model, optimizer=None)


def scores(folder: Path, model: Callable[[], nn.Module]) -> tuple[np.ndarray, np.ndarray]:
    """Of all samples, by :func:`track` and by exact retraining."""
    trajectory, workload = trained(folder, model)
    assert trajectory.verify(workload).max_drift == 0
    windows = whole(trajectory)
    return track(trajectory, workload, windows).of(0), leave_one_out(trajectory, workload, windows).of(0)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    return scores(tmp_path_factory.mktemp("plain"), partial(Checkpointed, plain))


@pytest.mark.parametrize("model", FORMS.values(), ids=FORMS)
def test_checkpointed_models_have_the_scores_of_plain_ones(
    model: Callable[[], nn.Module], without: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    swept, exact = scores(tmp_path / "t", model)
    np.testing.assert_array_equal(swept, without[0])
    # Torch 2.6 does not batch runs of the form that is not reentrant: one after the other, they round otherwise.
    np.testing.assert_allclose(exact, without[1], rtol=1e-10)


def bert(options: dict[str, Any] | None) -> nn.Module:
    """A tiny one, of pixels as words; checkpointed, with ``options`` of ``checkpoint``, if they are given."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("transformers 5.10 needs torch 2.7")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=17, max_position_embeddings=64, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    if options is not None:
        # The second is the name in transformers before 5.
        named = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        getattr(model, next(name for name in named if hasattr(model, name)))(options)
    return model


def of_pixels(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return cross_entropy(model(input_ids=(16 * images).long()).logits, labels, reduction="none")


def test_transformers_checkpointing_has_the_scores_without(tmp_path: Path) -> None:
    found = []
    for name, options in {"without": None, "no": {"use_reentrant": False}, "yes": {"use_reentrant": True}}.items():
        torch.manual_seed(0)
        model = bert(options)
        trajectory = record(tmp_path / name, model, SGD(model.parameters(), lr=0.5), loss=of_pixels, epochs=1)
        workload = digits_workload(model=partial(bert, options), loss=of_pixels, optimizer=None)
        assert trajectory.verify(workload).max_drift == 0
        found.append(track(trajectory, workload, whole(trajectory)).of(0))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_masks_that_the_gradient_did_not_have_are_refused(reentrant: bool, tmp_path: Path) -> None:
    # Run again, the dropout draws another mask: the step's gradient is that of no forward pass.
    run = partial(checkpoint, use_reentrant=reentrant, preserve_rng_state=False)
    trajectory, workload = trained(tmp_path / "t", partial(Checkpointed, run))
    with pytest.raises(TrajectoryError, match="misses the checkpoint"):
        track(trajectory, workload, whole(trajectory))


class Recomputing(torch.autograd.Function):
    """Checkpointing of one's own: runs the module again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inner: nn.Module, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.inner = inner
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return inner(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden,) = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            output = ctx.inner(hidden)
        return None, *torch.autograd.grad(output, [hidden, *ctx.inner.parameters()], gradient)


def recomputing(inner: nn.Module, hidden: Tensor) -> Any:
    return Recomputing.apply(inner, hidden, *inner.parameters())


def test_a_module_that_runs_again_by_other_means_is_refused(tmp_path: Path) -> None:
    trajectory, workload = trained(tmp_path / "t", partial(Checkpointed, recomputing))
    with pytest.raises(UnsupportedError, match="runs again when its gradient is taken"):
        track(trajectory, workload, whole(trajectory))


class Count(nn.Module):
    calls = 0

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        return value.sin()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_elsewhere_goes_on(reentrant: bool) -> None:
    def calls() -> int:
        counted = Count()
        checkpoint(counted, torch.ones(1, requires_grad=True), use_reentrant=reentrant).backward()
        return counted.calls

    def note() -> None:
        found.append(calls())

    found: list[int] = []
    before = vars(module.CheckpointFunction).copy()
    with WITHOUT_RECOMPUTATION():
        with WITHOUT_RECOMPUTATION():
            assert calls() == 1
        assert calls() == 1
        other = threading.Thread(target=note)
        other.start()
        other.join()
    assert found == [2]
    assert calls() == 2
    assert vars(module.CheckpointFunction) == before


def test_other_hooks_of_saved_tensors_are_set_and_left_as_ever() -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    def fails(value: Tensor) -> Tensor:
        raise ValueError("inside")

    value = torch.ones(1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with WITHOUT_RECOMPUTATION():
            with pytest.raises(ValueError, match="inside"):
                checkpoint(fails, value, use_reentrant=False)
            packed.clear()
            value.sin()
            assert len(packed) == 1
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                value.sin()
            assert len(packed) == 1
        value.sin()
        assert len(packed) == 2
    value.sin()
    assert len(packed) == 2
