"""Earlier measurements, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import joblib

ROOT = Path(__file__).parents[2]
"""Of the repository."""

MEMORY = joblib.Memory(ROOT / "build" / "reproduction", verbose=0)

F = TypeVar("F", bound=Callable[..., Any])


def remembered(function: F) -> F:
    """``function``, with its results kept in ``build/reproduction`` by arguments and by its own source."""
    return cast(F, MEMORY.cache(function))
