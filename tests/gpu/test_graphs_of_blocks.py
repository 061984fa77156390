"""Stages of blocks by CUDA graph: as without graphs, and as the oracle."""

import pytest
import test_blocks
import torch

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid
from hybridiff_xdit.seam.hooks import _SESSIONS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = 1e-4  # float32, of the largest latent


@pytest.mark.parametrize("name", ["wan", "flux", "pixart"])
def test_stages_by_graph(name):
    """Captured: either branch's forward, one of which leaves the boundary, and either stage."""
    pipe, plan = test_blocks.pipeline(name).to("cuda"), test_blocks.PLAN
    found, captured = [], []
    for cuda_graphs in (None, False):
        fields = dict(plan=plan, guidance="reuse", balance="flops", cuda_graphs=cuda_graphs)
        apply_hybrid(pipe, HybridConfig(**fields), simulate=True)
        found += [test_blocks.call(name, len(plan)) for _ in range(2)]
        assert last_report(pipe)["plan"] == plan
        captured.append(len(_SESSIONS[pipe].graphs(pipe.transformer).captured()))
        remove_hybrid(pipe)
    assert captured == [4, 0]
    expected = test_blocks.expected(name, 2, plan, "reuse")
    assert all(test_blocks.difference(latents, found[0]) < TOLERANCE / 10 for latents in found)
    assert test_blocks.difference(found[0], expected) < TOLERANCE
