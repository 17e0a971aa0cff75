"""The one exception a user of the benchmark should ever meet."""


class BenchError(Exception):
    """Something the user can put right; the command line shows its text as one line, without a traceback."""
