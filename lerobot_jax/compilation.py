"""Compiled programs are kept on disk, so that only the first run of a configuration waits for the compiler."""

import os

import jax

from lerobot_jax import hub


def keep_compiled_programs() -> None:
    """Use the compilation cache in the cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(hub.cache_home() / "compiled"))


def compile_quickly(function, *args, out_shardings=None):
    """Compile a function that runs once: little optimization."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, out_shardings=out_shardings, compiler_options=options).lower(*args).compile()
