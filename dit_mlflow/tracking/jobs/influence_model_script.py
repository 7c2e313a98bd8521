"""What MLflow stores of an influence model: this file, run when the model is loaded."""

from mlflow.models import set_model

from dit_mlflow.tracking.jobs.influence_model import InfluenceModel

set_model(InfluenceModel())
