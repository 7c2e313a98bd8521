"""Fresh processes in milliseconds: forked from one that has imported, once, what takes seconds to import.

That one is started by the first test that asks, and keeps the environment variables of that moment: what a test sets
must be given to the function as an argument.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, TypeVar

import torch._dynamo

from dit_mlflow.tracking.recording import record_trajectory

T = TypeVar("T")
READY_SECONDS = 120.0


def context() -> ForkServerContext:
    """Where the processes come from."""
    chosen = multiprocessing.get_context("forkserver")
    # The first optimizer imports torch's compiler.
    chosen.set_forkserver_preload([module.__name__ for module in (torch._dynamo, record_trajectory)])
    return chosen


def answer(function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def running(function: Callable[..., None], *arguments: Any) -> Iterator[ForkServerProcess]:
    """A process that runs ``function(ready, *arguments)``, from when it has called ``ready()``; killed in the end."""
    ready = context().Event()
    process = context().Process(target=function, args=(ready.set, *arguments))
    process.start()
    try:
        assert ready.wait(READY_SECONDS)
        yield process
    finally:
        process.kill()
        process.join()
