"""Trainings that are recorded into runs."""
