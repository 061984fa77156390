from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    """Two ranks on this machine's CPU, kept for the whole session."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks: another number of threads sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
