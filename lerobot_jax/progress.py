"""Progress bars: live in a terminal, a line now and then in a log file."""

import sys
from typing import Any

import tqdm

from lerobot_jax import distributed


def progress_bar(description: str, total: int | None, unit: str, **settings: Any) -> tqdm.tqdm:
    """Open a progress bar with speed and remaining time; `total` None: it is not known.

    Of several processes, the first one shows it.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm.tqdm(
        desc=description,
        total=total,
        unit=unit,
        mininterval=interval,
        dynamic_ncols=True,
        smoothing=0.05,
        disable=not distributed.is_first(),
        **settings,
    )
