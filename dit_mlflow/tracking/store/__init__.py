"""Stored in MLflow and read back: trajectories, influence, models, runs."""
