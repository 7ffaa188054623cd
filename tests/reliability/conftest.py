"""A process that forks commands, for all of these tests."""

import os

import pytest
from forks import Forks


@pytest.fixture(scope="session")
def forks():
    """Runs commands in children, which may be killed."""
    process = Forks(os.environ.get("RANKWISE_SOURCE"))
    yield process
    process.close()
