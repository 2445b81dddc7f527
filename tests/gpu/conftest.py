"""Skips what cannot run here, with its reason: these tests compute on a GPU, nearly all with TE."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.gpu.jobs import Jobs


def _missing(item: pytest.Item) -> str | None:
    if not torch.cuda.is_available():
        return "no GPU on this machine"
    if item.get_closest_marker("without_te"):
        return None
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "without_te: runs without Transformer Engine as well")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and (reason := _missing(item)):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The training runs that the tests of this session compare, each run once."""
    return Jobs(tmp_path_factory.mktemp("gpu"))
