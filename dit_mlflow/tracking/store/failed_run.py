"""How a run says that it failed. Imports nothing heavy: that import may be what was interrupted."""

from __future__ import annotations

from dit_mlflow.told import logger_of, text_of, told
from dit_mlflow.tracking.store.names import ERROR, KIND

TAG_CHARACTERS = 5000
"""Most characters of a tag that MLflow's databases take."""

_log = logger_of(__name__)


def fail_project_run(run_id: str | None, kind: str, message: str) -> None:
    """End the run that ``mlflow run`` made as FAILED, with the reason as a tag, unless it is FINISHED.

    If the store refuses, that is only logged: the user must see the error that ended the job.
    """
    if run_id is None:
        return
    try:
        from mlflow import MlflowClient

        from dit_mlflow.tracking.plugin import DitRunContext

        client = MlflowClient()
        if client.get_run(run_id).info.status == "FINISHED":
            return
        # First, since later requests may fail.
        client.set_terminated(run_id, "FAILED")
        for name, value in {**DitRunContext().tags(), KIND: kind, ERROR: storable(message)}.items():
            client.set_tag(run_id, name, value)
    except Exception as error:  # Any kind: stores raise what their libraries raise.
        _log.warning("run %s cannot be ended as FAILED: %s: %s", run_id, type(error).__name__, error)


def error_text(error: BaseException) -> str:
    """Kind and message of ``error``, see :func:`storable`."""
    return storable(f"{type(error).__name__}: {text_of(error, TAG_CHARACTERS)}")


def storable(message: str) -> str:
    """``message`` as a tag holds and shows it: see :func:`dit_mlflow.told.told`."""
    return told(message, TAG_CHARACTERS)
