"""``python -m benchmarks.reproduction``, which ``mlflow run . -e reproduce`` calls."""

from __future__ import annotations

from typing import Any

import click

from dit_mlflow.cli import prepare_environment, run_job


@click.command(context_settings={"show_default": True})
@click.option("--table", default="all", help="correlation, detection, early_late, patterns, cleansing, cost; or all.")
@click.option("--seeds", default=8, help="Of data, weights and batch order.")
@click.option("--datasets", default="all", help="mnist, adult, newsgroups, digits; or all.")
@click.option("--data", default="", help="Folder with adult/ and 20news-bydate.tar.gz; empty: they are downloaded.")
@click.option("--quick", default=False, help="Few, small and short trainings: that it works, not what is true.")
@click.option("--jobs", default=0, help="Processes, one thread each; 0: one for every core.")
def main(**options: Any) -> None:
    """Reproduce the paper's tables."""

    def job(project_run_id: str | None) -> str:
        from .job import ReproductionRequest, reproduce

        return reproduce(ReproductionRequest(**options), project_run_id)

    run_job("reproduction", job)


if __name__ == "__main__":
    prepare_environment()
    main(prog_name="reproduce")
