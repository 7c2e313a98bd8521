"""Turns signals that end a job into exceptions, at points where the store stays intact. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

PATIENCE = 10.0
"""Longest wait for a safe point, in seconds; further signals within it count as the same request."""

TELL = 0.5
"""Seconds of waiting after which a terminal is told why."""

_RETRY = 0.02

_UNSAFE = ("sqlalchemy", "mlflow.store", "alembic", "tqdm", "weakref", "_weakrefset")
"""Modules in which an exception would do harm: a transaction, or a bar, would keep its lock, a new database stay half
made, a callback swallow the exception."""

_IMPORTING = ("importlib",)
"""Modules in which an exception may be lost, and what it breaks off cannot be imported again."""


@contextmanager
def ending_on_signals(imports: bool = False) -> Iterator[None]:
    """Inside, the first SIGINT, SIGTERM or SIGHUP is an exception, which passes through the runs' context managers.

    The exception is ``KeyboardInterrupt``, or ``SystemExit`` with 128 + the signal's number. It is raised when the main
    thread is outside of code that must not be interrupted, after :data:`PATIENCE` seconds at the latest, and once more
    if it was swallowed. Signals within that time after the first are ignored: ``mlflow run`` sends SIGTERM to a process
    that got SIGINT from the terminal, and a run takes a moment to end. Signals ignored before (``nohup``) stay ignored.

    ``imports``: imports may be broken off too, which take seconds; not where one of them is needed to end a run.
    """
    endings = _Endings(imports)
    found = {number: signal.getsignal(number) for number in SIGNALS}
    taken = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, endings.receive)
    try:
        yield
    finally:
        endings.stop_waiting()
        for number, handler in taken.items():
            signal.signal(number, handler)


class _Endings:
    def __init__(self, imports: bool) -> None:
        self._imports = imports
        self._process = os.getpid()
        self._asked: int | None = None
        self._told = False
        self._since = 0.0
        self._waiting: tuple[object, ...] | None = None
        self._raised: BaseException | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A fork of the process has no runs to end.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self._asked is not None and now - self._since < PATIENCE:
            return
        # A new request also interrupts the handling of the first.
        self._asked, self._since, self._raised = number, now, None
        self._raise_or_wait(frame)

    def stop_waiting(self) -> None:
        """Restore the timer's former handler."""
        if self._waiting is not None:
            handler, delay, interval = self._waiting
            self._waiting = None
            signal.signal(signal.SIGALRM, handler)  # type: ignore[arg-type]
            signal.setitimer(signal.ITIMER_REAL, delay, interval)  # type: ignore[arg-type]

    def _raise_or_wait(self, frame: FrameType | None) -> None:
        assert self._asked is not None
        if _is_on_its_way(self._raised):
            self._look_again()
            return
        now, can_wait = time.monotonic(), hasattr(signal, "setitimer")
        unsafe = can_wait and _is_within(frame, _UNSAFE)
        importing = can_wait and _is_within(frame, _IMPORTING)
        if (unsafe or (importing and not self._imports)) and now - self._since < PATIENCE:
            if now - self._since > TELL and not self._told and os.isatty(2):
                self._told = True
                # Not by ``sys.stderr``, which may be in the middle of a line of its own.
                os.write(2, b"\nending when the store is in order\n")
            self._look_again()
            return
        self._raised = KeyboardInterrupt() if self._asked == signal.SIGINT else SystemExit(128 + self._asked)
        if unsafe or importing:
            # A callback may swallow it; then wait again.
            self._since = now
            self._look_again()
        else:
            self.stop_waiting()
        raise self._raised

    def _look_again(self) -> None:
        if self._waiting is None:
            self._waiting = (signal.getsignal(signal.SIGALRM), *signal.getitimer(signal.ITIMER_REAL))
            signal.signal(signal.SIGALRM, lambda _, frame: self._raise_or_wait(frame))
        signal.setitimer(signal.ITIMER_REAL, _RETRY)


def _is_on_its_way(raised: BaseException | None) -> bool:
    """Whether the main thread is in a ``finally``, ``except`` or ``__exit__`` because of this exception."""
    handled = sys.exc_info()[1]
    while raised is not None and handled is not None:
        if handled is raised:
            return True
        handled = handled.__context__
    return False


def _is_within(frame: FrameType | None, modules: tuple[str, ...]) -> bool:
    """Whether code of ``modules``, or a finalizer, is running."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or str(frame.f_globals.get("__name__", "")).startswith(modules):
            return True
        frame = frame.f_back
    return False
