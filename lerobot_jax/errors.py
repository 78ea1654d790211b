"""One kind of error for everything that the user can put right."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """What was given (a field, a file, a folder) is wrong; the message says what, where and what would do."""


@contextlib.contextmanager
def reported_on_one_line() -> Iterator[None]:
    """Print an `InputError` as one line and exit with 1, without a traceback: for `main` functions."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
