"""What once was wrong and shows on GPUs only; see tests/test_past_faults.py."""

from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as dist
import zoo_batched

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report
from hybridiff_xdit.evaluate import graphs
from hybridiff_xdit.evaluate.tokens import SequenceSplit
from hybridiff_xdit.ranks.comm import Comm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gap(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.set_ip_adapter_scale(0.25),
        lambda pipe: torch.set_float32_matmul_precision("high"),
    ],
    ids=["an IP-Adapter's scale", "TF32"],
)
def test_a_graph_is_of_the_state_it_was_captured_in(change):  # 6
    name, precision = "sd15 ip-adapter", torch.get_float32_matmul_precision()
    pipe = zoo_batched.CASES[name].build().to("cuda")
    try:
        apply_hybrid(pipe, HybridConfig(policy="cfg"), simulate=True)
        for _ in range(2):
            zoo_batched.call(pipe, name)
        change(pipe)
        found = zoo_batched.call(pipe, name)
        apply_hybrid(pipe, HybridConfig(policy="cfg", cuda_graphs=False), simulate=True)
        assert torch.equal(found, zoo_batched.call(pipe, name))
    finally:
        torch.set_float32_matmul_precision(precision)


def test_the_generators_of_the_gpus_are_the_users():  # 7
    pipe = tiny.PIPELINES["sd15"]().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    before = torch.cuda.get_rng_state()
    apply_hybrid(pipe, HybridConfig(plan="FFSF"), simulate=True)
    tiny.call(pipe, "sd15", num_inference_steps=4, latents=tiny.noise("sd15"))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def attention(comm):
    """Of a shard's queries to all tokens, which are gathered."""

    def attend(image, text):
        image = [image[0], *(torch.cat(comm.all_gather(tensor.contiguous()), dim=2) for tensor in image[1:])]
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True)) if text else image
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    return attend


def split(fails_on):
    """(latents, graphs that hold them) of two requests on two ranks that split the tokens."""
    pipe = tiny.PIPELINES["sd3"]().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    across, capture, captured = Comm(), graphs._capture, []

    def captures(piece, pool):
        if dist.get_rank() == fails_on:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured.append(piece)
        return capture(piece, pool)

    apply_hybrid(pipe, HybridConfig(policy="cfg"), group=alone, sequence=SequenceSplit(across, attention(across)))
    with mock.patch.object(graphs, "_capture", captures):
        found = [tiny.call(pipe, "sd3").cpu() for _ in range(2)]
    return found, len(captured)


@pytest.mark.parametrize("fails_on", [None, 0, 1])
def test_ranks_that_split_tokens_all_capture_or_none(pair, fails_on):  # 25
    expected = tiny.call(tiny.pipeline("sd3"), "sd3")
    for found, captured in pair.run(split, fails_on):
        assert all(gap(latents, expected) < 1e-4 for latents in found)
        assert captured or fails_on is not None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("fields", [dict(policy="cfg"), dict(plan="FFSFPPFSSF")], ids=str)
def test_a_pipeline_need_not_be_on_the_current_device(fields):  # 26
    found = []
    for device, current in (("cuda:0", 0), ("cuda:1", 0)):
        pipe = tiny.PIPELINES["sd3"]().to(device)
        pipe.set_progress_bar_config(disable=True)
        apply_hybrid(pipe, HybridConfig(**fields), simulate=True)
        with torch.cuda.device(current):
            found.append((tiny.call(pipe, "sd3").cpu(), last_report(pipe)["discrepancy"]))
            assert torch.cuda.current_device() == current
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
