"""The one training set of a trajectory, as loaders over it come along."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from dit_mlflow.errors import InputError
from dit_mlflow.workload.dataset_digest import dataset_digest, is_inert


class TrainingSet:
    """Holds every data set that is watched against the first one, and against what was recorded before.

    Args:
        expected: number of samples of the workload's training set, if there is a workload.

    Attributes:
        dataset: the first that came; ``None`` before.
        num_samples, digest: for the manifest, as far as they are known.
    """

    def __init__(self, expected: int | None) -> None:
        self._expected = expected
        self.dataset: Dataset[Any] | None = None
        self.num_samples: int | None = None
        self.digest: str | None = None

    def note(self, dataset: Dataset[Any]) -> None:
        """A loader over ``dataset`` is watched.

        Raises:
            InputError: it is not the workload's, not the one before, or not the recorded one.
        """
        size = len(dataset)  # type: ignore[arg-type]
        if self._expected not in (None, size):
            raise InputError(
                f"watch() was given a loader over {size} samples; the workload's train_set has {self._expected}, and "
                "sample indices must mean the same in both"
            )
        digest = dataset_digest(dataset) if is_inert(dataset) else None
        another = self.dataset is not None and self.dataset is not dataset
        if another and (digest is None or digest != self.digest):
            raise InputError("watch() was given a second dataset; a trajectory has one training set")
        if self.num_samples not in (None, size) or (digest and self.digest and digest != self.digest):
            raise InputError(
                f"watch() was given another dataset than the trajectory that is continued was recorded on ({size} "
                f"samples, {self.num_samples} recorded); resume with the same one, or record into a new folder"
            )
        self.dataset, self.num_samples, self.digest = dataset, size, digest or self.digest

    def complete(self) -> None:
        """Training is over: reading samples disturbs nothing any more."""
        if self.digest is None and self.dataset is not None:
            self.digest = dataset_digest(self.dataset)
