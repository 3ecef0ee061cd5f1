"""The one error a user meets: a single line that names the file, tensor or shapes, and what to do."""


class LoraSuiteError(Exception):
    """Input that cannot be used, or a request that cannot be met. The command line prints it and exits with code 2."""
