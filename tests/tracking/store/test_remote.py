"""What is downloaded from a remote store, and what is said when that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

import mlflow
import numpy as np
import pytest
import stores
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from stores import Start, Store, tracking
from workloads import digits_workload

import dit_mlflow.recording.writer as writer_module
from dit_mlflow import InputError, Trajectory, TrajectoryError, Window, track, train
from dit_mlflow.tracking import load_trajectory, log_trajectory
from dit_mlflow.tracking.store import remote as remote_module

WINDOW = Window(100, 121)


@pytest.fixture
def downloaded(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """Bytes that went into the cache since last asked."""
    caplog.set_level(logging.INFO, "dit_mlflow.tracking.store.cache")

    def count() -> int:
        records = [record for record in caplog.records if record.name == "dit_mlflow.tracking.store.cache"]
        caplog.clear()
        return sum(record.args[0] for record in records)  # type: ignore[index, misc, arg-type]

    return count


def logged(trajectory: Trajectory) -> str:
    with mlflow.start_run() as run:
        log_trajectory(trajectory)
    return str(run.info.run_id)


def test_a_window_downloads_its_own_files_and_no_others_and_once(
    remote_store: Store,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    downloaded: Callable[[], int],
) -> None:
    monkeypatch.setattr(writer_module, "FLUSH_BYTES", 10_000)
    workload = digits_workload(epochs=100)
    here = train(workload, tmp_path / "t")
    run_id = logged(here)
    there = load_trajectory(run_id)
    assert not cache.exists()
    scores = track(there, workload, [WINDOW]).scores
    np.testing.assert_array_equal(scores, track(here, workload, [WINDOW]).scores)

    entries = here.manifest.files
    name_of = {entry.sha256: name for name, entry in entries.items()}
    fetched = {name_of[path.name] for path in cache.iterdir()}
    total, amount = sum(entry.size for entry in entries.values()), downloaded()
    assert amount == sum(entries[name].size for name in fetched)
    print(f"window {WINDOW}: {amount} of {total} bytes, {len(fetched)} of {len(entries)} files")
    # The first two checkpoints and the step between them show that the workload is the recorded one.
    needed = {part.file for part in here.manifest.steps if part.start == 0 or (part.start < 121 and part.stop > 100)}
    for checkpoint in here.manifest.checkpoints:
        needed |= set(checkpoint.files) if checkpoint.step in (0, 1, 100, 121) else set()
    assert fetched == needed
    assert len(entries) > 30
    assert amount < total / 4

    again = load_trajectory(run_id)
    np.testing.assert_array_equal(track(again, workload, [WINDOW]).scores, scores)
    assert downloaded() == 0
    damaged = cache / entries[sorted(fetched)[0]].sha256
    damaged.write_bytes(b"no longer " + damaged.read_bytes()[10:])
    np.testing.assert_array_equal(track(load_trajectory(run_id), workload, [WINDOW]).scores, scores)
    assert downloaded() == damaged.stat().st_size
    # All of it is there when all of it is asked for, also where the cache was emptied in between.
    for path in cache.iterdir():
        path.unlink()
    assert again.verify(workload).max_drift == 0
    assert downloaded() == total


def test_a_local_artifact_folder_is_read_in_place(store: str, tmp_path: Path, cache: Path) -> None:
    run_id = logged(train(digits_workload(), tmp_path / "t"))
    trajectory = load_trajectory(run_id)
    assert trajectory.directory == tmp_path / "artifacts" / run_id / "artifacts" / "trajectory"
    trajectory.verify(digits_workload())
    assert not cache.exists()


def delete(run_id: str, name: str) -> None:
    get_artifact_repository(mlflow.get_run(run_id).info.artifact_uri).delete_artifacts(f"trajectory/{name}")


def replace(run_id: str, path: Path, change: Callable[[bytes], bytes]) -> None:
    changed = path.parent.parent / "changed" / path.name
    changed.parent.mkdir()
    changed.write_bytes(change(path.read_bytes()))
    MlflowClient().log_artifact(run_id, str(changed), "trajectory")


BEFORE_LOADING: dict[str, tuple[Callable[[str, Path], None], str]] = {
    "missing": (lambda run, path: delete(run, path.name), "{name} of run {run} .*: missing; log the trajectory again"),
    "cut": (
        lambda run, path: replace(run, path, lambda content: content[:-1]),
        r"{name} of run {run} .*: \d+ bytes, recorded \d+; log the trajectory again",
    ),
    "manifest missing": (
        lambda run, path: delete(run, "manifest.json"),
        "manifest.json of run {run} .*: missing; expected a training run",
    ),
    "manifest cut": (
        lambda run, path: replace(run, path.with_name("manifest.json"), lambda content: content[:-1]),
        "manifest.json of run {run} .* is not a trajectory manifest",
    ),
}
WHEN_READ: dict[str, tuple[Callable[[str, Path], None], type[Exception], str]] = {
    "changed": (
        lambda run, path: replace(run, path, lambda content: content[:-1] + b"?"),
        TrajectoryError,
        "{name} of run {run} .*: SHA-256 .* arrived, recorded",
    ),
    "grown": (
        lambda run, path: replace(run, path, lambda content: content * 2),
        TrajectoryError,
        r"{name} of run {run} .*: \d+ bytes arrived, recorded \d+",
    ),
    "removed": (
        lambda run, path: delete(run, path.name),
        InputError,
        "cannot read trajectory/{name} of run {run} .*404.*; check that the store can be reached",
    ),
}


def checked(store: Store, message: str, run_id: str, path: Path) -> str:
    """The message with its names filled in, and the store's."""
    uri = "s3://dit/artifacts/" if store.artifacts else "mlflow-artifacts:/"
    return message.format(name=path.name, run=run_id).replace(" .*", rf" \(.*\) in {uri}.*", 1)


@pytest.mark.parametrize("name", BEFORE_LOADING)
def test_damage_in_the_store_is_named_without_a_download(
    name: str, remote_store: Store, tmp_path: Path, cache: Path
) -> None:
    damage, message = BEFORE_LOADING[name]
    run_id = logged(train(digits_workload(), tmp_path / "t"))
    path = max((tmp_path / "t").glob("checkpoints*"))
    damage(run_id, path)
    with pytest.raises(TrajectoryError, match=checked(remote_store, message, run_id, path)):
        load_trajectory(run_id)
    assert not cache.exists()


@pytest.mark.parametrize("name", WHEN_READ)
def test_damage_after_loading_is_named(name: str, remote_store: Store, tmp_path: Path, cache: Path) -> None:
    damage, error, message = WHEN_READ[name]
    run_id = logged(train(digits_workload(), tmp_path / "t"))
    trajectory = load_trajectory(run_id)
    path = max((tmp_path / "t").glob("checkpoints*"))
    damage(run_id, path)
    with pytest.raises(error, match=checked(remote_store, message, run_id, path)):
        trajectory.verify(digits_workload())
    assert trajectory.manifest.files[path.name].sha256 not in {found.name for found in cache.iterdir()}


def test_a_manifest_of_any_size_is_not_downloaded(
    remote_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = logged(train(digits_workload(), tmp_path / "t"))
    monkeypatch.setattr(remote_module, "MANIFEST_BYTES", 100)
    with pytest.raises(TrajectoryError, match=r"manifest\.json of run .*: \d{4} bytes; expected 100 at most"):
        load_trajectory(run_id)


def test_an_artifact_store_that_refuses_or_is_gone_is_named(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("s3")  # skips the test where it cannot be
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    message = r"cannot read {} of run \w+ \(.*\) in s3://dit/artifacts/.*{}.*; check that the store can be reached"
    workload = digits_workload()
    with stores.s3(tmp_path) as store, tracking(store, tmp_path, monkeypatch):
        run_id = logged(train(workload, tmp_path / "t"))
        trajectory = load_trajectory(run_id)
        # From now on this endpoint checks who asks; nobody with our key was ever made.
        endpoint = store.environment["MLFLOW_S3_ENDPOINT_URL"]
        urlopen(Request(f"{endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST")).close()
        with pytest.raises(
            InputError, match=message.format("trajectory/", "Access Key Id you provided does not exist")
        ):
            load_trajectory(run_id)
        with pytest.raises(InputError, match=message.format(r"trajectory/\S+", "403")):
            trajectory.verify(workload)
    with tracking(store, tmp_path, monkeypatch, "gone"):
        with pytest.raises(InputError, match=message.format("trajectory/", "Could not connect")):
            load_trajectory(run_id)
        with pytest.raises(InputError, match=message.format(r"trajectory/\S+", "Could not connect")):
            trajectory.verify(workload)


def test_a_tracking_server_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(f"http://user:secret@127.0.0.1:{stores.free_port()}")
    try:
        with pytest.raises(InputError, match=r"cannot ask the tracking URI http://user:\*\*\*@127") as caught:
            load_trajectory("0" * 32)
    finally:
        mlflow.set_tracking_uri(None)
    assert "check that it can be reached" in str(caught.value)


def test_a_database_is_named_without_its_password(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracking(start("postgresql"), tmp_path, monkeypatch, tmp_path.name), pytest.raises(InputError) as caught:
        load_trajectory("0" * 32)
    assert (
        "no run '00000000000000000000000000000000' at the tracking URI postgresql+psycopg2://dit:***@127.0.0.1"
        in str(caught.value)
    )
    assert "secret" not in str(caught.value)
