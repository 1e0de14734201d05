"""The microbenchmarks that users run: `python -m randfuse.bench list | run | compare | report`."""


class BenchError(ValueError):
    """What was asked for cannot be done; the message says what must be different."""
