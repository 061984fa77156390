from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    """Two ranks on this machine's CPU, kept for the whole session."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
