"""How people find their way in the MLflow UI: notes, links, views, cards."""
