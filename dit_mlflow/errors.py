"""The errors a user can meet. Each message says what came, what was expected and how to fix it."""

from dit_mlflow.told import masked, told


class DitError(Exception):
    """Base of every error that dit_mlflow raises on purpose.

    What it quotes, of a record or of another error, may hold passwords, escapes or megabytes: see
    :func:`dit_mlflow.told.told`.
    """

    def __init__(self, *details: object) -> None:
        super().__init__(*(told(detail) if isinstance(detail, str) else detail for detail in details))


class InputError(DitError, ValueError):
    """An argument or setting has a value that cannot be used."""


class WorkloadError(DitError):
    """A workload cannot be found, built, or used as it stands."""


class UntrustedError(WorkloadError):
    """A record names code that the user neither named nor consented to run; none of it was run."""


class TrajectoryError(DitError):
    """A trajectory is missing, damaged, or does not belong to the workload given."""


class TrainingError(DitError):
    """Training cannot go on (a loss that is not a number, say); what was recorded is kept."""


class UnsupportedError(DitError):
    """The training does something through which influence cannot be computed."""


def cause(error: Exception) -> Exception | None:
    """``error`` as the cause of another, unless a traceback would show a password with it."""
    return error if masked(str(error)) == str(error) else None


def first_line(error: BaseException) -> str:
    """The first line of its message; torch's go on with stacks and links."""
    return str(error).strip().partition("\n")[0]
