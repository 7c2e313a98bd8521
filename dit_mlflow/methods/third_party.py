"""Methods of other distributions: entry points of the group ``dit_mlflow.methods``, imported when asked for."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from dit_mlflow.errors import InputError
from dit_mlflow.methods.method import Method

GROUP = "dit_mlflow.methods"


def registered() -> dict[str, list[EntryPoint]]:
    """The entry points of installed distributions, sorted by name; a name with several is a conflict."""
    return _registered(tuple(sys.path))


@lru_cache(maxsize=1)
def _registered(path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Cached by ``sys.path``, since searching all distributions takes some 50 ms."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, owner(entry))):
        found.setdefault(entry.name, []).append(entry)
    return found


def owner(entry: EntryPoint) -> str:
    """Name and version of the distribution that registers it."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"


def load_method(entry: EntryPoint) -> Method:
    """The registered method, with its default settings.

    Raises:
        InputError: it cannot be imported or made, is no :class:`Method`, or calls itself otherwise.
    """
    which = f"method {entry.name!r} of {owner(entry)} ({entry.value})"
    try:
        cls = entry.load()
    except Exception as error:  # Of whatever kind: it is their code.
        raise InputError(
            f"{which} cannot be imported: {type(error).__name__}: {error}; install what it needs, or uninstall it"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise InputError(f"{which} is {cls!r}; expected a subclass of dit_mlflow.methods.Method")
    try:
        made = cls()
    except Exception as error:
        raise InputError(
            f"{which} cannot be made: {type(error).__name__}: {error}; expected that every setting has a default, and "
            "that estimate() is there"
        ) from error
    if getattr(made, "name", None) != entry.name:
        raise InputError(f"{which} calls itself {getattr(made, 'name', None)!r}; expected the entry point's name")
    return made
