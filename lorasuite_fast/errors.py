"""The one error a user meets: a single line that names the file, tensor or shapes, and what to do."""

_HEAD, _TAIL = 3000, 900


def one_line(text: str) -> str:
    """A text as a terminal may show it: bounded, and without line ends, terminal codes and lone surrogates."""
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} … {text[-_TAIL:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LoraSuiteError(Exception):
    """Input that cannot be used, or a request that cannot be met. The command line prints it and exits with code 2."""

    def __str__(self) -> str:
        """One line of bounded length: names taken from a file may hold line ends, terminal codes or lone surrogates."""
        return one_line(super().__str__())


class WriteError(LoraSuiteError):
    """An output that cannot be written; the work done so far is kept, and the same command goes on from it."""
