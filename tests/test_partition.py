"""The parts in order are the denoiser itself, and the cut halves the cost. No process, no weights of real size."""

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
from diffusers import (
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode

from hybridiff_xdit.evaluate.calls import Call
from hybridiff_xdit.evaluate.stages.cuts import Segment
from hybridiff_xdit.evaluate.stages.families import read
from hybridiff_xdit.evaluate.tokens import SequenceSplit
from hybridiff_xdit.planner.denoisers import SD3_MEDIUM, SD35_MEDIUM, SDXL, build
from hybridiff_xdit.seam.hooks import denoiser_of
from hybridiff_xdit.trees import modules_of


def random(*shape: int, device: str = "cpu") -> torch.Tensor:
    generator = None if device == "meta" else torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, device=device)


def inputs(denoiser, size=(16, 16), batch: int = 1, tokens: int = 7, device: str = "cpu") -> dict:
    """One branch's arguments of the denoiser's forward."""
    config = denoiser.config
    latent = random(batch, config.in_channels, *size, device=device)
    if isinstance(denoiser, SD3Transformer2DModel):
        return {
            "hidden_states": latent,
            "timestep": torch.full((batch,), 500.0, device=device),
            "encoder_hidden_states": random(batch, tokens, config.joint_attention_dim, device=device),
            "pooled_projections": random(batch, config.pooled_projection_dim, device=device),
            "return_dict": False,
        }
    text = random(batch, tokens, config.cross_attention_dim, device=device)
    given = {"sample": latent, "timestep": torch.tensor(500), "encoder_hidden_states": text, "return_dict": False}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        time_ids = torch.full((batch, 6), 16.0, device=device)
        given["added_cond_kwargs"] = {"text_embeds": random(batch, pooled, device=device), "time_ids": time_ids}
    return given


def call(denoiser, given: dict) -> Call:
    return Call(denoiser, denoiser, given)


def names(denoiser, given: dict) -> list[str]:
    return list(read(denoiser).names(call(denoiser, given)))


def by_segments(denoiser, given: dict, segments=None) -> torch.Tensor:
    """Each stage reads what the one before it left, and goes on with what its own segment before left."""
    anatomy, asked = read(denoiser), call(denoiser, given)
    left, by_stage = None, {}
    for segment in segments or anatomy.partition(asked).segments:
        left = anatomy.evaluate(segment, asked, by_stage.get(segment.stage), left and left.boundary)
        by_stage[segment.stage] = left
    (pred,) = left.boundary
    assert not left.skips
    return pred


def segments(denoiser, given: dict) -> list[tuple]:
    """(first unit, last unit, stage, age) of each segment."""
    units = names(denoiser, given)
    found = read(denoiser).partition(call(denoiser, given)).segments
    return [(units[s.start], units[s.stop - 1], s.stage, s.age) for s in found]


DENOISERS = {
    "sd3": lambda: tiny.sd3().transformer,
    "sd3 of odd depth": lambda: tiny.sd3(num_layers=3).transformer,
    "sd3.5": lambda: tiny.mmdit(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm"),
    "sdxl": lambda: tiny.sdxl().unet,
    "sd15": lambda: tiny.sd15().unet,
    "v-prediction, upcast, centred": lambda: tiny.unet(center_input_sample=True, resnet_time_scale_shift="scale_shift"),
    "two levels": lambda: tiny.unet(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    ),
}

# Sides that are no multiple of the downsampling come to the upsamplers as sizes. (SD3 wants even sides.)
SIZES = {"sd3": [(16, 16), (10, 14), (20, 28)], "unet": [(16, 16), (20, 28), (10, 14), (11, 13), (6, 5)]}
CASES = [(name, size) for name in DENOISERS for size in SIZES["sd3" if name.startswith("sd3") else "unet"]]


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
@torch.no_grad()
def test_stages_in_turn_are_the_denoiser_bit_for_bit(name, size):
    denoiser = DENOISERS[name]()
    given = inputs(denoiser, size, batch=2)
    assert torch.equal(by_segments(denoiser, given), denoiser(**given)[0])


@pytest.mark.parametrize("cut", [1, 2, 3])
@torch.no_grad()
def test_blocks_may_be_cut_anywhere(cut):
    denoiser = DENOISERS["sd3"]()
    given = inputs(denoiser)
    found = by_segments(denoiser, given, [Segment(0, cut, 0, 0), Segment(cut, 4, 1, 1)])
    assert torch.equal(found, denoiser(**given)[0])


@pytest.mark.parametrize("cast", ["autocast", "weights"])
@pytest.mark.parametrize("name", ["sd3", "sd3.5", "sdxl", "sd15"])
@torch.no_grad()
def test_stages_in_turn_are_the_denoiser_in_bfloat16(name, cast):
    denoiser = DENOISERS[name]()
    given = inputs(denoiser)
    if cast == "weights":
        denoiser.to(torch.bfloat16)
        given = {k: v.bfloat16() if k != "timestep" and isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with torch.autocast("cpu", torch.bfloat16) if cast == "autocast" else nullcontext():
        expected, found = denoiser(**given)[0], by_segments(denoiser, given)
    assert torch.equal(found, expected)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["sd3", "sdxl", "sd15"])
@torch.no_grad()
def test_a_whole_forward_leaves_the_boundary(name):
    """What it leaves is what the last stage needs to come to the same end."""
    denoiser = DENOISERS[name]()
    anatomy, asked = read(denoiser), call(denoiser, inputs(denoiser))
    *down, _, last = anatomy.partition(asked).segments[-3:]
    output, (boundary,) = anatomy.watch(asked, [last.start])
    assert torch.equal(output[0], denoiser(**asked.inputs)[0])
    assert tuple((t.shape, t.dtype) for t in boundary) == anatomy.counted(asked).shapes[last.start - 1]
    before = anatomy.evaluate(down[0], asked, None, None) if down else None
    assert torch.equal(anatomy.evaluate(last, asked, before, boundary).boundary[0], output[0])


# Where the cut lies.


def test_the_tiny_denoisers_are_cut_where_the_oracle_cuts_them():
    denoiser = DENOISERS["sd3"]()
    assert segments(denoiser, inputs(denoiser)) == [
        ("transformer_blocks.0", f"transformer_blocks.{oracle.CUTS['sd3'] - 1}", 0, 0),
        (f"transformer_blocks.{oracle.CUTS['sd3']}", "transformer_blocks.3", 1, 1),
    ]
    for name in ("sdxl", "sd15"):
        denoiser = DENOISERS[name]()
        assert segments(denoiser, inputs(denoiser))[1] == (*oracle.CUTS[name], 0, 0)


@pytest.mark.parametrize("name", ["sdxl", "sd15", "two levels"])
def test_the_inner_part_of_a_unet_reads_only_skips_of_its_own(name):
    denoiser = DENOISERS[name]()
    anatomy = read(denoiser)
    down, inner, up = anatomy.partition(call(denoiser, inputs(denoiser))).segments
    assert [(s.stage, s.age) for s in (down, inner, up)] == [(1, 0), (0, 0), (1, 1)]
    skips = 0
    for unit in anatomy.units[inner.start : inner.stop]:
        skips += unit.pushes - unit.pops
        assert skips >= 0
    assert skips == 0
    assert anatomy.units.index(next(u for u in anatomy.units if u.name == "mid_block")) in range(*inner[:2])


def on_meta(model: type, **config) -> torch.nn.Module:
    with torch.device("meta"):
        return model(**config).eval()


def sdxl_of_real_size() -> UNet2DConditionModel:
    with torch.device("meta"):
        return build(SDXL)


def sd3_of_real_size(settings=SD3_MEDIUM) -> SD3Transformer2DModel:
    with torch.device("meta"):
        return build(settings)


@pytest.fixture(scope="module")
def sdxl_of_real_size_():
    denoiser = sdxl_of_real_size()
    given = inputs(denoiser, (128, 128), tokens=77, device="meta")
    return denoiser, given, read(denoiser).partition(call(denoiser, given))


def test_sdxl_nests_around_its_deepest_level(sdxl_of_real_size_):
    denoiser, given, partition = sdxl_of_real_size_
    assert sum(p.numel() for p in denoiser.parameters()) == 2_567_463_684  # it is SDXL
    down, inner, up = segments(denoiser, given)
    assert down[0] == "conv_in" and up[1] == "conv_out"
    assert inner[0].startswith(("down_blocks.1.", "down_blocks.2."))
    assert inner[1].startswith("up_blocks.0.")
    share = partition.flops[0] / sum(partition.flops)
    assert 0.4 <= share <= 0.6
    ((shape, _),) = read(denoiser).counted(call(denoiser, given)).shapes[partition.cut]
    assert shape == (1, 1280, 32, 32)  # as published: one tensor crosses back


def test_sdxl_flops_are_those_of_the_whole(sdxl_of_real_size_):
    denoiser, given, partition = sdxl_of_real_size_
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(**given)
    # The time embedding is made by every rank, and belongs to none.
    assert sum(partition.flops) == pytest.approx(counter.get_total_flops(), rel=1e-4)


def test_sd3_medium_is_cut_in_the_middle():
    denoiser = sd3_of_real_size()
    assert sum(p.numel() for p in denoiser.parameters()) == pytest.approx(2.03e9, rel=0.01)  # it is SD3-medium
    given = inputs(denoiser, (128, 128), tokens=333, device="meta")
    front, back = segments(denoiser, given)
    assert front == ("transformer_blocks.0", "transformer_blocks.11", 0, 0)
    assert back == ("transformer_blocks.12", "transformer_blocks.23", 1, 1)
    anatomy, asked = read(denoiser), call(denoiser, given)
    partition = anatomy.partition(asked)
    boundary = anatomy.counted(asked).shapes[partition.cut]
    assert [shape for shape, _ in boundary] == [(1, 4096, 1536), (1, 333, 1536)]
    assert partition.flops == sd3_flops(24, 12, width=1536, image=4096, text=333)


def sd3_flops(layers: int, cut: int, width: int, image: int, text: int) -> tuple[int, int]:
    """By pencil and paper: 2 FLOPs a multiplication, linear layers and attention; (front, back)."""
    tokens = image + text
    attention = 2 * 2 * tokens * tokens * width
    modulation = 2 * width * 6 * width * 2  # of one vector, for both streams
    block = 2 * tokens * width * width * (3 + 1 + 8) + attention + modulation
    no_text_out = 2 * text * width * width * (1 + 8) + 2 * width * 4 * width  # what the last block leaves out
    vectors = 2 * width * (256 + width + 2048 + width)  # the time's and the pooled text's embeddings
    embed = 2 * image * width * 2 * 2 * 16 + 2 * text * width * 4096 + vectors
    out = 2 * width * 2 * width + 2 * image * width * 2 * 2 * 16
    return embed + cut * block, (layers - cut) * block - no_text_out + out


def test_sd35_counts_its_second_attention():
    """SD3.5-medium: the first 13 of 24 blocks have one more attention, so the cut lies before the middle."""
    denoiser = sd3_of_real_size(SD35_MEDIUM)
    given = inputs(denoiser, (128, 128), tokens=333, device="meta")
    partition = read(denoiser).partition(call(denoiser, given))
    assert segments(denoiser, given)[0][1] in ("transformer_blocks.9", "transformer_blocks.10")
    assert 0.45 <= partition.flops[0] / sum(partition.flops) <= 0.55


@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_measured_time_moves_the_cut(noise):
    """SD3, the first of whose blocks take three times as long as their FLOPs tell; and noise that shall not matter."""
    denoiser = sd3_of_real_size()
    given = inputs(denoiser, (128, 128), tokens=333, device="meta")
    anatomy, asked = read(denoiser), call(denoiser, given)
    units = anatomy.names(asked)
    seconds = [3e-3 if name in units[:8] else 1e-3 for name in units]
    generator = torch.Generator().manual_seed(0)
    seconds = tuple(t * (1 + noise * torch.randn((), generator=generator).item()) for t in seconds)
    whole = sum(seconds)
    expected = min(range(1, 24), key=lambda cut: max(sum(seconds[:cut]), whole - sum(seconds[:cut])))
    front, _ = anatomy.partition(asked, seconds=seconds).segments
    assert front.stop == expected == 7
    assert anatomy.partition(asked).segments[0].stop == 12


def test_times_that_are_alike_leave_the_cut_of_the_flops(sdxl_of_real_size_):
    denoiser, given, partition = sdxl_of_real_size_
    anatomy, asked = read(denoiser), call(denoiser, given)
    flops = anatomy.counted(asked).flops
    for seed in range(20):
        noise = torch.randn(len(flops), generator=torch.Generator().manual_seed(seed)).mul(0.005).add(1).tolist()
        seconds = tuple(count * factor for count, factor in zip(flops, noise, strict=True))
        assert anatomy.partition(asked, seconds=seconds).segments == partition.segments


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_measuring_leaves_the_denoiser_as_it_was(name):
    denoiser = DENOISERS[name]()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    given = inputs(denoiser)
    with torch.no_grad():
        expected = denoiser(**given)[0]
        read(denoiser).partition(call(denoiser, given))
        assert torch.equal(denoiser(**given)[0], expected)
    assert all(torch.equal(before[name], value) for name, value in denoiser.state_dict().items())
    assert not any("_compiled_call_impl" in vars(module) or "forward" in vars(module) for module in denoiser.modules())


# What is refused.


def test_a_structure_that_is_not_understood_is_refused():
    with pytest.raises(ValueError, match=r"Linear.*--parallel cfg"):
        read(torch.nn.Linear(2, 2))


def test_a_unet_of_other_blocks_is_refused():
    denoiser = tiny.unet(down_block_types=("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"))
    with pytest.raises(ValueError, match=r"UNet2DConditionModel with AttnDownBlock2D.*--parallel cfg"):
        read(denoiser)


def test_one_block_is_not_enough():
    denoiser = tiny.mmdit(num_layers=1)
    with pytest.raises(ValueError, match="too shallow"):
        segments(denoiser, inputs(denoiser))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("sdxl", "mid_block_additional_residual"),
        ("sdxl", "down_block_additional_residuals"),
        ("sd15", "down_intrablock_additional_residuals"),
    ],
)
def test_controlnet_and_adapter_inputs_of_a_unet_are_refused(name, extra):
    denoiser = DENOISERS[name]()
    assert extra in inspect.signature(type(denoiser).forward).parameters
    given = inputs(denoiser)
    read(denoiser).check_inputs(call(denoiser, given))
    read(denoiser).check_inputs(call(denoiser, {**given, extra: None}))
    with pytest.raises(ValueError, match=rf"{extra}.*--hybrid_policy cfg"):
        read(denoiser).check_inputs(call(denoiser, {**given, extra: (torch.zeros(1),)}))


@torch.no_grad()
def test_a_controlnet_of_blocks_is_split_with_them():
    denoiser = DENOISERS["sd3"]()
    given = {**inputs(denoiser), "block_controlnet_hidden_states": [random(1, 64, 32) for _ in range(2)]}
    expected = denoiser(**given)[0]
    assert torch.equal(by_segments(denoiser, given), expected)
    assert not torch.equal(denoiser(**inputs(denoiser))[0], expected)


def test_freeu_is_refused():
    pipe = tiny.sdxl()
    given = inputs(pipe.unet)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    with pytest.raises(ValueError, match=r"FreeU.*disable_freeu"):
        read(pipe.unet).check_inputs(call(pipe.unet, given))
    pipe.disable_freeu()
    read(pipe.unet).check_inputs(call(pipe.unet, given))


def test_gligen_is_refused():
    unet = DENOISERS["sdxl"]()
    with pytest.raises(ValueError, match="GLIGEN"):
        read(unet).check_inputs(call(unet, {**inputs(unet), "cross_attention_kwargs": {"gligen": {}}}))


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_the_modules_of_a_denoiser_are_pytorchs(name):
    denoiser = denoiser_of(tiny.pipeline(name))
    assert sorted(map(id, modules_of(denoiser))) == sorted(map(id, denoiser.modules()))


def test_a_shard_of_the_tokens_is_counted_apart():
    """A denoiser is counted once for good: what was found of all tokens must not size a shard's transfers."""
    model = tiny.mmdit()
    anatomy, split = read(model), SequenceSplit(SimpleNamespace(size=2, rank=1), attention=None)

    def tokens():
        (image, _), (text, _) = anatomy.counted(call(model, inputs(model))).shapes[1]
        return image[1], text[1]

    assert tokens() == (64, 7)
    split.apply(anatomy)
    assert tokens() == (32, 7)
    split.remove()
    assert tokens() == (64, 7)
