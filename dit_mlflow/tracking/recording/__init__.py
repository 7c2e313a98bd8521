"""Records trainings into runs."""
