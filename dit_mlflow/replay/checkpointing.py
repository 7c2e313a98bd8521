"""Gradient checkpointing (``torch.utils.checkpoint``) left out where a replay calls the model.

A checkpointed part runs again when the gradient is taken. By then a replayed model has given its values back, and the
older, reentrant form cannot be differentiated twice. Called once, plainly, the part gives the same values and the same
gradients: torch runs it the second time under the random state of the first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint


class WithoutRecomputation:
    """A context in which this thread's checkpointed functions are plain calls, whichever way they were imported.

    Two public classes are patched meanwhile, once for all threads:

    - the reentrant form is ``CheckpointFunction``, whose ``apply`` calls the function;
    - the other form knows what to run again by its own ``saved_tensors_hooks``, which are not set here; others' are.

    The memory is that without checkpointing. A torch that does it otherwise gives no wrong numbers: what runs again
    meets a model without values (:meth:`dit_mlflow.replay.substitution.Substitution.withdraw`), and what is reentrant
    refuses ``torch.autograd.grad``. The same holds for checkpointing by other libraries.
    """

    def __init__(self) -> None:
        self._here = ContextVar("without recomputation", default=False)
        self._lock = threading.Lock()
        self._inside = 0
        self._patches: list[_Patch] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = self._here.set(True)
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._patches = self._patch()
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    for patch in self._patches:
                        patch.undo()
            self._here.reset(before)

    def _patch(self) -> list[_Patch]:
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

        return [
            _Patch(checkpoint.CheckpointFunction, "apply", staticmethod(call)),
            _Patch(saved_tensors_hooks, "__enter__", enter_unless_checkpointing),
            _Patch(saved_tensors_hooks, "__exit__", leave_what_was_entered),
        ]


class _Patch:
    """Another attribute of a class, until it is undone."""

    def __init__(self, cls: type, name: str, value: object) -> None:
        self._cls, self._name = cls, name
        self._own, self._original = name in vars(cls), vars(cls).get(name)
        setattr(cls, name, value)

    def undo(self) -> None:
        if self._own:
            setattr(self._cls, self._name, self._original)
        else:
            delattr(self._cls, self._name)


WITHOUT_RECOMPUTATION = WithoutRecomputation()
