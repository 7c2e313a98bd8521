"""A record is data: hostile references, and the flows of those who trust their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result
from workloads import digits_workload

from dit_mlflow import load_workload, train
from dit_mlflow.cli import cli
from dit_mlflow.errors import UntrustedError, WorkloadError
from dit_mlflow.tracking.store.artifacts import log_trajectory
from dit_mlflow.workload import WorkloadReference, consent, load_recorded
from dit_mlflow.workload.projects import ready_projects

MINE = f"{__name__}:mine"
EVIL = """
from pathlib import Path
from dit_mlflow import Workload
Path({marker!r}).touch()
def f(**settings) -> Workload: ...
workload = f
"""


def mine(size: int = 3) -> Any:
    return digits_workload()


def name_workload(folder: Path, reference: str, /, **settings: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["workload"] = {"reference": reference, "settings": settings}
    path.write_text(json.dumps(manifest))


class Bundle:
    """A folder as it may be downloaded: a record in ``run/artifacts``, hostile code in it, beside it and above it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, folder.parent / "marker"
        self.record = folder / "run" / "artifacts" / "trajectory"
        train(digits_workload(epochs=1), self.record)
        code = EVIL.format(marker=str(self.marker))
        for name in ("evilmodule.py", "projects/evil/__init__.py", "projects/mnist/__init__.py", "evilpackage/sub.py"):
            self.write(folder / name, code)
        self.write(folder / "run" / "artifacts" / "code" / "__init__.py", code)
        self.write(self.record / "__init__.py", code)
        self.write(self.record / "inner.py", code)
        (folder / "run" / "artifacts" / "link").symlink_to(folder / "projects" / "evil")

    def write(self, path: Path, code: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)

    def verify(self, reference: str, /, *arguments: str, **settings: Any) -> Result:
        name_workload(self.record, reference.format(bundle=self.folder, record=self.record), **settings)
        return CliRunner().invoke(cli, ["verify", str(self.record), *arguments])


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    found = Bundle(tmp_path / "bundle")
    monkeypatch.chdir(found.folder)
    # As "python -m dit_mlflow.cli" starts, and as earlier calls leave it.
    monkeypatch.setattr(sys, "path", [str(found.folder), "", *sys.path])
    return found


HOSTILE: dict[str, dict[str, Any]] = {
    "evilmodule:f": {},
    "evilpackage.sub:f": {},
    "run.artifacts.trajectory.inner:f": {},
    "projects/evil": {},
    "projects/mnist": {},  # The bundle has one of this name.
    "projects/mnist/../evil": {},
    "../bundle/projects/evil": {},
    "run/artifacts/code": {},
    "run/artifacts/link": {},
    "run/artifacts/trajectory": {},
    "{bundle}/projects/evil": {},
    "{bundle}/run/artifacts/code": {},
    "{bundle}/run/artifacts/link": {},
    "{record}": {},
    "{record}/../trajectory": {},
    "dit_mlflow:load_workload": {"reference": "evilmodule:f"},
    "dit_mlflow.workload.projects:load_workload": {"reference": "projects/evil"},
    "dit_mlflow.workload.projects:find_factory": {"reference": "evilmodule:f"},
    "dit_mlflow.workload.consent:load_recorded": {"recorded": {"reference": "evilmodule:f", "settings": {}}},
    "runpy:run_path": {"path_name": "evilmodule.py"},
    "importlib:import_module": {"name": "evilmodule"},
    "os:remove": {"path": "evilmodule.py"},
}


@pytest.mark.parametrize("reference", HOSTILE)
def test_a_hostile_reference_runs_nothing_and_fails(reference: str, bundle: Bundle) -> None:
    before = set(sys.modules)
    found = bundle.verify(reference, **HOSTILE[reference])
    assert found.exit_code == 1, found.output
    assert "name it: --workload " in found.stderr
    assert not bundle.marker.exists()
    assert not [name for name in set(sys.modules) - before if "evil" in name or "project" in name]


ALLOWED_BY_TRUST = ("{bundle}/projects/evil", "projects/mnist")
"""An absolute folder that is not beside the record; and the package's own workload, whatever the bundle has."""


@pytest.mark.parametrize("reference", [name for name in HOSTILE if name not in ALLOWED_BY_TRUST])
def test_consent_does_not_reach_the_current_folder_nor_the_record(reference: str, bundle: Bundle) -> None:
    found = bundle.verify(reference, "--trust-workload", **HOSTILE[reference])
    assert found.exit_code == 1, found.output
    assert not bundle.marker.exists()
    assert (bundle.folder / "evilmodule.py").exists()


def test_consent_runs_what_lies_where_the_user_looks(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "evilmodule.py").write_text(
        "from dit_mlflow import Workload\nfrom workloads import digits_workload\n"
        "def f() -> Workload:\n    return digits_workload(epochs=1)\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "code")])
    found = bundle.verify("evilmodule:f", "--trust-workload")
    assert (found.exit_code, found.stdout.splitlines()[-1]) == (0, "Everything holds.")
    assert not bundle.marker.exists()
    del sys.modules["evilmodule"]


def test_the_packages_own_is_built_from_the_package(bundle: Bundle) -> None:
    recorded = WorkloadReference(reference="projects/mnist", settings={"n_train": 32})
    with pytest.raises(UntrustedError, match=r"has one of that name; nothing was run.*if the package's: --trust"):
        load_recorded(recorded, bundle.record)
    assert load_recorded(recorded, bundle.record, trusted=True).num_samples == 32
    assert not bundle.marker.exists()
    assert set(ready_projects()) >= {"projects/mnist", "projects/digits"}


def test_loaders_are_no_workloads_though_the_user_names_one(bundle: Bundle) -> None:
    """Their settings, out of the record, would name what is run."""
    for reference in ("dit_mlflow:load_workload", "dit_mlflow.workload.projects:load_workload"):
        found = bundle.verify(reference, "--workload", reference, reference="evilmodule:f")
        assert found.exit_code == 1
        assert "is part of dit_mlflow.workload; name the workload" in found.stderr
    assert not bundle.marker.exists()


def test_ones_own_workload_is_named_as_the_message_says(store: str, tmp_path: Path) -> None:
    """Recorded here by a name; then asked about by a command that the error gives."""
    train(load_workload(MINE, size=5), tmp_path / "t")
    with mlflow.start_run() as run:
        log_trajectory(tmp_path / "t")
    asked = ["influence", "--training-run", run.info.run_id, "--windows", "1", "--ground-truth", "none", "--trust", "0"]
    refused = CliRunner().invoke(cli, asked)
    assert refused.exit_code == 1
    assert f"name it: --workload {MINE}, or" in refused.stderr
    assert "for Workload" not in refused.stderr
    answered = CliRunner().invoke(cli, [*asked, "--workload", MINE])
    assert answered.exit_code == 0, answered.output
    # A workload that has moved is found where the user says it is now.
    other = CliRunner().invoke(cli, [*asked, "--workload", "elsewhere:mine"])
    assert "cannot import 'elsewhere'" in other.stderr


@pytest.mark.parametrize("reference", [":f", "..x:f", "a b:f", "\0", "x" * 5000, "C:\\x", ""])
def test_names_of_nothing_are_refused(reference: str, tmp_path: Path) -> None:
    for trusted in (False, True):
        with pytest.raises(WorkloadError):
            load_recorded(WorkloadReference(reference=reference, settings={}), tmp_path, trusted)


def test_naming_a_workload_of_elsewhere_does_not_open_the_current_folder(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may have a module of the name of any library that is imported later."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "ofmine.py").write_text("def f():\n    import evilmodule\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path[2:] if entry] + [str(tmp_path / "code")])
    with pytest.raises(WorkloadError, match="No module named 'evilmodule'"):
        load_workload("ofmine:f")
    assert str(bundle.folder) not in sys.path
    assert not bundle.marker.exists()
    del sys.modules["ofmine"]


def test_what_the_packages_own_import_is_not_looked_for_in_the_current_folder(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optional library that is not installed, of which the bundle has one."""
    (tmp_path / "ready").mkdir()
    (tmp_path / "ready" / "__init__.py").write_text("def workload():\n    import evilmodule\n")
    monkeypatch.setattr(consent, "ready_projects", lambda: {"projects/ready": tmp_path / "ready"})
    found = bundle.verify("projects/ready")
    assert "No module named 'evilmodule'" in found.output
    assert not bundle.marker.exists()
