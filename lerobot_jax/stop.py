"""Stop requests: Ctrl-C and SIGTERM end a run in order, after a step that all its processes agree on."""

import signal
import threading
import time

from absl import logging

from lerobot_jax import distributed


class StopRequest:
    """Notes Ctrl-C and SIGTERM, so that the run can save and end in order; a second Ctrl-C ends it at once.

    Attributes:
        signal: the one that came, to this process or to another; 0 before.
    """

    signal = 0

    def __enter__(self) -> "StopRequest":
        self._step, self._last, self._is_noted = 0, None, False
        self._lock = threading.Lock()
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        if distributed.group is not None:
            threading.Thread(target=self._agree, args=(distributed.group,), name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Tell whether this process knows that the run is to stop."""
        return bool(self.signal)

    def due(self, step: int) -> bool:
        """Tell whether to stop after so many steps; all processes stop after the same."""
        if distributed.group is None:
            return self.requested()
        with self._lock:
            self._step = step
            return self._last is not None and step >= self._last

    def _note(self, number: int, _: object) -> None:
        if self._is_noted:
            raise KeyboardInterrupt
        self._is_noted, self.signal = True, number
        logging.info("stopping after this step, to save a checkpoint; once more to stop at once")

    def _agree(self, group: distributed.Group) -> None:
        """Wait for a request, then choose a step that no process has reached; meanwhile none goes on."""
        channel = distributed.Channel(group, "stop")
        while not (told := group.look("stop")):
            if self.signal:
                group.leave("stop", str(self.signal))
            time.sleep(0.5)
        with self._lock:
            self._last = max(channel.gather(self._step)) + 1
        self.signal = int(told)
