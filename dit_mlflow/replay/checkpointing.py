"""Gradient checkpointing (``torch.utils.checkpoint``) is skipped where a replay calls the model.

A checkpointed part runs again when the gradient is taken. By then a replayed model no longer holds the values of the
call, and the older, reentrant form cannot be differentiated twice. Without checkpointing, values and gradients are the
same: torch runs the part the second time under the random state of the first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest import mock

from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint


class WithoutRecomputation:
    """A context in which this thread's checkpointed functions are plain calls, whichever way they were imported.

    Inside it, two public classes are patched, once for all threads:

    - ``CheckpointFunction`` is the reentrant form: its ``apply`` calls the function plainly;
    - the other form sets ``saved_tensors_hooks`` of its own: these are skipped; hooks of others are set.

    Memory is that without checkpointing. A torch that works otherwise gives an error, not wrong numbers: a part that
    runs again finds a model without values (:meth:`dit_mlflow.replay.substitution.Substitution.withdraw`), and the
    reentrant form refuses ``torch.autograd.grad``. The same holds for checkpointing by other libraries.
    """

    def __init__(self) -> None:
        self._here = ContextVar("without recomputation", default=False)
        self._lock = threading.Lock()
        self._inside = 0
        self._patches = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = self._here.set(True)
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._patch()
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._patches.close()
            self._here.reset(before)

    def _patch(self) -> None:
        apply, enter = checkpoint.CheckpointFunction.apply, saved_tensors_hooks.__enter__
        leave = saved_tensors_hooks.__exit__

        def call(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return function(*args) if self._here.get() else apply(function, preserve_rng_state, *args)

        def enter_unless_checkpointing(hooks: Any) -> None:
            if self._here.get() and type(hooks).__module__ == checkpoint.__name__:
                hooks.left_out = True
            else:
                enter(hooks)

        def leave_what_was_entered(hooks: Any, *error: Any) -> None:
            if not getattr(hooks, "left_out", False):
                leave(hooks, *error)

        for cls, name, value in (
            (checkpoint.CheckpointFunction, "apply", staticmethod(call)),
            (saved_tensors_hooks, "__enter__", enter_unless_checkpointing),
            (saved_tensors_hooks, "__exit__", leave_what_was_entered),
        ):
            self._patches.enter_context(mock.patch.object(cls, name, value))


WITHOUT_RECOMPUTATION = WithoutRecomputation()
