"""The errors a user can meet. Each message says what came, what was expected and how to fix it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from dit_mlflow.told import masked, text_of, told


class DitError(Exception):
    """Base of every error that dit_mlflow raises on purpose.

    What it quotes, of a record or of another error, may hold passwords, escapes or megabytes: see
    :func:`dit_mlflow.told.told`.
    """

    def __init__(self, *details: object) -> None:
        super().__init__(*(told(detail) if isinstance(detail, str) else detail for detail in details))


class InputError(DitError, ValueError):
    """An argument or setting has a value that cannot be used."""


class WorkloadError(DitError):
    """A workload cannot be found, built, or used as it stands."""


class UntrustedError(WorkloadError):
    """A record names code that the user neither named nor consented to run; none of it was run."""


class TrajectoryError(DitError):
    """A trajectory is missing, damaged, or does not belong to the workload given."""


class TrainingError(DitError):
    """Training cannot go on (a loss that is not a number, say); what was recorded is kept."""


class UnsupportedError(DitError):
    """The training does something through which influence cannot be computed."""


def cause(error: Exception) -> Exception | None:
    """``error`` as the cause of another, unless a traceback would show a password with it."""
    return error if masked(str(error)) == str(error) else None


@contextmanager
def masked_errors() -> Iterator[None]:
    """Errors of other libraries leave it as they are, but without passwords in their messages and those before them.

    Raises:
        DitError: in place of one whose message cannot be changed.
    """
    try:
        yield
    except Exception as error:  # Any kind: stores raise what their libraries raise.
        if not _mask(error):
            raise DitError(f"{type(error).__name__}: {error}") from None
        seen: BaseException = error
        while before := seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__):
            if not _mask(before):
                seen.__cause__, seen.__context__, seen.__suppress_context__ = None, None, True
                break
            seen = before
        raise


def _mask(error: BaseException) -> bool:
    """Mask the parts of its message; whether nothing is left to hide."""
    error.args = tuple(masked(part) if isinstance(part, str) else part for part in error.args)
    for name in ("message", "filename", "filename2", "strerror"):
        if isinstance(part := getattr(error, name, None), str) and masked(part) != part:
            setattr(error, name, masked(part))
    return masked(str(error)) == str(error)


def checked_path(path: object) -> Path:
    """``path`` as a path; raises :class:`InputError` for what can be none: bytes, NUL, a name that is too long."""
    try:
        found = Path(cast("str", path))
        os.lstat(found)
    except (TypeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            return found
        shown = told(repr(path) if isinstance(path, str) else text_of(path), 200)
        raise InputError(f"{shown} is no path: {first_line(error)[:200]}; expected a str or a Path") from None
    return found


def first_line(error: BaseException) -> str:
    """The first line of its message; torch's go on with stacks and links."""
    return str(error).strip().partition("\n")[0]
