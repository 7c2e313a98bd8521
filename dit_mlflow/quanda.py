"""Our methods as explainers of quanda, so that its metrics judge them as they judge any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence import Query, Window, sample_losses
from dit_mlflow.influence.query import loss_of_batch
from dit_mlflow.methods import Method
from dit_mlflow.methods import method as method_called
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.substitution import Substitution
from dit_mlflow.workload import Workload

try:
    from quanda.explainers import Explainer
except ImportError as error:
    raise ImportError("the explainer for quanda needs quanda: pip install 'dit-mlflow[quanda]'") from error


class MethodExplainer(Explainer):  # type: ignore[misc]
    """A method of :mod:`dit_mlflow.methods` on a recorded training, behind quanda's interface (quanda 0.5)::

        how = {"trajectory": trajectory, "workload": workload, "method": "dit"}
        explainer = MethodExplainer(model, train_set, **how)
        metric.update(explanations=explainer.explain(x, y), test_targets=y)

    Metrics that make explainers themselves take ``explainer_cls=MethodExplainer, expl_kwargs=how``.

    **Sign**: the query is the workload's loss of a test sample with its target, and a score is its change when the
    training sample is removed. Positive = the sample lowers the loss, which quanda calls a proponent.

    The difference between ``model`` and the recorded final parameters is added wherever the query is evaluated. It is 0
    for the recorded model, so that scores are the method's; quanda's ``ModelRandomizationMetric`` makes it the
    randomisation. Training and buffers stay as recorded.

    Args:
        model: with the recorded parameters, by name; quanda needs logits of two or more classes from it.
        train_dataset: as recorded: ``workload.train_set``, or one with as many samples and the same targets.
        checkpoints, checkpoints_load_func: quanda's; the last checkpoint is loaded into ``model``.
        trajectory, workload: of the training.
        method: a name, or a :class:`~dit_mlflow.methods.method.Method` with settings of its own.
        window, kind: of the scores, default: the whole training, which is all that some methods have.
        sample: ``function(input, target) -> sample`` as ``workload.train_set[i]`` gives samples; default: the pair,
            the target in the type and shape of the recorded ones.

    Raises:
        InputError: a model or data set that is not the recorded one, a window for a method that has none, or a method
            that skips samples.
        UnsupportedError: explanations by a method that only measures suspicion, whatever the query.

    Cost: each call of :meth:`explain` is one call of the method, with a query for each test sample; larger test
    batches are cheaper.
    """

    accepted_tasks: ClassVar[list[str]] = ["image_classification", "text_classification"]

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        trajectory: Trajectory,
        workload: Workload,
        method: str | Method = "dit",
        window: Window | None = None,
        kind: str = "local",
        sample: Callable[[Tensor, Tensor], Any] | None = None,
        task: str = "image_classification",
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            train_dataset=train_dataset,
            task=task,
            checkpoints=checkpoints,
            checkpoints_load_func=checkpoints_load_func,
        )
        self.load_last_checkpoint()
        self.trajectory = trajectory
        self.workload = workload
        self.method = method_called(method) if isinstance(method, str) else method
        whole = Window(0, trajectory.num_steps)
        self.window = window or whole
        if not self.method.per_window and self.window != whole:
            raise InputError(
                f"{self.method.name} has no scores for windows, only for all of training; steps {self.window} of "
                f"{whole} were asked for. Leave window=... out, or take a method that has them (dit, tracin)"
            )
        self.kind = kind
        self._sample = sample or _pair_like(workload.train_set)
        self._self_influence: Tensor | None = None
        _check_targets(train_dataset, workload)
        self._difference = _difference(model, trajectory)

    def explain(self, test_data: Tensor, targets: Sequence[int] | Tensor) -> Tensor:
        """Scores ``[test samples, training samples]``, float32, of the losses on ``test_data`` with ``targets``."""
        if self.method.measures == "suspicion":
            raise UnsupportedError(
                f"{self.method.name} says how suspicious a training sample is, whatever the test sample: it has "
                "self_influence (for mislabeling detection), and no explanations"
            )
        labels = torch.as_tensor(targets)
        if len(labels) != len(test_data):
            raise InputError(f"{len(test_data)} test samples and {len(labels)} targets; expected as many of each")
        samples = [self._sample(x, y) for x, y in zip(test_data.detach().cpu(), labels.cpu(), strict=True)]
        queries = [
            loss_of_batch(self.workload, self.workload.collate(samples, [i]), f"loss of test sample {i}")  # type: ignore[arg-type]
            for i in range(len(samples))
        ]
        return torch.from_numpy(self._scores(queries)).float().to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """Change of each training sample's own loss when it is removed, ``[training samples]``, up to a factor.

        For a method that measures suspicion, how suspicious each is. High = memorised, or wrong. The factor makes the
        largest a thousand times the number of samples: quanda breaks ties by adding 0.0001 times the index, which would
        outweigh changes of a loss by thousandths.

        Args:
            batch_size: queries per call; a method that retrains is called once, since each call repeats its trainings.
        """
        if self._self_influence is None:
            n = self.workload.num_samples
            if self.method.measures == "suspicion":
                found = -self._scores(sample_losses(self.workload, [0], "training"))[0]
            else:
                found = np.zeros(n)
                at_once = n if self.method.retrains else batch_size
                for first in range(0, n, at_once):
                    part = range(first, min(first + at_once, n))
                    scores = self._scores(sample_losses(self.workload, part, "training"))
                    found[list(part)] = scores[range(len(part)), part]
            found *= 1000 * n / max(float(np.abs(found).max()), np.finfo(float).tiny)
            self._self_influence = torch.from_numpy(found).to(self.device)
        return self._self_influence

    def _scores(self, queries: Sequence[Query]) -> np.ndarray:
        """``[queries, training samples]``."""
        asked = [Query(query.name, _displaced(query, self._difference)) for query in queries]
        found = self.method(self.trajectory, self.workload, [self.window], self.kind, asked).scores[0]
        if missing := int(np.isnan(found).any(axis=0).sum()):
            raise InputError(
                f"{self.method.name} has no score for {missing} of {found.shape[1]} samples; quanda ranks all of them"
            )
        return found


def _pair_like(train_set: Any) -> Callable[[Tensor, Tensor], Any]:
    """``(input, target)`` with the target as the data set has it."""
    first = train_set[0]
    if not (isinstance(first, (tuple, list)) and len(first) == 2):
        raise InputError(
            f"the training set gives samples of type {type(first).__name__}, quanda pairs of input and target; give "
            "sample=function(input, target) that makes such a sample"
        )
    like = torch.as_tensor(first[1])
    return lambda x, y: (x, y.to(like.dtype).reshape(like.shape))


def _check_targets(train_dataset: Any, workload: Workload) -> None:
    """Compare the targets of both data sets: mislabeling detection needs the labels that were trained on."""
    recorded = workload.train_set
    if len(train_dataset) != workload.num_samples:
        raise InputError(
            f"quanda's training set has {len(train_dataset)} samples, the recorded one {workload.num_samples}; give "
            "workload.train_set"
        )
    if train_dataset is recorded:
        return
    for i in range(workload.num_samples):
        given, known = train_dataset[i], recorded[i]
        if not all(isinstance(sample, (tuple, list)) and len(sample) == 2 for sample in (given, known)):
            return
        if not torch.equal(*(torch.as_tensor(sample[1]).double().reshape(-1).cpu() for sample in (given, known))):
            raise InputError(
                f"sample {i} has target {given[1]} in quanda's training set and {known[1]} in the recorded one; give "
                "workload.train_set, or record the training on the set with these targets"
            )


def _difference(model: nn.Module, trajectory: Trajectory) -> dict[str, Tensor]:
    """The model's parameters minus the recorded final ones, without those that are equal."""
    recorded = trajectory.checkpoint(trajectory.num_steps).parameters
    given = {name: value.detach().cpu() for name, value in model.named_parameters()}
    if given.keys() != recorded.keys() or any(given[name].shape != value.shape for name, value in recorded.items()):
        raise InputError(
            f"the model ({type(model).__name__}) has parameters {sorted(given)[:4]}…, the trajectory "
            f"{sorted(recorded)[:4]}…; expected the same, in the same shapes"
        )
    found = {name: given[name] - value.cpu() for name, value in recorded.items() if value.is_floating_point()}
    return {name: value for name, value in found.items() if value.any()}


def _displaced(query: Query, difference: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    """The query of the model with the difference added to its parameters."""
    if not difference:
        return query.function

    def function(model: nn.Module) -> Tensor:
        moved = {
            name: value + difference[name].to(value.device, value.dtype) if name in difference else value
            for name, value in model.named_parameters()
        }
        return Substitution(model)(moved, dict(model.named_buffers()), query.function)

    return function
