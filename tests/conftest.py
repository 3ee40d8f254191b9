"""What every test has: shapes and types checked on each call, one thread, fixed seeds, slow tests last."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; two workers share two cores

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from tests.command import Commands, commands

install_import_hook("vlm", "beartype.beartype")

settings.register_profile("vlm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("vlm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a plain mistake shows within seconds."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command line, in processes of their own."""
    with commands(tmp_path_factory.mktemp("commands")) as runner:
        yield runner


@pytest.fixture(autouse=True, scope="session")
def shard_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Indices and shards by address stay among the test's files; commands started by a test inherit the place."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("shard-cache")
        patch.setenv("VLM_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The global generators start alike in every test; torch and numpy only where a test has imported them."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)
