"""Earlier measurements, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import joblib

ROOT = Path(__file__).parents[2]
"""Of the repository."""

MEMORY = joblib.Memory(os.environ.get("DIT_REPRODUCTION_MEMORY") or ROOT / "build" / "reproduction", verbose=0)

F = TypeVar("F", bound=Callable[..., Any])


def remembered(function: F) -> F:
    """``function``, with its results kept in ``build/reproduction``, or the folder that the environment variable
    ``DIT_REPRODUCTION_MEMORY`` names, by arguments and by its own source."""
    return cast(F, MEMORY.cache(function))
