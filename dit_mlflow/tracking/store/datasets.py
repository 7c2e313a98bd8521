"""Data sets as inputs of runs: name, digest, size and context, never their contents."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from mlflow import MlflowClient, entities
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset import Dataset
from mlflow.entities import DatasetInput, InputTag

from dit_mlflow.told import text_of, told
from dit_mlflow.tracking.store.names import DATASET_CONTEXT
from dit_mlflow.tracking.store.patience import asked_again, made_at_once
from dit_mlflow.workload import Workload

DIGEST_CHARACTERS = 32
"""Characters kept of a trajectory's SHA-256 in hexadecimal; MLflow takes up to 36."""


SETTING_CHARACTERS = 500
"""Most characters of a setting, …"""

SOURCE_CHARACTERS = 60_000
"""… and of all, as JSON; MLflow takes 65,535, with some of its own."""


class SampleSet(Dataset):
    """The description of a PyTorch data set.

    Args:
        name: shown in the UI.
        digest: of :func:`dit_mlflow.workload.dataset_digest.dataset_digest`; ``None`` = it varies.
        num_samples: its length.
        source: how it was made, for example the workload's reference and settings.
    """

    def __init__(self, name: str, digest: str | None, num_samples: int, source: dict[str, str]) -> None:
        self.num_samples = num_samples
        known = digest[:DIGEST_CHARACTERS] if digest else f"{num_samples}-varying-samples"
        super().__init__(source=CodeDatasetSource(tags=source), name=name, digest=known)

    def _compute_digest(self) -> str:
        raise AssertionError("a digest is always given")

    @property
    def profile(self) -> dict[str, int]:
        return {"num_samples": self.num_samples}

    @property
    def schema(self) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "profile": f'{{"num_samples": {self.num_samples}}}'}


def log_dataset(run_id: str, dataset: SampleSet, context: str) -> None:
    """Log a data set as input of a run; ``context``: ``training``, ``validation`` or ``test``."""
    tags = [InputTag(DATASET_CONTEXT, context)]
    _log_inputs(run_id, [DatasetInput(entities.Dataset(**dataset.to_dict()), tags)])


def log_datasets_of(training_run_id: str, run_id: str) -> None:
    """Log the data sets of a training as inputs of a run that asks about it."""
    inputs = MlflowClient().get_run(training_run_id).inputs
    if inputs is not None and inputs.dataset_inputs:
        _log_inputs(run_id, inputs.dataset_inputs)


def _log_inputs(run_id: str, inputs: list[DatasetInput]) -> None:
    # The runs of an experiment share the row of a data set; two that make it at once are one too many for a database.
    asked_again(partial(MlflowClient().log_inputs, run_id, inputs), made_at_once)


def workload_source(workload: Workload) -> dict[str, str]:
    """How a workload's data sets were made: its reference, as ``workload``, and its settings, cut until all fit."""
    if workload.reference is None:
        return {}
    settings = {name if name != "workload" else "workload.workload": value for name, value in workload.settings.items()}
    for longest in (SETTING_CHARACTERS, 50, 5):
        source = {
            "workload": told(workload.reference, SETTING_CHARACTERS),
            **{text_of(name, SETTING_CHARACTERS): text_of(value, longest) for name, value in settings.items()},
        }
        if len(json.dumps(source)) <= SOURCE_CHARACTERS:
            return source
    return {"workload": source["workload"], "settings": f"{len(settings)}, too many to be listed"}
