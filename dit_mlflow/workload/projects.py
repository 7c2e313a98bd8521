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

from dit_mlflow.errors import DitError, WorkloadError, checked_path
from dit_mlflow.told import text_of
from dit_mlflow.workload.workload import Workload

WorkloadFactory = Callable[..., Workload]


class WorkloadReference(BaseModel):
    """How a workload is found again: its reference and its settings, as JSON holds them."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    reference: str
    settings: dict[str, Any]


def load_workload(reference: str, /, **settings: Any) -> Workload:
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
    return build(find_factory(reference), reference, settings)


def build(factory: WorkloadFactory, reference: str, settings: Mapping[str, Any]) -> Workload:
    """Check the settings, call the factory, and fill in ``reference`` and the resolved ``settings``."""
    resolved = check_settings(factory, reference, settings)
    try:
        workload = factory(**resolved)
    except DitError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"workload {reference!r} cannot be built with {text_of(dict(settings))}: {error}"
        ) from error
    if not isinstance(workload, Workload):
        raise WorkloadError(f"workload {reference!r} returned a {type(workload).__name__}; expected a Workload")
    return dataclasses.replace(workload, reference=reference, settings={**resolved, **workload.settings})


def find_factory(reference: str, working_directory: bool = True) -> WorkloadFactory:
    """The function behind a workload reference.

    Args:
        reference: see :func:`load_workload`.
        working_directory: whether a module may be in the working directory; if not, ``sys.path`` is left as it is.

    Raises:
        WorkloadError: there is none, or it is one that loads workloads by their names.
    """
    if not isinstance(reference, str):
        raise WorkloadError(
            f"the workload's reference is {text_of(reference, 200)}, a {type(reference).__name__}; expected a str: a "
            "project folder, or 'package.module:factory'"
        )
    module_name, colon, name = reference.partition(":")
    if not colon:
        return factory_in(_project_folder(reference), reference)
    module_of(reference)
    # Only for a module that is there: else a downloaded folder would be searched before the installed packages.
    if working_directory and _is_here(module_name.partition(".")[0]) and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise WorkloadError(
            f"workload {reference!r}: cannot import {module_name!r}: {error}; modules are looked for in the "
            "working directory (under mlflow run: the project's) and in PYTHONPATH; add its folder there, as an "
            "absolute path: PYTHONPATH=$PWD"
        ) from error
    factory = _function(module, name, reference)
    # A loader's settings, which may come out of a record, would name what is run.
    if str(getattr(factory, "__module__", "")).startswith(__name__.rpartition(".")[0]):
        raise WorkloadError(f"workload {reference!r} is part of dit_mlflow.workload; name the workload that it loads")
    return factory


def _is_here(package: str) -> bool:
    """Whether the working directory has a module or a package of this name."""
    return (Path.cwd() / package).is_dir() or any(Path.cwd().glob(f"{package}.*"))


def factory_in(folder: Path, reference: str) -> WorkloadFactory:
    """The function of a project folder; raises :class:`WorkloadError` if there is none."""
    return _function(_import_folder(folder), "workload", reference)


def module_of(reference: str) -> str:
    """The module of ``package.module:factory``; raises :class:`WorkloadError` if that is no name of one."""
    name = reference.partition(":")[0]
    if not all(part.isidentifier() for part in name.split(".")):
        raise WorkloadError(f"workload {reference!r}: {name!r} is not the name of a module")
    return name


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
            raise WorkloadError(f"workload {reference!r}, setting {name}={text_of(value, 200)!r}: {reason}") from error
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
    own, ready = checked_path(Path.cwd() / reference).resolve(), ready_projects()
    folder = own if (own / "__init__.py").is_file() else ready.get(PurePath(reference).as_posix())
    if folder is None:
        raise WorkloadError(
            f"workload {reference!r} not found: no __init__.py in {own}; expected a project folder (ready ones: "
            f"{', '.join(ready) or 'none'}) or 'package.module:factory'"
        )
    return folder.resolve()


def _function(module: ModuleType, name: str, reference: str) -> WorkloadFactory:
    factory = getattr(module, name, None)
    if not callable(factory):
        raise WorkloadError(f"workload {reference!r}: {module.__name__} has no function {name!r}")
    return factory


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
