"""The command line, which MLproject calls too: parses, checks, and hands over to tracking."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click

from dit_mlflow import __version__
from dit_mlflow.command import command
from dit_mlflow.errors import DitError, InputError
from dit_mlflow.progress import phase, phases, say
from dit_mlflow.told import told, told_lines
from dit_mlflow.tracking.jobs.signals import ending_on_signals
from dit_mlflow.tracking.mlflow_internals import DATABASE_LOGGER
from dit_mlflow.tracking.store.failed_run import fail_project_run

KINDS = ("local", "final", "cumulative")
COMPILE = ("auto", "always", "never")

_SHOWN_BY_UI = ("file", "sqlite", "postgresql", "mysql", "mssql")

_TAKES_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}


def _switch(name: str, text: str) -> Callable[..., Any]:
    """An option that is true when it is given, and takes ``true`` and ``false`` as MLproject gives them."""
    return click.option(name, type=bool, is_flag=False, flag_value="true", default=False, help=text)


_TRUST = _switch(
    "--trust-workload",
    "Run the workload that the run names, though you do not name it and it does not come with the package.",
)
_ALL_FIGURES = _switch("--all-figures", "Log every figure, not only those of docs/figures.md that are default.")


class _Choice(click.Choice[str]):
    """Choices for help and completion. Any text is taken: the job refuses it, and says so on a run that there is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


def _option(name: str, default: Any, text: str, *choices: str) -> Callable[..., Any]:
    """An option of a job; what is empty by default says so in its text."""
    kind = _Choice(choices) if choices else None
    return click.option(name, default=default, show_default=default != "", type=kind, help=text)


_QUESTION = (
    _option("--training-run", "", "Run with a trajectory; empty: train first."),
    _option("--workload", "", "As for train; empty: the training run's own, or projects/mnist."),
    _TRUST,
    _option("--windows", "5", "'epochs', a number of equal windows, or ranges '0:80,80:160'."),
    _option(
        "--kind", "local", "Removed in the window and asked at its end; asked at the end; removed from step 0.", *KINDS
    ),
    _option("--query", "", "Of what, instead of the mean validation loss: class:NAME, sample:3, …; docs/commands.md."),
    _option("--ground-truth", "all", "Samples checked by exact leave-one-out: all, none, a number."),
    _ALL_FIGURES,
    _option("--init-seed", 0, "As for train; of the first training, if there are several."),
    _option("--order-seed", 0, "As for train; of the first training, if there are several."),
)


def _asks(job: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that influence and compare share."""
    for option in reversed(_QUESTION):
        job = option(job)
    return job


@click.group(context_settings={"show_default": True})
@click.version_option(__version__, prog_name="dit-mlflow")
def cli() -> None:
    """Which training samples did this, and when? Results go to MLflow (MLFLOW_TRACKING_URI), to the experiment that
    MLFLOW_EXPERIMENT_NAME names, to that of the training run, or to dit-mlflow.

    Exit codes: 0, done; 1, the job failed, was interrupted, or refused what it was given, and says why; 2, unknown
    option, or text for a number; 143, ended by SIGTERM.
    """


@cli.command(context_settings=_TAKES_SETTINGS)
@_option("--workload", "", "Project folder or package.module:factory; empty: projects/mnist.")
@_option("--init-seed", 0, "Seed of the weight initialisation.")
@_option("--order-seed", 0, "Seed of batch order and random draws.")
@_option("--checkpoint-every", "sqrt", "'sqrt', or a number of steps (0: first and last).")
@click.pass_context
def train(context: click.Context, workload: str, init_seed: int, order_seed: int, checkpoint_every: str) -> None:
    """Train a workload and record its trajectory in an MLflow run.

    Further options are settings of the workload: --model dnn --lr 0.1 …
    """

    def job(project_run_id: str | None) -> str:
        from dit_mlflow.tracking.jobs.request import DEFAULT_WORKLOAD
        from dit_mlflow.tracking.jobs.train import run_training
        from dit_mlflow.workload import comes_with_package, load_workload

        every = int(checkpoint_every) if checkpoint_every.isdecimal() else checkpoint_every
        chosen = load_workload(workload or DEFAULT_WORKLOAD, **parse_settings(context.args))
        phase("training")
        run_id = run_training(chosen, init_seed, order_seed, every, project_run_id)
        named = {} if comes_with_package(str(chosen.reference)) else {"workload": str(chosen.reference)}
        return f"\ntraining run   {run_id}\nnext: {command('influence', training_run=run_id, **named)}"

    run_job("training", job, "training")


@cli.command(context_settings=_TAKES_SETTINGS)
@_asks
@_option("--dtype", "recorded", "Of the sweep.", "recorded", "float32", "float64")
@_option("--memory-mb", 0, "MiB for the states that a sweep holds; 0: about 2 sqrt(T) of them.")
@_option("--compile", "auto", "The sweep's steps, where it saves time; wherever it is right.", *COMPILE)
@_option("--trust", 24, "Random samples left out exactly, and those that stand out; 0: none.")
@_option("--removed", 0.1, "Share of the samples whose removal is asked about; 0: the derivative.")
@_option("--trainings", 16, "Budget for that: draws, and twice as many retrainings.")
@_option("--groups", "", "Groups to leave out together: label, or a CSV of sample_index and group.")
@_option("--confirm", 0, "Samples of largest score to leave out exactly, in each window.")
@click.pass_context
def influence(context: click.Context, /, **options: Any) -> None:
    """Compute influence per window; each window is a child run.

    Further options are settings of the workload, if it is to be trained first.
    """

    def job(project_run_id: str | None) -> str:
        from dit_mlflow.tracking.jobs.influence import main_job
        from dit_mlflow.tracking.jobs.request import Request

        return main_job(Request(settings=parse_settings(context.args), **options), project_run_id)

    run_job("influence", job, "training", "influence", "logging", "drawing", beside=options["training_run"])


# One job, two words for it: that of the library's explain(), and that of the runs it makes.
cli.add_command(influence, "explain")


@cli.command(context_settings=_TAKES_SETTINGS)
@click.argument("training_run")
@_option("--workload", "", "As for train; empty: the training run's own.")
@_TRUST
@_option("--every", 0, "Steps of a window; 0: a window for each epoch.")
@_option("--dtype", "recorded", "Of the sweep.", "recorded", "float32", "float64")
@_option("--memory-mb", 0, "MiB for the states that a sweep holds; 0: about 2 sqrt(T) of them.")
@_option("--poll", 2.0, "Seconds between two looks at the record.")
@_option("--patience", 600.0, "Seconds without new steps after which the training counts as dead.")
@_switch("--until-input-ends", "The training ends with standard input, or a line of it, whatever its run says.")
@click.pass_context
def follow(context: click.Context, /, **options: Any) -> None:
    """Follow a training while it is recorded: influence per window, as soon as its steps are stored.

    TRAINING_RUN is its run; the trainer is not touched. Further options are settings of the workload.
    """

    def job(project_run_id: str | None) -> str:
        from dit_mlflow.tracking.jobs.follow import FollowRequest, follow_job

        return follow_job(FollowRequest(settings=parse_settings(context.args), **options), project_run_id)

    run_job("influence", job, beside=options["training_run"])


_TRUTH = (
    _option("--subsets", 32, "Trainings on random subsets, for the linear datamodeling score; 0: none."),
    _option("--removed", 0.5, "Share of the samples that each of them leaves out."),
    _option("--jobs", 1, "Processes for the ground truth, one thread each."),
    _option("--backend", "", "Of joblib: loky, dask or ray."),
)


def _held_against_truth(job: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that compare and evaluate share."""
    for option in reversed(_TRUTH):
        job = option(job)
    return job


@cli.command(context_settings=_TAKES_SETTINGS)
@_asks
@_option("--scores", "", "CSV files (sample_index, score) with commas between.")
@_held_against_truth
@click.pass_context
def evaluate(context: click.Context, /, **options: Any) -> None:
    """Hold scores computed elsewhere against exact retraining; a child run for each file.

    What compare does with --scores, without our methods. Further options are settings of the workload, if it is to be
    trained first.
    """

    def job(project_run_id: str | None) -> str:
        from dit_mlflow.tracking.jobs.compare import ComparisonRequest, compare_job

        if not options["scores"].strip():
            raise InputError("evaluate needs scores: CSV files with the columns sample_index and score")
        request = ComparisonRequest(methods="", settings=parse_settings(context.args), **options)
        return compare_job(request, project_run_id)

    run_job("comparison", job, "training", "ground truth", "comparing", beside=options["training_run"])


@cli.command(context_settings=_TAKES_SETTINGS)
@_asks
@_option("--methods", "all", "Names with commas between, or all.")
@_option("--scores", "", "CSV files (sample_index, score) of scores computed elsewhere, to compare.")
@_option("--seeds", 1, "Trainings to compare on.")
@_held_against_truth
@click.pass_context
def compare(context: click.Context, /, **options: Any) -> None:
    """Compare methods on one trajectory, or on several seeds: fidelity, detection and cost; a child run each.

    Further options are settings of the workload, if it is to be trained first.
    """

    def job(project_run_id: str | None) -> str:
        from dit_mlflow.tracking.jobs.compare import ComparisonRequest, compare_job

        return compare_job(ComparisonRequest(settings=parse_settings(context.args), **options), project_run_id)

    run_job("comparison", job, "training", "ground truth", "comparing", beside=options["training_run"])


@cli.command(context_settings=_TAKES_SETTINGS)
@_option("--training-run", "", "Run with a trajectory; empty: train first.")
@_option("--workload", "", "As for train; empty: the training run's own, or projects/mnist.")
@_TRUST
@_option("--drop", "0.05,0.1,0.2,0.3", "Shares of the training samples, with commas between.")
@_option("--action", "drop", "Relabel: by cross-validation; reweight: by harm.", "drop", "relabel", "reweight")
@_option("--windows", "1", "As for influence; of several, the validation split chooses.")
@_option("--kind", "final", "As for influence.", *KINDS)
@_option("--repeats", 3, "Pairs of seeds to train again with, the recorded one first.")
@_option("--draws", 5, "Random draws of as many samples, for comparison; 0: none.")
@_option("--metric", "", "To choose and judge by; empty: accuracy if there is one, else loss.")
@_ALL_FIGURES
@_option("--memory-mb", 0, "MiB for the states that a sweep holds; 0: about 2 sqrt(T) of them.")
@_option("--init-seed", 0, "As for train.")
@_option("--order-seed", 0, "As for train.")
@click.pass_context
def cleanse(context: click.Context, /, **options: Any) -> None:
    """Drop (relabel, reweight) the samples of lowest influence, train again; compare with random and highest losses.

    The validation split chooses how many, the test split judges. Further options are settings of the workload, if it is
    to be trained first.
    """

    def job(project_run_id: str | None) -> str:
        from dit_mlflow.tracking.jobs.cleanse import CleansingRequest, cleanse_job

        return cleanse_job(CleansingRequest(settings=parse_settings(context.args), **options), project_run_id)

    run_job("cleansing", job, "training", "influence", "cleansing", beside=options["training_run"])


@cli.command(context_settings=_TAKES_SETTINGS)
@click.argument("target")
@_option("--workload", "", "As for train; empty: the trajectory's own.")
@_TRUST
@click.pass_context
def verify(context: click.Context, target: str, workload: str, trust_workload: bool) -> None:
    """Check that a trajectory is whole and replays: TARGET is a run's id or a folder.

    Checksums of all files, steps without a gap, the dataset's digest, and the replay of every segment against the next
    checkpoint. Exit code 0: all of it holds (without a workload: all but the replay, which is reported), 1: not.

    Further options are settings of the workload, in place of the recorded ones.
    """

    def job(project_run_id: str | None) -> str:
        from dit_mlflow.tracking.jobs.verify import verify_target

        return verify_target(target, workload, parse_settings(context.args), _say, trust_workload)

    run_job("verification", job)


@cli.command()
@_option("--influence-run", "", "A finished influence run.")
@_option("--model-name", "", "Of the registered model; made if there is none.")
@_option("--model", "", "Which model of the training run: m-<id> or models:/…; needed if several.")
@_option("--influence-model", "", "Register a model of this name that answers for new rows as well.")
@_option("--workload", "", "Of that influence model; empty: the training run's own.")
@_TRUST
def register(**options: Any) -> None:
    """Keep the results of an influence run with the model: its artifacts, metrics, description and tags."""

    def job(project_run_id: str | None) -> str:
        from dit_mlflow.tracking.jobs.register import RegistrationRequest, register_job

        return register_job(RegistrationRequest(**options), project_run_id)

    run_job("registration", job, beside=options["influence_run"])


@cli.command(context_settings=_TAKES_SETTINGS | {"help_option_names": []})
@click.pass_context
def ui(context: click.Context) -> None:
    """Start MLflow's UI on the results; the options are those of mlflow ui (--port, --host …)."""
    from dit_mlflow.tracking.ui.links import store_uri

    where = store_uri()
    results = {"MLFLOW_BACKEND_STORE_URI": where}
    if where.startswith(("http", "databricks")):
        raise click.ClickException(told(f"results are on a server: open {where}"))
    # Anything else MLflow refuses with a traceback, which shows the URI's password.
    if (found := re.match(r"([\w.+-]{2,})://", where)) and found[1].partition("+")[0] not in _SHOWN_BY_UI:
        raise click.ClickException(told(f"mlflow ui cannot show {where}; expected a database, a folder or a server"))
    command = [sys.executable, "-m", "mlflow", "ui", *context.args]
    if os.name != "nt":
        # In place of this process, so that signals reach the server.
        os.execve(command[0], command, {**results, **os.environ})
    raise SystemExit(subprocess.run(command, env={**results, **os.environ}, check=False).returncode)


def _say(line: str) -> None:
    say(told(line), sys.stdout)


def parse_settings(arguments: Sequence[str]) -> dict[str, str]:
    """``["--model", "dnn", "--lr=0.1"]`` as a dict; raises :class:`InputError` for anything else."""
    settings: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        name, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not name or not (equals or rest):
            raise InputError(f"cannot read {option!r}; expected --setting value")
        settings[name.replace("-", "_")] = value if equals else rest.pop(0)
    return settings


def run_job(kind: str, job: Callable[[str | None], str], *titles: str, beside: str = "") -> None:
    """Run a job and print what it says; if it fails, exit code 1, a clear message and no run left RUNNING.

    Args:
        kind, job: what it is called, and does, given the run that ``mlflow run`` made.
        titles: the job's phases, after the imports.
        beside: the run whose experiment the job's runs belong to, unless the user has chosen one.
    """
    # Made by ``mlflow run`` for this process; taken away, so that later runs do not attach to it by accident.
    project_run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    # Only MLflow, once it is imported, can end that run.
    with ending_on_signals(imports=project_run_id is None):
        try:
            with phases(*titles):
                from dit_mlflow.tracking.store.patience import patient_stores
                from dit_mlflow.tracking.store.run_log import experiment_of

                with patient_stores(), experiment_of(beside):
                    said = job(project_run_id)
            click.echo(told_lines(said))
        except BaseException as error:
            message = _message(error)
            fail_project_run(project_run_id, kind, message or repr(error))
            if message is None:
                raise
            raise click.ClickException(message) from error


def _message(error: BaseException) -> str | None:
    """The message for an error instead of a traceback; ``None`` where the fault may be ours."""
    if isinstance(error, DitError):
        return str(error)
    # Not imported here: what was interrupted may be that import.
    exceptions = sys.modules.get("mlflow.exceptions")
    if exceptions is not None and isinstance(error, exceptions.MlflowException):
        # Drops what SQLAlchemy adds to the database's message.
        said, *more = re.split(r"\n\[SQL:|\n+\(Background on this error at", str(error), maxsplit=1)
        said = told(said)
        return f"{said}\nThe tracking store failed; it may still show runs as RUNNING" if more else said
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return told(f"{type(error).__name__}: {error}")
    return None


def prepare_environment() -> None:
    """Settings of the environment that must be made before torch and MLflow are loaded."""
    # Read when torch is loaded. Spinning threads make small models ten times slower on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # MLflow's bars for every downloaded file; our own bars show the progress of the work.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow's messages on a new database, and its link for every run that ends; ours are printed once, at the end.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Tracebacks of failing databases; the exceptions reach us too.
    logging.getLogger(DATABASE_LOGGER).addFilter(lambda record: not record.exc_info)


def _print_traceback(*error: Any) -> None:
    """Of an error that may be our fault, for a report that people paste."""
    click.echo(told_lines("".join(traceback.format_exception(*error))), err=True, nl=False)


def main() -> None:
    """The console script ``dit-mlflow``."""
    prepare_environment()
    sys.excepthook = _print_traceback
    try:
        cli(prog_name="dit-mlflow")
    finally:
        # Else Python looks for garbage among a million objects before it ends, for seconds.
        gc.freeze()


if __name__ == "__main__":
    main()
