"""Shared by the benchmarks: the plain training to compare with, and CPU time measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from dit_mlflow import Trajectory, Workload

Work = Callable[[], object]


def plain_training(workload: Workload, trajectory: Trajectory) -> Work:
    """The recorded training as a plain PyTorch loop, on batches drawn beforehand."""
    batches = [workload.batch(trajectory.step(t).samples) for t in range(trajectory.num_steps)]
    assert workload.optimizer is not None
    make_optimizer = workload.optimizer

    def run() -> None:
        model = workload.build_model().train()
        optimizer = make_optimizer(model)
        for batch in batches:
            optimizer.zero_grad()
            workload.loss(model, batch).mean().backward()
            optimizer.step()

    return run


def cpu_seconds(work: Work) -> float:
    """CPU seconds of this process, all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def medians(work: Mapping[str, Work], repetitions: int) -> dict[str, float]:
    """Median CPU seconds of each kind of work, repeated in turns; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 1):
        for name, run in work.items():
            seconds = cpu_seconds(run)
            if repetition > 0:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}
