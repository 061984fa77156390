"""Methods of others that skip: what they leave out is counted as it is, and the pipeline comes back as it was."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import skippers
import tiny
import torch
import zoo_successive
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from skippers import METHODS, skipping

from hybridiff_xdit.measures import psnr

MODELS = Path(skippers.__file__).parent / "models"
STEPS = 12
#: A parameter that skips nothing, one that skips, and the share that is evaluated then, by hand. Taylor: steps 0 to 2,
#: then every second or third, and 11. Spectrum: 0 to 3, 5, 7, 10 and 11. Delta reuse: six whole steps and six halves.
#: DBCache: eight steps to warm up, then one of four blocks.
CASES = {
    "Taylor 1": (1, 2, 8 / 12),
    "Taylor 2": (1, 3, 6 / 12),
    "Spectrum": (None, 2, 8 / 12),
    "delta reuse": (1.0, 0.5, 9 / 12),
    "DeepCache": (1, 2, None),
    "DBCache": (0.0, 1e9, 36 / 48),
    "DBCache + TaylorSeer": (0.0, 1e9, 36 / 48),
}


def draw(name, steps=STEPS):
    return tiny.call(tiny.pipeline(name), name, num_inference_steps=steps, height=16, width=16)


@pytest.mark.parametrize(
    ("name", "method"), [*(("sd3", method) for method in CASES), ("sdxl", "DeepCache"), ("sdxl", "delta reuse")]
)
def test_the_share_is_what_was_evaluated(name, method):
    pipe = tiny.pipeline(name)
    if reason := METHODS[method].why_not(pipe):
        with pytest.raises(ValueError, match=reason), skipping(pipe, method, 1, STEPS):
            pass
        pytest.skip(reason)
    nothing, something, share = CASES[method]
    plain = draw(name)
    if nothing is not None:
        with skipping(pipe, method, nothing, STEPS) as work:
            assert torch.equal(draw(name), plain) and work.share == 1
    with skipping(pipe, method, something, STEPS) as work:
        skipped = draw(name)
        assert not torch.equal(skipped, plain) and work.share == (share or work.share)
        handle = skippers.denoiser_of(pipe).register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(name)
        handle.remove()
        assert torch.equal(draw(name), skipped)  # it begins anew
    with pytest.raises(ValueError, match="12 steps, and the pipeline makes 3"), skipping(pipe, method, 1, STEPS):
        draw(name, steps=3)
    assert torch.equal(draw(name), plain)
    assert "forward" not in vars(skippers.denoiser_of(pipe)) and "set_timesteps" not in vars(pipe.scheduler)


@pytest.mark.parametrize(("method", "nothing"), [("Taylor 1", 1), ("delta reuse", 1.0)])
def test_a_solver_may_evaluate_a_step_twice(method, nothing, monkeypatch):
    monkeypatch.setattr(tiny.pipeline("sd3"), "scheduler", FlowMatchHeunDiscreteScheduler())
    plain = draw("sd3")
    with skipping(tiny.pipeline("sd3"), method, nothing, STEPS) as work:
        assert torch.equal(draw("sd3"), plain) and work.share == 1 and work.asked == 23
    with skipping(tiny.pipeline("sd3"), method, CASES[method][1], STEPS) as work:
        assert not torch.equal(draw("sd3"), plain)
    # Taylor: 0 to 2, 4, 6, 8, 10 and 11, all but the first of two calls. Delta reuse: 0 to 5, then twelve halves.
    assert work.share == (15 / 23 if method == "Taylor 1" else 17 / 23)


def test_deepcache_runs_the_outer_layers():
    pipe, evaluations, seen = tiny.pipeline("sdxl"), [], {}
    handles = [
        pipe.unet.mid_block.register_forward_hook(lambda *_: evaluations.append(1)),
        pipe.unet.up_blocks[-1].resnets[-2].register_forward_hook(lambda *args: seen.update(below=args[-1])),
        pipe.unet.register_forward_pre_hook(
            lambda _, args, names: seen.update(names, sample=args[0], timestep=args[1]), with_kwargs=True
        ),
        pipe.unet.register_forward_hook(lambda *args: seen.update(output=args[-1][0])),
    ]
    draw("sdxl")
    with torch.no_grad():  # what is below is of the same step, so the output is too
        assert torch.equal(skippers.outer_layers(pipe.unet, seen["below"], seen), seen["output"])
    evaluations.clear()
    with skipping(pipe, "DeepCache", 3, STEPS) as work:
        draw("sdxl")
    assert len(evaluations) == 4 and 4 / 12 < work.share < 8 / 12
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "methods"),
    [("emoji-sd3", ("Taylor 1", "DBCache")), ("emoji-sdxl", ("DeepCache", "Spectrum"))],
)
def test_pictures_stay_near(name, methods):
    pipe = DiffusionPipeline.from_pretrained(MODELS / name, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def picture():
        given = {"prompt": "google style emoji of red apple", "height": 32, "width": 32, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        return pipe(**given, guidance_scale=5.0, num_inference_steps=STEPS, generator=generator).images

    plain = picture()
    for method in methods:
        if METHODS[method].applies(pipe):  # cache-dit may not be there
            with skipping(pipe, method, {**CASES, "DBCache": (0.0, 0.3)}[method][1], STEPS) as work:
                assert 15 < psnr(picture(), plain).item() < 60 and 0.4 < work.share < 1, method


# Evaluated of 12 steps of two blocks. MagCache: steps 0, 1, 5 and 9; SeaCache: 0, 3, 6, 9 and 11, by their limits.
WAN = {"DBCache": 20 / 24, "first block": 13 / 24, "MagCache": 4 / 12, "SeaCache": 5 / 12}


@pytest.mark.parametrize("method", WAN)
def test_each_branch_of_a_pipeline_of_two_calls_has_its_own_cache(method, monkeypatch):
    pipe = zoo_successive.wan(zoo_successive._unipc)
    if reason := METHODS[method].why_not(pipe):
        pytest.skip(reason)
    given = zoo_successive._wan_call(pipe)
    del given["num_inference_steps"]
    monkeypatch.setattr(skippers.sample, "arguments", lambda *_, **__: given)  # for the calibration

    def run():
        return pipe(**given, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)).frames

    plain = run()
    with skipping(pipe, method, 0.0, STEPS) as work:
        assert torch.equal(run(), plain) and work.share == 1
    with skipping(pipe, method, 1e9, STEPS) as work:
        assert not torch.equal(run(), plain) and work.share == pytest.approx(WAN[method])
    assert torch.equal(run(), plain)


class Line(torch.nn.Module):
    """A denoiser whose output is linear in the timestep."""

    def forward(self, hidden_states, timestep, return_dict=True):
        return (hidden_states * timestep,)


@pytest.mark.parametrize(("method", "parameter", "share"), [("Taylor 1", 4, 8 / 20), ("delta reuse", 0.5, 15 / 20)])
def test_two_branches_are_kept_apart(method, parameter, share):
    pipe = SimpleNamespace(transformer=Line(), scheduler=FlowMatchEulerDiscreteScheduler())
    branches = torch.tensor([[3.0]]), torch.tensor([[-5.0]])
    with skipping(pipe, method, parameter, 20) as work:
        for _ in range(2):  # calls of the pipeline
            pipe.scheduler.set_timesteps(20)
            for time in range(20, 0, -1):
                prompted, without = (pipe.transformer(x, timestep=torch.tensor(time))[0] for x in branches)
                assert prompted == 3 * time
                gap = 8 * (time if method == "Taylor 1" else max(time, 11))  # steps 0 to 9 are whole
                assert without == prompted - gap
    assert work.share == share
