"""Notes, links, views and cards, by which users find their way in the MLflow UI."""
