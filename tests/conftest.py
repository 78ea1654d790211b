"""Shapes are checked in tests only; 8 virtual devices; full precision; warnings are errors (pyproject.toml)."""

import os
from pathlib import Path

from tests.compiler import XLA_FLAGS

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", XLA_FLAGS]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(
    10**10
)  # with a limit, JAX locks it against other processes
os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface_hub.constants
import jax
import jaxtyping
import pytest

import tests.typechecker  # noqa: F401  (named in the hook)
from tests.goldens import HUB

jaxtyping.install_import_hook("lerobot_jax", "tests.typechecker.checked")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="session")
def _caches_of_their_own(tmp_path_factory) -> None:
    """Keep tests away from the user's datasets and caches."""
    os.environ["HF_LEROBOT_HOME"] = str(tmp_path_factory.mktemp("lerobot_home"))
    os.environ["LEROBOT_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the dataset of tests/runs.py."""
    from tests.runs import record_tiny  # after the hook, which checks shapes

    return record_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_run(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a whole run of the recipe of tests/runs.py; to be copied by who changes it."""
    from lerobot_jax import train
    from tests.runs import tiny_arguments

    folder = tmp_path_factory.mktemp("tiny")
    train.main(tiny_arguments(tiny_root, folder))
    return folder / "run"


@pytest.fixture
def stand_ins(monkeypatch) -> None:
    """Let the models of the Hub's cache be small ones: tools/make_clip_golden.py."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(HUB))
    monkeypatch.setenv("HF_HUB_CACHE", str(HUB))
