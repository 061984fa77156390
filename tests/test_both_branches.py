"""Both branches pipelined on two ranks, against diffusers' own pipeline with one block's output a step old."""

import oracle
import pytest
import ranks
import tiny
import torch
from both_branches import both_branches

from hybridiff_xdit.ranks.comm import Comm, Solo

WARM_UP = 3


def latents_twice(name, is_solo=False):
    pipe = tiny.pipeline(name, ranks.device())
    with both_branches(pipe, WARM_UP, Solo() if is_solo else Comm()):
        return [tiny.call(pipe, name).cpu() for _ in range(2)]


def alone(name):
    return latents_twice(name, is_solo=True)


def one_step_old(name):
    """The pipeline as it is, but after the warm-up the blocks behind the cut read what came before it a step ago."""
    pipe, outputs = tiny.pipeline(name), []

    def old(module, args, output):
        outputs.append(output)
        return output if len(outputs) <= WARM_UP else outputs[-2]

    hook = pipe.transformer.transformer_blocks[oracle.CUTS[name] - 1].register_forward_hook(old)
    try:
        return tiny.call(pipe, name)
    finally:
        hook.remove()


@pytest.mark.usefixtures("one_thread")
def test_it_is_diffusers_with_an_old_boundary(pair):
    expected = one_step_old("sd3")
    for first, again in pair.run(latents_twice, "sd3"):
        assert torch.equal(first, again)
        assert (first - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (tiny.call(tiny.pipeline("sd3"), "sd3") - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_one_process_can_play_both_ranks(pair, name):
    (first, _), (second, _) = pair.run(latents_twice, name)
    assert torch.equal(first, second)
    assert torch.equal(first, pair.run(alone, name)[0][0])
