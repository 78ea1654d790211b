"""Compiled programs are kept on disk, so that only the first run of a configuration waits for the compiler."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging

from lerobot_jax import hub
from lerobot_jax.progress import progress_bar


def keep_compiled_programs() -> None:
    """Use the compilation cache in the cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(hub.cache_home() / "compiled"))


def compile_quickly(function, *args, out_shardings=None):
    """Compile a function that runs once: little optimization."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, out_shardings=out_shardings, compiler_options=options).lower(*args).compile()


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Show that the compiler is at work, with the seconds that it has taken, and say at the end how many."""
    started, done = time.monotonic(), threading.Event()
    shape = "{desc}: {elapsed}"
    with progress_bar(f"compiling {what}", None, "s", delay=1, leave=False, bar_format=shape) as bar:

        def show() -> None:
            while not done.wait(1):
                bar.update()

        thread = threading.Thread(target=show)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
    logging.info("compiled %s in %.1f s", what, time.monotonic() - started)
