import re
from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks

#: The files that take longest. They come first, so that no worker begins one when the others are about to end.
LONGEST = ("features", "seam", "past_faults", "xdit_models", "benchmark", "xdit_sequence", "stages", "xdit_serve",
           "faults", "models", "xdit_stages", "xdit_runs", "xdit_patches", "parity", "study", "simulate")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(
        key=lambda item: place.get(item.path.stem, len(place)) if item.path.parent.name == "tests" else len(place)
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # here, or on a rank
        if lacking := re.search(r"Lacking: (diffusers \S+ has no \w+)", f"{type(error).__name__}: {error}"):
            pytest.skip(lacking[1])
        raise


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
