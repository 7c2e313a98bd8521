"""The resources of retrainings: processes, machines, memory, and a folder for finished parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib

from dit_mlflow.errors import InputError


@dataclass(frozen=True)
class Effort:
    """The resources of retrainings.

    Attributes:
        jobs: number of worker processes, one thread each; ``None`` = this process, or as ``joblib.parallel_config``.
        backend: of joblib: ``loky`` (processes on this machine), ``dask`` or ``ray`` (machines; extras of these names);
            ``None`` = joblib's choice.
        folder: for finished parts, so that work continues after an interruption; ``None`` = nothing is kept.
        memory_budget: bytes for retrainings side by side, in each process.

    ``dask`` uses the current distributed client, or the scheduler in ``DASK_SCHEDULER_ADDRESS``, or starts ``jobs``
    processes (workers of your own cluster are faster without ``MALLOC_TRIM_THRESHOLD_``, which dask sets); ``ray`` uses
    the cluster in ``RAY_ADDRESS``, or starts one.

    Raises:
        InputError: a setting that cannot be used.
    """

    jobs: int | None = None
    backend: str | None = None
    folder: Path | None = None
    memory_budget: int = 2 * 2**30

    def __post_init__(self) -> None:
        if self.backend not in (None, "loky", "dask", "ray"):
            raise InputError(f"backend={self.backend!r}; expected loky, dask or ray")
        if self.jobs is not None and self.jobs < 1:
            raise InputError(f"jobs={self.jobs}; expected 1 or more worker processes")
        if self.memory_budget < 1:
            raise InputError(f"memory_budget={self.memory_budget}; expected a positive number of bytes")

    def configured(self) -> AbstractContextManager[Any]:
        """A context with joblib's settings."""
        if self.backend == "dask":
            return _dask(self.jobs or 1)
        if self.backend == "ray":
            return _ray(self.jobs or 1)
        if self.jobs is None and self.backend is None:
            return nullcontext()
        return joblib.parallel_config(backend=self.backend or "loky", n_jobs=self.jobs)


@contextmanager
def _dask(jobs: int) -> Iterator[None]:
    try:
        from distributed import Client, get_client
    except ImportError as error:
        raise InputError("backend='dask' needs dask.distributed: pip install 'dit-mlflow[dask]'") from error
    try:
        own = None
        get_client()
    except ValueError:
        address = os.environ.get("DASK_SCHEDULER_ADDRESS")
        own = Client(address) if address else _own_dask(jobs)
    try:
        with joblib.parallel_config(backend="dask", n_jobs=jobs):
            yield
    finally:
        if own is not None:
            own.close()


def _own_dask(jobs: int) -> Any:
    """A client of worker processes on this machine, without dask's ``MALLOC_TRIM_THRESHOLD_``.

    That setting returns memory to the system at once; a retraining takes and releases the same megabytes at every step,
    and would spend half of its time on page faults.
    """
    import dask
    from distributed import Client

    name = "distributed.nanny.pre-spawn-environ"
    environment = {key: value for key, value in dask.config.get(name).items() if not key.startswith("MALLOC_")}
    with dask.config.set({name: environment}):
        return Client(n_workers=jobs, threads_per_worker=1, dashboard_address=None)


@contextmanager
def _ray(jobs: int) -> Iterator[None]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise InputError("backend='ray' needs ray: pip install 'dit-mlflow[ray]'") from error
    own = not ray.is_initialized()
    if own:
        cpus = None if os.environ.get("RAY_ADDRESS") else jobs
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    register_ray()
    try:
        with joblib.parallel_config(backend="ray", n_jobs=jobs):
            yield
    finally:
        if own:
            ray.shutdown()
