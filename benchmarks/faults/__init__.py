"""Load and faults, counted: see ``benchmarks/reliability.py``."""
