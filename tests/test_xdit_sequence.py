"""SD3 under hybrid-cond with a branch's tokens split by xDiT's Ulysses and ring attention, on gloo ranks.

The oracle is a plain loop on one process. Groups and exchanges are xDiT's own; `compat` says what stands in on a CPU.
"""

import oracle
import pytest
import tiny
import torch
import xdit_tiny
from diffusers import DiffusionPipeline
from test_xdit_runs import TESTS, torchrun

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {
    "ulysses-2": ("sd3", 4, ["--ulysses_degree", 2]),
    "ring-2, dual attention": ("sd35", 4, ["--ring_degree", 2, "--attention_backend", "sdpa_flash"]),
    "ulysses-4": ("sd35", 8, ["--ulysses_degree", 4]),
    "ulysses-2 x ring-2": (
        "sd3",
        8,
        ["--ulysses_degree", 2, "--ring_degree", 2, "--attention_backend", "sdpa_flash"],
    ),
}
RULES = {"cfg": "reuse", "reuse": "reuse", "deferred": "deferred", "adaptive": "deferred"}


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, tmp_path_factory):
    """(pipeline of the checkpoint, degree of the split, what each rank saved)."""
    name, processes, flags = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("models")
    xdit_tiny.save("sd3", folder)
    pipe = DiffusionPipeline.from_pretrained(folder / "sd3", **xdit_tiny.ABSENT["sd3"])
    pipe.set_progress_bar_config(disable=True)
    if name == "sd35":
        pipe.transformer = tiny.mmdit(dual_attention_layers=(0, 1), qk_norm="rms_norm")
        pipe.save_pretrained(folder / name)
    torchrun(TESTS / "xdit_sequence_worker.py", folder, name, *flags, processes=processes)
    ranks = [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(processes)]
    return pipe, processes // 2, ranks


@pytest.mark.parametrize("case", RULES)
def test_it_is_the_oracle(run, case):
    pipe, degree, ranks = run
    latents, report = ranks[0][case]
    found = ranks[0][case][1]["plan"]
    assert set(found) > {"F"} or case == "cfg"
    expected, _ = oracle.denoise(
        pipe, tiny.prompt("sd3"), tiny.noise("sd3"), plan=found, rule=RULES[case], cut=oracle.CUTS["sd3"]
    )
    assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(torch.equal(rank[case][0], latents) for rank in ranks)
    assert all(rank[case][1]["plan"] == found for rank in ranks)
    assert report["world_size"] == len(ranks) and report["sequence_degree"] == degree


def test_a_shard_of_the_boundary_is_sent(run):
    """Both ranks send their prediction on FULL steps; on the one PIPELINED step before another, a shard crosses."""
    _, degree, ranks = run
    latent = 4 * 16 * 16 * 16
    tokens = 4 * 32 * (64 // degree + tiny.TOKENS)
    agreed = 8 * 12  # one digest a fact, when the run begins
    header = 16
    full, pipelined, crossing = 6, 4, 1
    for place in range(degree):
        first, second = ranks[place]["reuse"][1]["bytes_sent"]
        assert first == agreed + full * (latent + header) + crossing * tokens
        assert second == agreed + full * (latent + header) + pipelined * latent


def test_the_groups_are_xdits(run):
    _, degree, ranks = run
    assert [rank["groups"][0] for rank in ranks] == [[i % degree, i % degree + degree] for i in range(2 * degree)]
    assert [rank["groups"][1] for rank in ranks] == [False] * (2 * degree - 1) + [True]


def test_removal_restores_the_pipeline(run):
    pipe, _, ranks = run
    assert ranks[0]["processors"] == [{"_Processor"}, {"JointAttnProcessor2_0"}]
    assert torch.equal(ranks[0]["plain"], tiny.call(pipe, "sd3"))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("seed", "the ranks started with different initial noise"),
        ("drift", "at step 4 the ranks' latents or prompts are no longer the same"),
        ("tokens", "25 image tokens cannot be split over"),
    ],
)
def test_every_rank_raises_the_same_error(run, case, words):
    errors = {rank[case] for rank in run[2]}
    assert len(errors) == 1 and words in errors.pop()
