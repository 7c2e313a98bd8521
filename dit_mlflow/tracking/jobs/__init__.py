"""The commands: each checks a request, has the answer computed, and logs it."""
