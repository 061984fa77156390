"""The trained checkpoints that this repository ships: they load, and two ranks reproduce the oracle with them."""

from functools import cache
from pathlib import Path

import oracle
import pytest
import ranks
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid

MODELS = Path(__file__).parents[1] / "benchmarks" / "models"
#: Number of blocks in front; first and last module of the inner part.
CUTS = {"emoji-sd3": 3, "emoji-sdxl": ("down_blocks.1.attentions.0", "up_blocks.1.resnets.0")}
STEPS = 10


@cache
def load(name):
    pipe = DiffusionPipeline.from_pretrained(MODELS / name, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(ranks.device())


def draw(pipe):
    """Latents, [1, 4, 32, 32]."""
    generator = torch.Generator().manual_seed(0)
    call = dict(num_inference_steps=STEPS, guidance_scale=5.0, generator=generator, output_type="latent")
    return pipe("google style emoji of grinning face", **call).images


def mean_colour(pipe, latents):
    """Size of the picture, and its mean colour."""
    config = pipe.vae.config
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
    image = pipe.image_processor.postprocess(decoded)[0]
    return image.size, image.resize((1, 1)).getpixel((0, 0))


def both(name, fields):
    """(latents, report, latents of the oracle for the plan that came of it, `mean_colour`)."""
    pipe = apply_hybrid(load(name), HybridConfig(**fields))
    latents, report = draw(pipe), last_report(pipe)
    remove_hybrid(pipe)
    if dist.get_rank():
        return latents, report, None, None
    with oracle.inside(pipe, plan=report["plan"], rule=report["config"]["guidance"], cut=CUTS[name]):
        return latents, report, draw(pipe), mean_colour(pipe, latents)


@pytest.mark.parametrize("name", CUTS)
def test_all_full_is_the_two_branches_one_by_one_and_a_grinning_face_is_yellow(pair, name):
    (first, report, one_by_one, (size, (red, green, blue))), (second, *_) = pair.run(both, name, {"policy": "cfg"})
    assert report["plan"] == "F" * STEPS
    assert torch.equal(first, one_by_one)
    assert torch.equal(second, one_by_one)
    assert size == (64, 64)
    assert red > green > blue + 30


@pytest.mark.parametrize(
    ("name", "fields", "estimated"),
    [("emoji-sdxl", {"plan": "2-9/3", "guidance": "reuse"}, 5), ("emoji-sd3", {"speedup": 2.2}, 1)],
    ids=str,
)
def test_steps_that_are_not_full_are_the_oracle(pair, name, fields, estimated):
    (first, report, latents, _), (second, *_) = pair.run(both, name, fields)
    assert STEPS - report["plan"].count("F") == estimated
    assert torch.equal(first, second)
    assert (first - latents).abs().max() < 1e-5 * latents.abs().max()
