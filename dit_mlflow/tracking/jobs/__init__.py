"""What the commands do: check, compute, log."""
