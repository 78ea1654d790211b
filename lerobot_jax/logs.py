"""What the commands print: a time and a plain sentence."""

import logging as python_logging
from pathlib import Path

from absl import flags, logging


def setup_logging() -> None:
    """Show this project's messages, and warnings of libraries."""
    flags.FLAGS.mark_as_parsed()  # absl asks its flags where to log to; we use none of them
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    # Orbax and Grain report their inner life through the same logger.
    ours = str(Path(__file__).parent)
    handler.addFilter(lambda record: record.levelno > python_logging.INFO or record.pathname.startswith(ours))


def only_warnings_of(process: int) -> None:
    """Show nothing but warnings, headed by the number of the process: another one tells the rest."""
    logging.set_verbosity(logging.WARNING)
    form = f"%(asctime)s process {process}: %(message)s"
    logging.get_absl_handler().setFormatter(python_logging.Formatter(form, datefmt="%H:%M:%S"))
