"""The one error a user meets: a single line that names the file, tensor or shapes, and what to do."""


class LoraSuiteError(Exception):
    """Input that cannot be used, or a request that cannot be met. The command line prints it and exits with code 2."""


class WriteError(LoraSuiteError):
    """An output that cannot be written; the work done so far is kept, and the same command goes on from it."""
