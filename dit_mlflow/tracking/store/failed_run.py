"""The end of a run whose job was broken off: imports nothing heavy before, since that may be what was interrupted."""

from __future__ import annotations

import logging

from dit_mlflow.tracking.store.error_text import storable
from dit_mlflow.tracking.store.names import ERROR, KIND

_log = logging.getLogger(__name__)


def fail_project_run(run_id: str | None, kind: str, message: str) -> None:
    """Leave the reason on the run that ``mlflow run`` made, and end it as FAILED, unless it has come to its end.

    A store that does not let us is logged: what broke the job off is what people must be told.
    """
    if run_id is None:
        return
    try:
        from mlflow import MlflowClient

        from dit_mlflow.tracking.plugin import DitRunContext

        client = MlflowClient()
        if client.get_run(run_id).info.status == "FINISHED":
            return
        # First, since more may not come through.
        client.set_terminated(run_id, "FAILED")
        for name, value in {**DitRunContext().tags(), KIND: kind, ERROR: storable(message)}.items():
            client.set_tag(run_id, name, value)
    except Exception as error:  # Of whatever kind: stores raise what their libraries do.
        _log.warning("run %s cannot be ended as FAILED: %s: %s", run_id, type(error).__name__, error)
