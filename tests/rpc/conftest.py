"""Servers that the tests here call."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.registry_server import RegistryServer


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[RegistryServer]:
    """A registry with its referee at work."""
    arena = RegistryServer(tmp_path)
    await arena.start()
    yield arena
    await arena.stop()
