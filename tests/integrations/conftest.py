"""For the tests with trainers; they are skipped where `torchloco[integrations]` is not installed."""

import pytest


@pytest.fixture(autouse=True)
def _alone(one_thread):
    """On one thread, all of them."""
