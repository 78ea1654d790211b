"""Several processes as one run: how they start, agree on something, and end together.

The same command is started on every machine (SLURM, Open MPI and TPU pods tell each process who it is; so do the
variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or `--config.distributed`). Process 0 logs
and writes; all of them compute, load and save their parts. Collectives of the devices are called by the main
threads only, in the same order; everything else is agreed here, through JAX's coordination service, which needs no
device and may be used by other threads.

When a process is gone, the collectives of the others fail or never end, and the coordination service aborts them
after `HEARTBEAT_TIMEOUT`; they say which process it was, and end with exit code 1.
"""

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
from jax._src import clusters, distributed  # the coordination service has no public interface

from lerobot_jax.errors import InputError
from lerobot_jax.logs import only_warnings_of

T = TypeVar("T")

HEARTBEAT_TIMEOUT = 30  # seconds after which the coordination service ends a run that lost a process
START_TIMEOUT = 300  # seconds in which all processes must have come
SILENCE = 10.0  # seconds without news after which a process counts as gone, once there is an error
LINGER = 3.0  # seconds that process 0, which the others hear through, lets them read why it ends
_NEWS, _BEAT, _END = "lerobot_jax/news/", "lerobot_jax/news/beat/", "lerobot_jax/news/end"
_CLUSTERS = ("slurm", "ompi", "gcetpu", "gketpu")  # JAX's names of what it finds by itself


class Address(NamedTuple):
    """Where a process belongs: the arguments of `jax.distributed.initialize`."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    cluster_detection_method: str = "deactivate"


class Group:
    """The processes of this run, seen from one of them.

    Attributes:
        index: which of them this is.
        num: how many there are.
        advice: says what to do when one is gone.
    """

    def __init__(self, index: int, num: int, advice: Callable[[], str]):
        self.index, self.num, self.advice = index, num, advice
        self.agreed = Channel(self, "main")
        self.client: Any = distributed.global_state.client
        now = time.monotonic()
        self._read_at, self._changed_at = now, dict.fromkeys(range(num), now)
        self._beats: dict[int, str] = {}
        self._is_over = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def look(self, name: str) -> str | None:
        """Read a note that some process left, if one did."""
        try:
            return self.client.key_value_try_get(_NEWS + name)
        except jax.errors.JaxRuntimeError:
            return None

    def leave(self, name: str, text: str) -> None:
        """Leave a note for all processes."""
        self.client.key_value_set(_NEWS + name, text, allow_overwrite=True)

    def close(self) -> None:
        """Wait for all processes, and end the connection."""
        self.agreed.gather(None)
        self._is_over.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, message: str, for_others: str | None = None, code: int = 1) -> NoReturn:
        """End this process, and let the others end with the same message, headed by who says it."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.leave("end", for_others or f"process {self.index} of {self.num}: {message}")
        self._end(message, code)

    def gone(self, wait: float = 0.0) -> list[int]:
        """List the processes of which nothing was heard for a while; look again for some seconds."""
        deadline = time.monotonic() + wait
        while True:
            found = [i for i, at in self._changed_at.items() if self._read_at - at > SILENCE]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.2)

    def gone_message(self, gone: list[int]) -> str:
        """Say which processes are gone, and what to do."""
        which = (
            f"process {gone[0]} of {self.num} is" if len(gone) == 1 else f"processes {gone} of {self.num} are"
        )
        return f"{which} gone (processes count from 0); {self.advice()}"

    def _watch(self) -> None:
        """Tell the others that this process lives, and hear what they tell."""
        count = 0
        while not self._is_over.wait(1.0):
            count += 1
            try:
                self.client.key_value_set(f"{_BEAT}{self.index}", str(count), allow_overwrite=True)
                news = dict(self.client.key_value_dir_get(_NEWS))
            except jax.errors.JaxRuntimeError:
                if not self._is_over.is_set():
                    self.disconnected()
                return
            now = self._read_at = time.monotonic()
            for i in range(self.num):
                beat = news.get(f"{_BEAT}{i}", "")
                if beat != self._beats.get(i, ""):
                    self._beats[i], self._changed_at[i] = beat, now
            if _END in news:
                self._end(news[_END])

    def disconnected(self) -> NoReturn:
        """End since process 0, who runs the service, does not answer, or the service has missed another process."""
        silent = [i for i, at in self._changed_at.items() if self._read_at - at > SILENCE / 2]
        self._end(self.gone_message(silent or [0]))

    def _end(self, message: str, code: int = 1) -> NoReturn:
        """End at once: Python's own end would wait for processes that never come."""
        with self._ending:  # never left: other threads that want to end this process wait for its end
            _exit(message, code, LINGER if self.index == 0 else 0)


class Channel:
    """Values that all processes give and get, in the same order. Threads need channels of their own."""

    def __init__(self, group: Group | None, name: str):
        self._group, self._prefix, self._round = group, f"lerobot_jax/{name}/", 0

    def gather(self, value: Any) -> list[Any]:
        """Give a value; wait for those of all processes and return them in the processes' order."""
        group = self._group
        if group is None:
            return [value]
        client = group.client
        here, self._round = f"{self._prefix}{self._round}/", self._round + 1
        client.key_value_set_bytes(f"{here}{group.index}", pickle.dumps(value))
        if group.index > 0:
            return pickle.loads(_wait_for(client, f"{here}all"))
        values = [pickle.loads(_wait_for(client, f"{here}{i}")) for i in range(group.num)]
        client.key_value_set_bytes(f"{here}all", pickle.dumps(values))
        if self._round > 2:  # all have read those: they have given values since
            client.key_value_delete(f"{self._prefix}{self._round - 3}")
        return values


def _wait_for(client: Any, key: str) -> bytes:
    while True:  # without end, but by the second: signals are heard in between
        try:
            return client.blocking_key_value_get_bytes(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


group: Group | None = None


def start(setting: str, advice: Callable[[], str]) -> None:
    """Join the other processes of the run, if there are any; before JAX touches a device.

    Args:
        setting: "auto" finds them in the environment; "off" is one process in any case;
            "HOST:PORT,PROCESSES,INDEX" names the address of process 0, how many there are, and which this is.
        advice: says what to do when a process is gone.

    Raises:
        InputError: when the setting or the environment is wrong, or not all processes come.
    """
    global group
    address = find_address(setting)
    if address is None:
        return
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    try:
        jax.distributed.initialize(
            **address._asdict(),
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise InputError(f"distributed: {' '.join(str(error).split())[:300]}") from None
    jax.devices()  # the processes tell one another theirs; all must be there
    state = distributed.global_state
    group = Group(state.process_id, state.num_processes, advice)
    if group.index > 0:
        only_warnings_of(group.index)


def find_address(setting: str) -> Address | None:
    """Find out where this process belongs; None if it is the only one.

    Raises:
        InputError: when the setting or the environment is incomplete.
    """
    if setting == "off":
        return None
    if setting != "auto":
        parts = setting.split(",")
        if len(parts) != 3 or ":" not in parts[0] or not (parts[1].isdigit() and parts[2].isdigit()):
            raise InputError(f"distributed must be auto, off, or HOST:PORT,PROCESSES,INDEX; it is {setting}")
        return _plain(parts[0], int(parts[1]), int(parts[2]), "distributed")
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if any(given[1:]):
        if not all(given):
            missing = [name for name, value in zip(names, given, strict=True) if not value]
            raise InputError(
                f"distributed: {' and '.join(missing)} must be set too, as in {', '.join(names)}"
            )
        address, num, index = given
        if not (str(num).isdigit() and str(index).isdigit()):
            raise InputError(f"JAX_NUM_PROCESSES={num} and JAX_PROCESS_ID={index} must be whole numbers")
        return _plain(str(address), int(str(num)), int(str(index)), "JAX_PROCESS_ID")
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":  # SLURM_NTASKS may be that of the whole job
        return None
    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.name in _CLUSTERS and cluster.is_env_present():
            return Address(cluster_detection_method=cluster.name) if cluster.get_process_count() > 1 else None
    return None


def _plain(address: str, num: int, index: int, name: str) -> Address | None:
    if not 0 <= index < num:
        raise InputError(f"{name}: process {index} of {num} cannot be; processes count from 0")
    return Address(address, num, index) if num > 1 else None


def is_first() -> bool:
    """Tell whether this is the process that logs and writes, or the only one."""
    return group is None or group.index == 0


def from_first(value: T) -> T:
    """Give all processes the value that process 0 has."""
    return value if group is None else group.agreed.gather(value if group.index == 0 else None)[0]


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Let process 0 go first, e.g. to make what the others find then."""
    if not is_first():
        from_first(None)
    yield
    if is_first():
        from_first(None)


def check_same(settings: dict[str, Any], free: tuple[str, ...]) -> None:
    """Raise `InputError` if the processes have different settings.

    Args:
        settings: the run's, nested.
        free: names, without what they are nested in, of those that may differ.
    """
    if group is None:
        return
    own = {name: value for name, value in _flat(settings) if name.rpartition(".")[2] not in free}
    for i, other in enumerate(group.agreed.gather(own)):
        different = sorted(name for name in own | other if own.get(name) != other.get(name))
        if different:
            name = different[0]
            raise InputError(
                f"{name} is {own.get(name)} here, in process {group.index} of {group.num}, and {other.get(name)} "
                f"in process {i}; start all processes with the same settings"
            )


def _flat(settings: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """End in place of JAX's coordination service, which aborts when a process is missing and does not say which."""
    if group is not None:
        group.disconnected()
    _exit(f"distributed: not all processes came within {START_TIMEOUT} s, or could not reach process 0", 1)


def _exit(message: str, code: int, linger: float = 0.0) -> NoReturn:
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(linger)
    os._exit(code)


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """End a program of several processes: in order when all are done, else all of them, with one message."""
    try:
        yield
    except SystemExit:
        if group is not None:
            group.close()
        raise
    except BaseException as error:
        if group is None:
            raise
        if isinstance(error, InputError):
            group.fail(str(error))
        if isinstance(error, KeyboardInterrupt):
            group.fail("interrupted", code=130)
        # Most likely a collective that failed since another process is gone: that takes a moment to be certain.
        trace = traceback.format_exc()
        if gone := group.gone(wait=2 * SILENCE):
            group.fail(group.gone_message(gone), for_others=group.gone_message(gone))
        print(trace, file=sys.stderr)
        group.fail(f"{type(error).__name__}: {error}")
    else:
        if group is not None:
            group.close()
