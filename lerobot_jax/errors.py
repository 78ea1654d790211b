"""One kind of error for everything that the user can put right."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


class InputError(ValueError):
    """What was given (a field, a file, a folder) is wrong; the message says what, where and what would do."""


class UnwritableError(InputError):
    """A full or unwritable disk."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` into an `UnwritableError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def reported_on_one_line() -> Iterator[None]:
    """End a `main` function without a traceback: an `InputError` is one line and exit code 1, Ctrl-C is 130."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
