"""Find a workload by reference, and check its settings before anything runs."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dit_mlflow.errors import DitError, WorkloadError
from dit_mlflow.workload.workload import Workload

WorkloadFactory = Callable[..., Workload]


class WorkloadReference(BaseModel):
    """How a workload is found again: its reference and its settings, as JSON holds them."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    reference: str
    settings: dict[str, Any]


def load_workload(reference: str, **settings: Any) -> Workload:
    """Build the workload that ``reference`` names.

    Args:
        reference: a project folder that exposes ``workload(**settings)``, such as ``"projects/mnist"`` (looked
            for below the working directory, then among the ready ones that come with the package), or
            ``"package.module:factory"``.
        settings: what the factory takes; strings are converted to the annotated types.

    Returns:
        The workload, with ``reference`` and the resolved ``settings`` (defaults included) filled in.

    Raises:
        WorkloadError: the reference or a setting cannot be used.
    """
    factory = find_factory(reference)
    resolved = check_settings(factory, reference, settings)
    try:
        workload = factory(**resolved)
    except DitError:
        raise
    except Exception as error:
        raise WorkloadError(f"workload {reference!r} cannot be built with {dict(settings)}: {error}") from error
    if not isinstance(workload, Workload):
        raise WorkloadError(f"workload {reference!r} returned a {type(workload).__name__}; expected a Workload")
    return dataclasses.replace(workload, reference=reference, settings={**resolved, **workload.settings})


def load_recorded(recorded: WorkloadReference, directory: Path) -> Workload:
    """Build the workload that a trajectory says it was recorded with.

    A record is trusted less than a user: the function it names must be annotated to return a :class:`Workload`, and
    must lie outside the record. Its module is imported all the same, so a record from elsewhere can name, and thereby
    run, a module of yours.

    Args:
        recorded: reference and settings.
        directory: where the trajectory is.

    Raises:
        WorkloadError: it cannot be used.
    """
    try:
        places = [place.resolve() for place in _places(recorded.reference)]
    except (OSError, ValueError) as error:
        raise WorkloadError(f"workload {recorded.reference[:99]!r} cannot be the name of anything: {error}") from error
    if any(place.is_relative_to(directory.resolve()) for place in places):
        raise WorkloadError(f"workload {recorded.reference!r} is code inside of the trajectory, which is not run")
    factory = find_factory(recorded.reference)
    try:
        returns = get_type_hints(factory).get("return")
    except (NameError, TypeError, AttributeError):
        returns = None
    if not (isinstance(returns, type) and issubclass(returns, Workload)):
        raise WorkloadError(
            f"the record names {recorded.reference!r} as its workload, which is not annotated to return one and is not "
            "called on a record's word alone: write '-> Workload' in its signature, or name it yourself (workload=…)"
        )
    return load_workload(recorded.reference, **recorded.settings)


def find_factory(reference: str) -> WorkloadFactory:
    """The function behind a workload reference; raises :class:`WorkloadError` if there is none."""
    _, colon, name = reference.partition(":")
    if colon:
        module_name = _module_name(reference)
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise WorkloadError(
                f"workload {reference!r}: cannot import {module_name!r}: {error}; modules are looked for in the "
                "working directory (under mlflow run: the project's) and in PYTHONPATH; add its folder there, as an "
                "absolute path: PYTHONPATH=$PWD"
            ) from error
    else:
        module, name = _import_folder(_project_folder(reference)), "workload"
    factory = getattr(module, name, None)
    if not callable(factory):
        raise WorkloadError(f"workload {reference!r}: {module.__name__} has no function {name!r}")
    return factory


def check_settings(factory: WorkloadFactory, reference: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` converted to the factory's annotated types, with its defaults added.

    Raises:
        WorkloadError: an unknown setting, or a value of the wrong type, named with what is allowed.
    """
    signature = inspect.signature(factory)
    hints = get_type_hints(factory)
    rest = [name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    unknown = [name for name in settings if name not in signature.parameters]
    if unknown and not rest:
        raise WorkloadError(
            f"workload {reference!r} has no setting {', '.join(map(repr, unknown))}; "
            f"it takes: {', '.join(signature.parameters)}"
        )
    converted = {}
    for name, value in settings.items():
        try:
            converted[name] = TypeAdapter(hints.get(name, Any)).validate_python(value)
        except ValidationError as error:
            reason = "; ".join(dict.fromkeys(detail["msg"] for detail in error.errors()))
            raise WorkloadError(f"workload {reference!r}, setting {name}={value!r}: {reason}") from error
    try:
        bound = signature.bind(**converted)
    except TypeError as error:
        raise WorkloadError(f"workload {reference!r}: {error}") from error
    bound.apply_defaults()
    resolved = dict(bound.arguments)
    for name in rest:
        resolved |= resolved.pop(name)
    return resolved


def ready_projects() -> dict[str, Path]:
    """Folders of the projects that come with the package, by reference: a wheel has them inside, a checkout beside."""
    package = Path(__file__).parents[1]
    inside = package / "_projects"
    folder = inside if inside.is_dir() else package.parent / "projects"
    return {f"projects/{source.parent.name}": source.parent for source in sorted(folder.glob("*/__init__.py"))}


def _project_folder(reference: str) -> Path:
    own, ready = (Path.cwd() / reference).resolve(), ready_projects()
    folder = own if (own / "__init__.py").is_file() else ready.get(PurePath(reference).as_posix())
    if folder is None:
        raise WorkloadError(
            f"workload {reference!r} not found: no __init__.py in {own}; expected a project folder (ready ones: "
            f"{', '.join(ready) or 'none'}) or 'package.module:factory'"
        )
    return folder.resolve()


def _module_name(reference: str) -> str:
    """The module of ``package.module:factory``, which may be in the working directory."""
    name = reference.partition(":")[0]
    if not all(part.isidentifier() for part in name.split(".")):
        raise WorkloadError(f"workload {reference!r}: {name!r} is not the name of a module")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return name


def _places(reference: str) -> list[Path]:
    """Paths of the code that a reference names, found without running it."""
    if ":" not in reference:
        return [_project_folder(reference)]
    package, *parts = _module_name(reference).split(".")
    loaded = sys.modules.get(package)
    spec = importlib.util.find_spec(package) if loaded is None else loaded.__spec__
    if spec is None:  # Not there, or the script that runs.
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    within = [folder.joinpath(*parts[: i + 1]) for folder in folders for i in range(len(parts))]
    return [*([Path(spec.origin)] if spec.origin and spec.has_location else []), *folders, *within]


def _import_folder(folder: Path) -> ModuleType:
    name, source = f"dit_mlflow_project_{folder.name}", (folder / "__init__.py").resolve()
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(source):
        return loaded
    # Submodules of another folder of that name would be found in place of this one's.
    for stale in [module for module in sys.modules if module.startswith(f"{name}.")]:
        del sys.modules[stale]
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise WorkloadError(f"project {folder} cannot be imported: {error!r}") from error
    return module
