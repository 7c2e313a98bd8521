"""What can be done with the answer of an influence run: commands with its own id, as it was called itself."""

from __future__ import annotations

from mlflow.entities import Run

from dit_mlflow.command import command
from dit_mlflow.explanation.training_note import naming
from dit_mlflow.influence.stored_result import SCORES_FILE
from dit_mlflow.tracking.store.names import INFLUENCE, WHOLE_RUN


def next_steps(training: Run, influence_run: str) -> list[tuple[str, str]]:
    """For each step, what it tells and its command.

    Args:
        training: the run that recorded the trajectory.
        influence_run: the id of the run with the answer.
    """
    of = {"training_run": training.info.run_id, **naming(training.data.params.get("resolved.workload", ""))}
    return [
        ("See whether it helps to drop what harms", command("cleanse", **of)),
        ("See whether other methods name the same samples, and which foretells best", command("compare", **of)),
        ("See in which epochs samples matter", command("influence", windows="epochs", **of)),
        (
            "Keep this answer with a registered model (put its name in)",
            command("register", influence_run=influence_run, model_name="<name>"),
        ),
    ]


def rest_of_scores(influence_run: str) -> str:
    """Where all scores are, in words."""
    return (
        f"All are among the artifacts of run {influence_run}: {INFLUENCE}/{SCORES_FILE} has the windows, "
        f"{WHOLE_RUN}/{SCORES_FILE} the whole run"
    )
