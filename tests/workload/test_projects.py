from __future__ import annotations

from pathlib import Path

import pytest

from dit_mlflow import WorkloadError, load_workload, train
from dit_mlflow.workload import WorkloadReference, load_recorded, projects


def test_settings_are_converted_and_recorded() -> None:
    workload = load_workload("projects/mnist", model="logreg", n_train="64", corrupt="0.25", lr="0.5")
    assert workload.num_samples == 64
    assert len(workload.corrupted) == 16
    assert workload.reference == "projects/mnist"
    assert workload.settings["lr"] == 0.5
    assert workload.settings["epochs"] == 21


def test_recorded_settings_build_the_same_workload() -> None:
    first = load_workload("projects/mnist", preset="paper", model="logreg")
    second = load_workload("projects/mnist", **first.settings)
    assert second.settings == first.settings
    assert second.settings["lr"] == 0.003


def test_module_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = load_workload("workloads:digits_workload", epochs=2)
    assert workload.plan.num_steps == 6


def test_folder_below_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "projects" / "mnist"
    project.mkdir(parents=True)
    (project / "__init__.py").write_text(
        "from workloads import digits_workload\ndef workload(epochs: int = 5):\n"
        "    return digits_workload(epochs=epochs)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_workload("projects/mnist", epochs="4").epochs == 4


@pytest.mark.parametrize("reference", ["projects/mnist", "./projects/mnist/"])
def test_ready_projects_are_found_from_anywhere(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder without projects, and not where it is unclear which is meant."""
    monkeypatch.chdir(tmp_path)
    here = load_recorded(WorkloadReference(reference=reference, settings={"n_train": 64}), tmp_path)
    assert here.num_samples == 64
    (tmp_path / "projects" / "mnist").mkdir(parents=True)
    (tmp_path / "projects" / "mnist" / "__init__.py").write_text("raise AssertionError('this is run')")
    with pytest.raises(WorkloadError, match="the current folder has one of that name; nothing was run"):
        load_recorded(WorkloadReference(reference=reference, settings={"n_train": 64}), tmp_path)


def test_a_wheel_has_the_projects_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As hatchling lays them: ``dit_mlflow/_projects``, before any folder that stands beside the package."""
    for folder in ("dit_mlflow/_projects/mnist", "projects/foreign"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    monkeypatch.setattr(projects, "__file__", str(tmp_path / "dit_mlflow" / "workload" / "projects.py"))
    assert projects.ready_projects() == {"projects/mnist": tmp_path / "dit_mlflow" / "_projects" / "mnist"}


def test_modules_of_a_project_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders of the same name, each with a module beside it."""
    for epochs in (4, 6):
        project = tmp_path / str(epochs) / "mine"
        project.mkdir(parents=True)
        (project / "numbers_of_mine.py").write_text(f"EPOCHS = {epochs}\n")
        (project / "__init__.py").write_text(
            "from workloads import digits_workload\nfrom .numbers_of_mine import EPOCHS\n"
            "def workload():\n    return digits_workload(epochs=EPOCHS)\n"
        )
        monkeypatch.chdir(tmp_path / str(epochs))
        assert load_workload("mine").epochs == epochs


@pytest.mark.parametrize(
    ("reference", "settings", "message"),
    [
        ("projects/nothing", {}, r"not found: no __init__\.py in .*ready ones: .*projects/mnist"),
        ("no.such.module:f", {}, "cannot import"),
        ("workloads:nothing", {}, "has no function 'nothing'"),
        ("workloads:datasets", {}, "returned a tuple; expected a Workload"),
        ("projects/mnist", {"modle": "dnn"}, "no setting 'modle'; it takes: model, preset"),
        ("projects/mnist", {"model": "svm"}, "setting model='svm'"),
        ("projects/mnist", {"epochs": "many"}, "setting epochs='many'"),
        ("projects/mnist", {"corrupt": "2"}, "corrupt is 2.0"),
        ("projects/mnist", {"l2": "-1"}, "l2 is -1.0; expected 0 or more"),
        ("projects/mnist", {"momentum": "2"}, "momentum is 2.0; expected 0 or more, and less than 1"),
        ("projects/mnist", {"n_train": "5000"}, "5512 samples were asked"),
    ],
)
def test_what_cannot_be_used_is_named(reference: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        load_workload(reference, **settings)


def test_settings_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of our own functions' arguments."""
    names = ["reference", "factory", "settings", "directory", "trusted", "workload"]
    source = ", ".join(f"{name}: int = 1" for name in names)
    (tmp_path / "named_settings.py").write_text(
        "from dit_mlflow import Workload\n"
        "from workloads import digits_workload\n"
        f"def workload({source}) -> Workload:\n"
        f"    return digits_workload(epochs=reference + trusted)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = {name: str(number) for number, name in enumerate(names)}
    workload = load_workload("named_settings:workload", **given)
    assert workload.settings == {name: number for number, name in enumerate(names)}
    assert workload.epochs == 4
    recorded = train(workload, tmp_path / "record" / "t").manifest.workload
    assert recorded is not None
    again = load_recorded(recorded, tmp_path / "record" / "t", trusted=True)
    assert (again.settings, again.epochs) == (workload.settings, 4)
