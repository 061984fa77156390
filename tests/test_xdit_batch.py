"""Pictures dealt out to pairs of ranks, xDiT's data parallel groups: those of one process, in order."""

import json

import nursery
import pytest
import tiny
import torch
import xdit_tiny
from xdit_batch_worker import CASES, COMMON

from hybridiff_xdit.xdit.batch import Share, deal, share_of

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {  # processes, groups, nodes, flags
    "2 pairs x ulysses-2": (8, 2, 1, ["--data_parallel_degree", 2, "--ulysses_degree", 2]),
    "2 pairs, their decoders split": (4, 2, 1, ["--data_parallel_degree", 2, "--use_parallel_vae"]),
    "ulysses-2 on 2 nodes, the decoder split": (4, 1, 2, ["--ulysses_degree", 2, "--use_parallel_vae"]),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, tmp_path_factory):
    processes, groups, nodes, flags = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("batch")
    command = (nursery.TESTS / "xdit_batch_worker.py", folder, *flags)
    if nodes == 1:
        nursery.run(*command, processes=processes)
    else:
        shape = (f"--nproc_per_node={processes // nodes}", f"--nnodes={nodes}", f"--master_port={nursery.free_port()}")
        torchrun = ("-m", "torch.distributed.run", *shape)
        nursery.launch(*((*torchrun, f"--node_rank={node}", *command) for node in range(nodes)))
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
    return folder, groups, ranks, "pt" if "--use_parallel_vae" in flags else "latent"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_they_are_the_pictures_of_one_process(run, name, case):
    _, groups, ranks, output_type = run
    if (name, case) not in ranks[0]:
        assert name == "sdxl"  # no sequence to split
        return
    pipe = xdit_tiny.pipeline(name)
    call = {**CASES[case], **COMMON, "output_type": output_type}
    expected = pipe(**call, generator=xdit_tiny.generator()).images
    size = len(ranks) // groups
    handed_out = [rank[name, case] for rank in ranks]
    shares = [torch.stack(images) if images else [] for images in handed_out[size - 1 :: size]]
    assert not any(images for i, images in enumerate(handed_out) if (i + 1) % size)  # the last of each group does
    count = -(-len(expected) // groups)
    assert [len(share) for share in shares] == [len(part) for part in _padded(expected.split(count), groups)]
    found = torch.cat([share for share in shares if len(share)])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def _padded(parts, count):
    return [*parts, *([[]] * (count - len(parts)))]


def test_of_the_axes_of_a_picture_only_the_branches_cross_nodes(run):
    _, _, ranks, _ = run
    node = [rank["node"] for rank in ranks]
    for rank in ranks:
        branches, sequence = rank["ranks"]
        assert len({node[i] for i in sequence}) == 1
        assert len({node[i] for i in branches}) == len(set(node))


def test_one_report_is_written(run):
    folder, _, ranks, _ = run
    report = json.loads((folder / "report-sd3" / "report.json").read_text())
    assert report["plan"] == ranks[0]["sd3", "plan"] == "FF"


@pytest.mark.parametrize(
    ("count", "groups", "shares"),
    [
        (4, 2, [(0, 2), (2, 4)]),
        (5, 2, [(0, 3), (3, 5)]),
        (1, 3, [(0, 1), (1, 1), (1, 1)]),
        (3, 4, [(0, 1), (1, 2), (2, 3), (3, 3)]),
    ],
)
def test_shares(count, groups, shares):
    assert [share_of(count, group, groups) for group in range(groups)] == [Share(*share) for share in shares]


def test_every_argument_is_dealt_out():
    pipe = tiny.pipeline("sd3")
    prompts = tiny.prompt("sd3", 3)
    call = {**prompts, "num_images_per_prompt": 2, "height": 32, "generator": [torch.Generator() for _ in range(6)]}
    second = deal(pipe, call, 1, 2)
    assert second["num_images_per_prompt"] == 1 and second["height"] == 32
    for name, tensor in prompts.items():
        assert torch.equal(second[name], tensor[[1, 2, 2]])
    assert second["generator"] == call["generator"][3:]
    assert second["latents"] is None
    latents = torch.arange(6.0)
    second = deal(pipe, {"prompt": list("abc"), "num_images_per_prompt": 2, "latents": latents}, 1, 4)
    assert second["prompt"] == ["b", "b"] and second["latents"].tolist() == [2, 3] and second["generator"] is None
    assert deal(pipe, {"prompt": "a", "latents": latents[:1]}, 1, 2) is None


def test_noise_needs_a_seed():
    with pytest.raises(ValueError, match="--data_parallel_degree needs generator"):
        deal(tiny.pipeline("sd3"), {"prompt": "a"}, 0, 2)
