"""The checksum by which ranks notice that they differ, against numpy."""

import numpy as np
import pytest
import torch

from hybridiff_xdit.ranks.comm import checksum

FLOATS = torch.arange(12, dtype=torch.float32).view(3, 4)
NESTS = {
    "one": [FLOATS],
    "not contiguous": [FLOATS.t()],
    "a slice": [FLOATS[1:]],
    "dtypes": {"sample": FLOATS.half(), "timestep": torch.tensor(981), "text": [FLOATS.bfloat16()]},
    "an expanded element": [FLOATS, torch.tensor(7.0).expand(1), torch.tensor(7.0)],
    "bytes": [torch.tensor([True, False, True]), FLOATS],
}


def by_numpy(tensors):
    raw = [(bytes(dense(tensor).view(torch.uint8).numpy()), tensor.element_size() > 1) for tensor in tensors]
    bits = np.concatenate([np.frombuffer(one, np.int16 if is_wide else np.uint8) for one, is_wide in raw])
    return int((bits.astype(np.int64) * (2 * np.arange(len(bits)) + 1)).sum())


def dense(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1)


@pytest.mark.parametrize("nest", NESTS)
def test_it_is_the_weighted_sum_of_all_bits(nest):
    value = NESTS[nest]
    tensors = [*value] if isinstance(value, list) else [value["sample"], value["timestep"], *value["text"]]
    found = checksum(value)
    assert (found.dtype, found.shape, found.item()) == (torch.int64, (1,), by_numpy(tensors))


def test_order_counts():
    a, b = FLOATS[0], FLOATS[1]
    sums = [checksum(nest).item() for nest in ([a, b], [b, a], [torch.cat([a, b])], [FLOATS], [FLOATS.t()])]
    assert sums[0] == sums[2] and len(set(sums)) == 4
