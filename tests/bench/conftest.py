"""What the tests of the benchmark share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def leave_torch_as_it_was() -> Iterator[None]:
    """A run sets torch's threads and seeds its global generator."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
