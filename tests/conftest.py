"""Shapes are checked in tests only; 8 virtual devices; full precision; warnings are errors (pyproject.toml)."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"  # most of the tests' time is the compiler's: this halves it
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jaxtyping
import pytest

import tests.typechecker  # noqa: F401  (named in the hook)

jaxtyping.install_import_hook("lerobot_jax", "tests.typechecker.checked")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update(
    "jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="session")
def _caches_of_their_own(tmp_path_factory) -> None:
    """Keep tests away from the user's datasets and caches."""
    os.environ["HF_LEROBOT_HOME"] = str(tmp_path_factory.mktemp("lerobot_home"))
    os.environ["LEROBOT_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
