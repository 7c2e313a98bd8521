"""Asks a store again that fails for a moment: a database that restarts, an answer that breaks off on its way.

MLflow itself repeats a request that no server takes, for minutes; not one whose answer breaks off, nor a database's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import IOBase
from typing import Any

from dit_mlflow.told import logger_of
from dit_mlflow.tracking.mlflow_internals import clients_through

FIRST_WAIT, TRIES = 0.1, 10
"""Seconds before the second try, doubled before each further one: 51 in all."""

QUIET = 4
"""Tries that fail without a word."""

_log = logger_of(__name__)

Asked = Callable[[], Any]
Passing = Callable[[BaseException], bool]


@contextmanager
def patient_stores() -> Iterator[None]:
    """Inside, MLflow's clients ask a database again that has answered before, and a server whose answer breaks off.

    A run that was made although the answer was lost is found again; other things that would be made twice are not asked
    for again.
    """
    patience = _Patience()
    with clients_through(lambda store: _PatientStore(store, patience), _patient_request):
        yield


def asked_again(ask: Asked, passing: Passing, instead: Asked = lambda: None) -> Any:
    """What ``ask`` returns; called up to :data:`TRIES` times, as long as what it raises is ``passing``.

    ``instead``: asked before ``ask`` is called again; what it returns, unless ``None``, is the answer.
    """
    asked = ask
    for number in range(TRIES):
        try:
            if (found := asked()) is not None or asked is ask:
                return found
            return ask()
        except Exception as error:  # MLflow wraps what its libraries raise.
            if number == TRIES - 1 or not passing(error):
                raise
            if number == QUIET:
                _log.warning("the store does not answer, and is asked again: %s", error)
        time.sleep(FIRST_WAIT * 2**number)
        asked = instead
    raise AssertionError


def broken_off(error: BaseException) -> bool:
    """Whether an answer broke off; not whether no server took the request, which MLflow has repeated already."""
    for seen in _chain(error):
        if _name(seen) in ("requests.exceptions.ChunkedEncodingError", "requests.exceptions.ConnectionError"):
            return not seen.args or _name(seen.args[0]) != "urllib3.exceptions.MaxRetryError"
    return False


def disconnected(error: BaseException) -> bool:
    """Whether a database ended the connection or took none; SQLite has none: its file is locked or damaged."""
    for seen in _chain(error):
        if _name(seen) in ("sqlalchemy.exc.OperationalError", "sqlalchemy.exc.InterfaceError"):
            return not _name(getattr(seen, "orig", None)).startswith("sqlite3.")
    return False


def made_at_once(error: BaseException) -> bool:
    """Whether another client made the same row of a database at the same moment; it is found if asked for again."""
    # A server tells no more than the text.
    return re.search("UniqueViolation|UNIQUE constraint failed|Duplicate entry", str(error)) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _name(found: object) -> str:
    # By name: neither library need be there.
    return f"{type(found).__module__}.{type(found).__name__}"


def _patient_request(request: Callable[..., Any]) -> Callable[..., Any]:
    def ask(method: str, url: str, *arguments: Any, **options: Any) -> Any:
        def once() -> Any:
            if isinstance(content := options.get("data"), IOBase):
                content.seek(0)  # The last try has read it.
            return request(method, url, *arguments, **options)

        return once() if url.endswith("/create") else asked_again(once, broken_off)

    return ask


class _Patience:
    """Asks stores. Before a database has answered at all, a wrong address or password is told at once."""

    def __init__(self) -> None:
        self._answered = False

    def ask(self, asked: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self.ask_or(lambda: None, self.disconnected, asked, *arguments, **options)

    def ask_or(
        self, instead: Asked, passing: Passing, asked: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Any:
        found = asked_again(partial(asked, *arguments, **options), passing, instead)
        self._answered = True
        return found

    def disconnected(self, error: BaseException) -> bool:
        return self._answered and disconnected(error)


class _PatientStore:
    """A tracking store of MLflow whose methods are :func:`asked_again`."""

    def __init__(self, store: Any, patience: _Patience) -> None:
        self._store, self._patience = store, patience

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return partial(self._patience.ask, found) if callable(found) and not name.startswith("create_") else found

    def create_run(self, experiment_id: str, user_id: str, start_time: int, tags: Any, run_name: str) -> Any:
        def passing(error: BaseException) -> bool:
            return self._patience.disconnected(error) or broken_off(error)

        def made() -> Any:
            """The run that was made in that millisecond with that name and these tags, if there is one."""
            from mlflow.entities import ViewType

            found = self._store.search_runs([experiment_id], f"attributes.start_time = {start_time}", ViewType.ALL)
            given = {tag.key: tag.value for tag in tags}.items()
            return next((r for r in found if r.info.run_name == run_name and given <= r.data.tags.items()), None)

        asked = (experiment_id, user_id, start_time, tags, run_name)
        return self._patience.ask_or(made, passing, self._store.create_run, *asked)
