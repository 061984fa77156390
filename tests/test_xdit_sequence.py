"""SD3 under hybrid-cond with a branch's tokens split by xDiT's Ulysses and ring attention, on gloo ranks.

Alone, and beside more than two stages. The oracle is a plain loop on one process. Groups and exchanges are xDiT's own;
`compat` says what stands in on a CPU.
"""

from types import SimpleNamespace

import nursery
import oracle
import pytest
import tiny
import torch

pytestmark = pytest.mark.usefixtures("one_thread")

#: Pipeline, stages, ranks of a sequence group, and xDiT's flags.
LAYOUTS = {
    "ulysses-2 x ring-2, dual attention": (
        *("sd35", 2, 4),
        ["--ulysses_degree", 2, "--ring_degree", 2, "--attention_backend", "sdpa_flash"],
    ),
    "ulysses-2 x 4 stages": ("sd3", 4, 2, ["--ulysses_degree", 2, "--pipefusion_parallel_degree", 2]),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, tmp_path_factory):
    """(pipeline, stages, degree of the split, what each rank saved)."""
    name, stages, degree, flags = LAYOUTS[request.param]
    processes = stages * degree
    folder = tmp_path_factory.mktemp("sequence")
    nursery.run(nursery.TESTS / "xdit_sequence_worker.py", folder, name, *flags, processes=processes)
    ranks = [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(processes)]
    return tiny.pipeline(name), stages, degree, ranks


@pytest.mark.parametrize("case", ["cfg", "reuse", "deferred", "adaptive"])
def test_it_is_the_oracle(run, case):
    pipe, stages, degree, ranks = run
    latents, report = ranks[0][case]
    found = ranks[0][case][1]["plan"]
    assert set(found) > {"F"} or case == "cfg"
    rule, cut = report["config"]["guidance"], {2: oracle.CUTS["sd3"], 4: oracle.STAGE_CUTS["sd3", 4]}[stages]
    expected, _ = oracle.denoise(pipe, tiny.prompt("sd3"), tiny.noise("sd3"), plan=found, rule=rule, cut=cut)
    assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(torch.equal(rank[case][0], latents) for rank in ranks)
    assert all(rank[case][1]["plan"] == found for rank in ranks)
    assert report["world_size"] == len(ranks) and report["sequence_degree"] == degree


def test_a_shard_of_the_boundary_is_sent(run):
    """On the one PIPELINED step before another, and with four stages on FULL steps too."""
    _, stages, degree, ranks = run
    latent = 4 * 16 * 16 * 16
    tokens = 4 * 32 * (64 // degree + tiny.TOKENS)
    agreed = 8 * 24 * (stages - 1)  # one digest a fact, when the run begins
    full, pipelined, crossing = 6, 4, 1
    if stages == 2:  # both ranks send a header and their prediction on FULL steps
        common = agreed + 3 * 16 + full * (latent + 16)  # three headers alone, while the calls are learnt
        counts = [crossing * tokens, pipelined * latent]
    else:  # on FULL steps a branch's first rank sends into its second, that its prediction to all; and all a header,
        common = agreed + (full + 1) * 3 * 16  # and one more when the first step has been learnt
        counts = [
            full * tokens + crossing * tokens,
            full * 3 * latent + crossing * tokens,
            full * tokens + crossing * tokens,
            full * 3 * latent + pipelined * 3 * latent,
        ]
    for place in range(degree):
        assert ranks[place]["reuse"][1]["bytes_sent"] == [common + count for count in counts]


def test_the_groups_are_xdits(run):
    _, stages, degree, ranks = run
    for i, rank in enumerate(ranks):
        place, half = i % degree, stages // 2
        assert rank["group"] == list(range(place, stages * degree, degree))
        branches, branch, hands_out = rank["xdit's"]
        stage = branch.index(i)
        assert branch in (rank["group"][:half], rank["group"][half:])
        assert branches == [rank["group"][stage], rank["group"][half + stage]]
        assert hands_out == (i == stages * degree - 1)


def test_nothing_waits_in_a_circle(run):
    ranks = run[-1]
    assert all(torch.equal(rank["waiting"], ranks[0]["reuse"][0]) for rank in ranks)


def test_removal_restores_the_pipeline(run):
    pipe, *_, ranks = run
    assert ranks[0]["processors"] == [{"_Processor"}, {"JointAttnProcessor2_0"}]
    assert torch.equal(ranks[0]["plain"], tiny.call(pipe, "sd3"))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("seed", "the ranks started with different initial noise"),
        ("drift", "the ranks' latents are no longer the same"),
        ("tokens", "25 image tokens cannot be split over"),
    ],
)
def test_every_rank_raises_the_same_error(run, case, words):
    (error,) = {rank[case] for rank in run[-1]}
    assert words in error
    assert case != "drift" or "at step 4 " in error


def test_what_the_attention_does_not_take_is_refused(monkeypatch):
    from hybridiff_xdit.xdit import sequence

    backends = sequence.AttentionBackendType
    state = SimpleNamespace(attention_backend=backends.CUDNN)
    monkeypatch.setattr(sequence, "get_runtime_state", lambda: state)
    monkeypatch.setattr(sequence, "get_ring_parallel_world_size", lambda: 1)
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match=r"float32, which xDiT's attention CUDNN .* --attention_backend sdpa"):
        sequence.check_attention(gpu, torch.float32)
    sequence.check_attention(gpu, torch.float16)
    sequence.check_attention(torch.device("cpu"), torch.float32)
    state.attention_backend = backends.SDPA
    sequence.check_attention(gpu, torch.float32)
    monkeypatch.setattr(sequence, "get_ring_parallel_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"ring attention .* --attention_backend sdpa_flash"):
        sequence.check_attention(gpu, torch.float16)
