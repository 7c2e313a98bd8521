"""MLflow model evaluator ``dit``: which training samples helped or hurt on an evaluation's data.

MLflow loads this module wherever models are evaluated, so it imports nothing heavy.
"""

from __future__ import annotations

from typing import Any

from mlflow.models.evaluation.base import EvaluationResult, ModelEvaluator

MODEL_TYPE = "dit"


class DitEvaluator(ModelEvaluator):
    """Which training samples helped or hurt on the evaluation's rows.

    ``mlflow.models.evaluate(model, data, targets=…, model_type="dit", evaluators="dit", evaluator_config={…})``, where
    the configuration may name

    - ``training_run``: with the trajectory; default: the run that logged the model;
    - ``windows`` (default ``"1"``, the whole training) and ``kind`` (``"local"``): see :func:`dit_mlflow.track`;
    - ``workload``: a reference, or a :class:`dit_mlflow.Workload`; default: the recorded one; and ``settings`` of a
      reference; ``trust_workload``: run the recorded one, though it does not come with the package;
    - ``top``: samples listed for each row and side, 5;
    - ``batch``: how a row becomes a batch, see :func:`dit_mlflow.influence.row_losses`.

    For what is logged, see :func:`dit_mlflow.tracking.jobs.evaluate_rows.evaluate_rows`.
    """

    @classmethod
    def can_evaluate(cls, *, model_type: str, evaluator_config: dict[str, Any], **kwargs: Any) -> bool:
        """Only evaluations of this type; others run without this evaluator."""
        return model_type == MODEL_TYPE

    def evaluate(
        self,
        *,
        dataset: Any,
        run_id: str,
        evaluator_config: dict[str, Any],
        model: Any = None,
        extra_metrics: Any = None,
        custom_artifacts: Any = None,
        model_id: str | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """See :func:`dit_mlflow.tracking.jobs.evaluate_rows.evaluate_rows`.

        Raises:
            DitError: a setting, the data or the model cannot be used.
        """
        from dit_mlflow.errors import InputError
        from dit_mlflow.evaluation import Metrics
        from dit_mlflow.tracking.jobs.evaluate_rows import Settings, evaluate_rows
        from dit_mlflow.tracking.store.run_log import log_metrics

        if extra_metrics or custom_artifacts:
            raise InputError("extra_metrics and custom_artifacts belong to MLflow's own evaluators; leave them out")
        # For a registered version, MLflow passes the model without its id, and logs no metrics on it.
        known = model_id or getattr(model, "model_id", None)
        settings = Settings.of(evaluator_config, known)
        result = evaluate_rows(settings, dataset.features_data, dataset.labels_data, run_id)
        if model_id is None:
            log_metrics(Metrics(result.metrics), known)
        return result
