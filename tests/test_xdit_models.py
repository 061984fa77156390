"""The models of xDiT's runner under hybrid-cond, and pipelines that have none there: tiny checkpoints of each.

What is compared with is the runner's own model on one process, without the strategy, and with its own Ulysses on two.
"""

import json
import re

import pytest
import torch
import zoo_batched
import zoo_successive
from diffusers import LTX2VideoDiffusionDecoderModel
from diffusers.pipelines.ltx2 import LTX2Vocoder
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from nursery import TESTS, run
from peft import LoraConfig, get_peft_model_state_dict

from hybridiff_xdit import HybridConfig
from hybridiff_xdit.xdit import catalogue, compat, models

pytestmark = pytest.mark.usefixtures("one_thread")

ZOO = {**zoo_successive.CASES, **zoo_batched.CASES}
ZOO |= dict.fromkeys(("ltx2.3", "ltx2.5"), ZOO["ltx2"])

#: By case, the class of the denoiser: xDiT's own, or diffusers' where the runner has no model for the pipeline.
MODELS = {
    "wan21-unipc": "xFuserWanTransformer3DWrapper",
    "wan22": "xFuserWanTransformer3DWrapper",
    "wan21-i2v": "xFuserWanTransformer3DWrapper",
    "wan22-i2v": "xFuserWanTransformer3DWrapper",
    "wan22-ti2v": "xFuserWanTransformer3DWrapper",
    "wan21-vace": "xFuserWanVACETransformer3DWrapper",
    "qwen": "xFuserQwenImageTransformerWrapper",
    "qwen-edit": "xFuserQwenImageTransformerWrapper",
    "hunyuan-video15": "xFuserHunyuanVideo15Transformer3DWrapper",
    "lumina2": "xFuserLumina2Transformer2DWrapper",
    "krea2": "xFuserKrea2Transformer2DWrapper",
    "flux": "xFuserFlux1Transformer2DWrapper",
    "flux2-klein": "xFuserFlux2Transformer2DWrapper",
    **dict.fromkeys(("ltx2", "ltx2.3", "ltx2.5"), "xFuserLTX2VideoTransformer3DWrapper"),
    "cosmos3": "xFuserCosmos3OmniTransformerWrapper",
    "ideogram4": "xFuserIdeogram4Transformer2DWrapper",
    "z-image": "ZImageTransformer2DModel",
    "pixart": "PixArtTransformer2DModel",
    "kolors": "NoneType",  # a U-Net
    "kandinsky5": "Kandinsky5Transformer3DModel",
}
#: What their models are given to start from.
PICTURES = {"wan21-i2v": ["image"], "wan22-i2v": ["image"], "qwen-edit": ["image"], "wan21-vace": ["first", "last"]}
#: Where on the hub xDiT's models look for what these folders hold.
HUB = {
    "ltx2.3": ("dg845/LTX-2.3-Diffusers", "Lightricks/LTX-2.3", "dg845/LTX-2.3-Spatial-Upsampler-Diffusers"),
    "ltx2.5": ("Lightricks/LTX-2.5-Diffusers",),
}
#: One of each pattern of calls, and a pipeline of xDiT's own kind.
SPLIT = ["wan21-unipc", "qwen", "krea2", "hunyuan-video15", "lumina2", "ideogram4", "ltx2.3"]
SKIPPING = [*SPLIT, "wan22", "flux", "kolors", "cosmos3", "ltx2.5"]
PLAN = "FFFFSFSF"
HYBRID = ["--parallel", "hybrid-cond"]
#: Name, processes, flags and cases of each run.
RUNS = [
    ("plain", 1, [], [*MODELS]),
    ("exact", 2, [*HYBRID, "--hybrid_policy", "cfg"], [*MODELS]),
    ("alone", 1, [*HYBRID, "--hybrid_plan", PLAN], SKIPPING),
    ("skipping", 2, [*HYBRID, "--hybrid_plan", PLAN], SKIPPING),
    ("ulysses", 2, ["--ulysses_degree", "2"], [*SPLIT, "cosmos3"]),
    ("exact-ulysses", 4, [*HYBRID, "--hybrid_policy", "cfg", "--ulysses_degree", "2"], SPLIT),
]


def second_stage(pipe, folder):
    """Add what xDiT's LTX-2 and 2.3 make a second pass with."""
    LTX2LatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1).save_pretrained(
        folder / "latent_upsampler"
    )
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.transformer)
    for name in ("ltx-2-19b", "ltx-2.3-22b"):
        pipe.save_lora_weights(folder, layers, weight_name=f"{name}-distilled-lora-384.safetensors")


def decoders(pipe, folder):
    """Add what its LTX-2.5 makes frames and sound of."""
    pipe.register_modules(vocoder=LTX2Vocoder(in_channels=32, hidden_channels=32))
    pipe.save_pretrained(folder)
    (folder / "transformer_full").symlink_to("transformer")
    small = dict(decoder_head_dim=8, decoder_stage_channels=[8] * 5, decoder_stage_depths=[1] * 5, decoder_t_emb_dim=8)
    small |= dict(decoder_stage_kernels=[[1, 3, 3]] * 4, decoder_stage5_kernel=[1, 3, 3], patch_size=1)
    small |= dict(decoder_upsample_strides=[[1, 1, 1]] * 4, decoder_upsample_channel_reductions=[1] * 4)
    LTX2VideoDiffusionDecoderModel(latent_channels=8, **small).save_pretrained(folder / "diffusion_decoder")


ADDED = {"ltx2": second_stage, "ltx2.3": second_stage, "ltx2.5": decoders}


def save(folder, names):
    """Write a checkpoint of each of these models, and what its pipeline is called with."""
    for name in names:
        pipe = ZOO[name].build()
        call = ZOO[name].kwargs(pipe)
        pipe.save_pretrained(folder / name)
        if name in ADDED:
            ADDED[name](pipe, folder / name)
            # What guides is the model's own choice; but it perturbs a block that there is none of.
            kept = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
            kept += ("spatio_temporal_guidance_blocks",) if name in HUB else ()
            call = {key: value for key, value in call.items() if key in kept or "prompt" in key}
        if name == "ideogram4":
            call |= dict(height=256, width=256)  # xDiT's takes no less
        torch.save(call, folder / name / "call.pt")
        for picture in PICTURES.get(name, ()):
            zoo_successive.picture().save(folder / name / f"{picture}.png")
        for origin in HUB.get(name, ()):
            cache = folder / "hub" / f"models--{origin.replace('/', '--')}"
            (cache / "refs").mkdir(parents=True)
            (cache / "snapshots").mkdir()
            (cache / "refs" / "main").write_text("0" * 40)
            (cache / "snapshots" / ("0" * 40)).symlink_to(folder / name)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By name of the run: what its last rank saved, by case."""
    folder = tmp_path_factory.mktemp("models")
    save(folder, MODELS)
    found = {}
    for name, processes, flags, cases in RUNS:
        run(TESTS / "xdit_models_worker.py", folder, name, json.dumps(flags), *cases, processes=processes)
        found[name] = torch.load(folder / f"{name}-{processes - 1}.pt", weights_only=False)
        errors = {case: result["error"] for case, result in found[name].items() if "error" in result}
        assert not errors
    return found


def same(found, expected, name):
    """As one process evaluates the streams: bit for bit where each is a call, up to rounding where they are a batch."""
    if name in zoo_successive.CASES:
        return torch.equal(found, expected)
    return (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_exact_is_the_runners_own(results, name):
    found = results["exact"][name]
    assert found["report"]["plan"] == "F" * 8
    assert found["denoiser"] == MODELS[name]
    assert same(found["made"], results["plain"][name]["made"], name)


@pytest.mark.parametrize("name", SKIPPING)
def test_skipped_steps(results, name):
    found, alone = results["skipping"][name], results["alone"][name]
    assert found["report"]["plan"] == alone["report"]["plan"] == PLAN
    assert same(found["made"], alone["made"], name)
    assert not torch.equal(found["made"], results["plain"][name]["made"])


@pytest.mark.parametrize("name", MODELS)
def test_every_branch_is_some_ranks(results, name):
    sent = results["exact"][name]["report"]["bytes_sent"]
    # FLUX has one stream, that every rank evaluates; xDiT guides Lumina2 for a quarter of the steps.
    assert (min(sent) > 2 * results["plain"][name]["made"].nbytes) == (name != "flux")


def test_the_catalogue_tells_what_is_tested(results):
    tested = {result["model"] for result in results["exact"].values()} - {"DiffusersModel"}
    # Z-Image runs with diffusers' pipeline; SD3 is tested in test_xdit_runs.
    assert tested == catalogue.TESTED - {"xFuserZImageModel", "xFuserStableDiffusionModel"}


def test_the_catalogue():
    head, *rows = (re.split(r"  +", row) for row in catalogue.table().splitlines())
    assert head == ["--model", "streams a step", "xDiT's own", "--parallel hybrid-cond", "tested"]
    models = {name: row[1:] for row in rows for name in row[0].split(", ")}
    assert models["Wan2.1-T2V"] == ["2", "Ulysses, ring", "branches, Ulysses, ring", "yes"]
    assert models["LTX-2.5-full"] == ["4", "Ulysses, ring", "branches, Ulysses, ring", "yes"]
    assert models["LingBot-Video-MoE"] == ["2", "Ulysses, CFG", "not tried: needs lingbot_video"]
    assert models["Cosmos3-Nano"] == ["2", "Ulysses, ring, CFG", "branches", "yes"]
    assert models["FLUX.1-dev"] == ["1", "Ulysses, ring, PipeFusion", "SKIPPED steps, Ulysses, ring", "yes"]
    assert models["Z-Image"] == ["2", "Ulysses, ring, CFG", "branches", "yes"]
    assert {name for name in compat.models_of_xdit() if "/" not in name} == models.keys() - {
        "FastVideo/FastVideo-FastH3-8-Step-V2"  # which has no other
    }


@pytest.mark.parametrize("name", SPLIT)
def test_branches_beside_xdits_ulysses(results, name):
    found = results["exact-ulysses"][name]
    assert found["report"]["sequence_degree"] == 2
    expected = results["ulysses"][name]["made"]
    assert (found["made"] - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_cosmos3_is_not_split(results):
    plain, split = (results[name]["cosmos3"]["made"] for name in ("plain", "ulysses"))
    assert (split - plain).abs().max() > 0.1 * plain.abs().max()  # else xDiT's split is right by now
    model = models.model_class("Cosmos3-Nano", HybridConfig())
    for flag in ("ulysses_degree", "ring_degree"):
        with pytest.raises(ValueError, match=f"cannot be combined with .*--{flag}.*Drop the flag"):
            model(models.xFuserArgs(model="Cosmos3-Nano", **{flag: 2}))
