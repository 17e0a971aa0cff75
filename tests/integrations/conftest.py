"""For the tests with trainers; they are skipped where `torchloco[integrations]` is not installed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small models on several threads wait for each other for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
