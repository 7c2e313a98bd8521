"""A record is data: the workload that it names runs if it comes with the package, or if the user consents."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import get_type_hints

from dit_mlflow.command import option
from dit_mlflow.errors import UntrustedError, WorkloadError
from dit_mlflow.workload.projects import (
    WorkloadFactory,
    WorkloadReference,
    build,
    factory_in,
    find_factory,
    module_of,
    ready_projects,
)
from dit_mlflow.workload.workload import Workload


def load_recorded(recorded: WorkloadReference, directory: Path, trusted: bool = False) -> Workload:
    """Build the workload that a record says it was made with.

    Anyone may have written a record. One of the package's own workloads is built from the package. Any other is code
    from elsewhere: nothing of it is imported, unless the user trusts the record. Then a module is looked for among
    those loaded, in ``PYTHONPATH`` and the installed packages, and a folder by its absolute path; never in the current
    folder, never in the record or in the folder that holds it. A user who names the workload needs none of this: see
    :func:`dit_mlflow.load_workload`.

    Args:
        recorded: reference and settings.
        directory: where the record is.
        trusted: the user consents to run what it names.

    Raises:
        UntrustedError: the user has to name it or to consent, or it lies where nothing is run from.
        WorkloadError: it cannot be used.
    """
    reference = recorded.reference
    ready = ready_projects().get(PurePath(reference).as_posix())
    if not trusted and not comes_with_package(reference):
        raise UntrustedError(_what_to_type(reference, ready is not None))
    # What a workload imports in turn is looked for as it is itself.
    with _without_current_folder():
        factory = _factory_of_trusted(reference, directory) if ready is None else factory_in(ready, reference)
        return build(factory, reference, recorded.settings)


def comes_with_package(reference: str) -> bool:
    """Whether this means one of the package's own workloads, and no folder of that name below the current one."""
    ready = ready_projects().get(PurePath(reference).as_posix())
    if ready is None:
        return False
    own = Path.cwd() / reference
    return not (own / "__init__.py").is_file() or own.resolve() == ready.resolve()


def _what_to_type(reference: str, ambiguous: bool) -> str:
    naming = f"name it: {option('workload', reference)}, or in Python workload={reference!r}"
    trust = option("trust_workload", "true")
    if ambiguous:
        return (
            f"the record names {reference!r} as its workload, which comes with the package, and the current folder has "
            f"one of that name; nothing was run. If the one here is meant, {naming}; if the package's: {trust}"
        )
    return (
        f"the record names {reference!r} as its workload, which does not come with the package; a record is data, and "
        f"nothing of it was run. If that is your code, {naming}. If you trust whoever made the record with all that "
        f"you may do here: {trust}"
    )


def _factory_of_trusted(reference: str, directory: Path) -> WorkloadFactory:
    try:
        _check_places(_places(reference), reference, directory)
    except (OSError, ValueError) as error:
        raise WorkloadError(f"workload {reference!r} cannot be the name of anything: {error}") from error
    factory = find_factory(reference, working_directory=False)
    try:
        returns = get_type_hints(factory).get("return")
    except (NameError, TypeError, AttributeError):
        returns = None
    if not (isinstance(returns, type) and issubclass(returns, Workload)):
        raise UntrustedError(
            f"the record names {reference!r} as its workload, which is not annotated to return one and is not called "
            "on a record's word alone: write '-> Workload' in its signature, or name it: "
            + option("workload", reference)
        )
    return factory


@contextmanager
def _without_current_folder() -> Iterator[None]:
    """Modules are not looked for in the current folder, which may be that of a downloaded record."""
    before, here = sys.path[:], Path.cwd().resolve()
    sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != here]
    try:
        yield
    finally:
        sys.path[:] = before


def _places(reference: str) -> list[Path]:
    """Paths of the code that a reference names, found without running it."""
    if ":" not in reference:
        folder = Path(reference)
        if not folder.is_absolute():
            raise UntrustedError(
                f"the record names the folder {reference!r}, and does not say of which folder; nothing of it was run. "
                f"Name it from where you are: {option('workload', reference)}"
            )
        return [folder, folder / "__init__.py"]
    package, *parts = module_of(reference).split(".")
    loaded = sys.modules.get(package)
    spec = importlib.util.find_spec(package) if loaded is None else loaded.__spec__
    if spec is None:  # Not there, or the script that runs.
        script = getattr(loaded, "__file__", None)
        return [] if script is None else [Path(script)]
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    within = [folder.joinpath(*parts[: i + 1]) for folder in folders for i in range(len(parts))]
    origin = [Path(spec.origin)] if spec.origin and spec.has_location else []
    return [*origin, *folders, *within, *(path.with_name(f"{path.name}.py") for path in within)]


def _check_places(places: list[Path], reference: str, directory: Path) -> None:
    """Raise :class:`UntrustedError` for code in the record or beside it, by its name or where its links lead."""
    record = directory.resolve()
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    for place in places:
        for path in (place.absolute(), place.resolve()):
            inside = path.is_relative_to(record)
            beside = path.is_relative_to(record.parent) and not any(path.is_relative_to(folder) for folder in installed)
            if inside or beside:
                raise UntrustedError(
                    f"workload {reference!r} is code {'inside of' if inside else 'beside'} the trajectory {directory}, "
                    f"which is not run on a record's word; if it is yours, name it: {option('workload', reference)}"
                )
