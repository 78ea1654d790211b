"""A recorded dataset, and a server that gives it and can fail."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.failing_server import FailingServer
from tests.data.recordings import record
from tests.data.streams import LENGTHS, ONE_EPISODE_A_FILE


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "dataset", LENGTHS, **ONE_EPISODE_A_FILE).root


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[FailingServer]:
    server = FailingServer(Path(shutil.copytree(root, tmp_path / "served")))
    yield server
    server.close()
