from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    """Two ranks with a GPU each, kept for the whole session."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    ranks = Ranks(2, "cuda", group_timeout=60)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    """Four ranks, on fewer GPUs if there are fewer: these take what is exchanged through the host."""
    ranks = Ranks(4, "cuda", group_timeout=60)
    yield ranks
    ranks.close()
