"""What transformers, PEFT and `tokenizers` raise and print as they read a folder, as one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import LoraSuiteError

_LONGEST = 400
_FOREIGN_CODE = ("trust_remote_code", "custom code")


def reason(error: BaseException) -> str:
    """An error's own words on one line, cut where they are long; its class where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@contextmanager
def loading(what: str, *, trust_remote_code: bool = False) -> Iterator[None]:
    """Turns what is raised into one line, and keeps progress bars and log lines off the terminal.

    Args:
        what: the line's beginning. trust_remote_code: whether code of the folder runs, so that its lack is no reason.

    Raises:
        LoraSuiteError: `what`, and the error's own words in brackets.
    """
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    # It logs the whole config before it raises.
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (LoraSuiteError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # A panic inside `tokenizers` is no Exception.
        if not trust_remote_code and any(words in str(error) for words in _FOREIGN_CODE):
            raise LoraSuiteError(
                f"{what} (it has code of its own, which is not run); read that code, and pass "
                "`trust_remote_code=True` if you trust it"
            ) from None
        raise LoraSuiteError(f"{what} ({reason(error)})") from None
    finally:
        logger.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()
