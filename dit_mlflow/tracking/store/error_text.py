"""Why something failed, as a run's tag and a table can hold it; imports nothing heavy."""

from __future__ import annotations

TAG_CHARACTERS = 5000
"""Characters of a tag, the most that MLflow's databases take."""


def error_text(error: BaseException) -> str:
    """Kind and message of ``error``, see :func:`storable`."""
    return storable(f"{type(error).__name__}: {error}")


def storable(message: str) -> str:
    """As much of ``message`` as fits, without halves of surrogate pairs, which names of files bring."""
    return message[:TAG_CHARACTERS].encode("utf-8", "replace").decode()
