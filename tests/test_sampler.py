"""What is read off a scheduler: against the formula of its update, and against one prediction moved at a time."""

import copy

import numpy as np
import oracle
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from hybridiff_xdit.schedule.sampler import read_sampler

BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)

#: {id: (class, settings, further arguments of its step)}
SCHEDULERS = {
    "flow Euler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}),
    "flow Heun": (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}, {}),
    "DDIM, leading": (DDIMScheduler, {**BETAS, "clip_sample": False, "steps_offset": 1}, {}),
    "DDIM, trailing": (DDIMScheduler, {**BETAS, "clip_sample": False, "timestep_spacing": "trailing"}, {}),
    "DDIM, v": (DDIMScheduler, {**BETAS, "clip_sample": False, "prediction_type": "v_prediction"}, {}),
    "DDIM, eta": (DDIMScheduler, {**BETAS, "clip_sample": False, "steps_offset": 1}, {"eta": 0.7}),
    "DDPM": (DDPMScheduler, {**BETAS, "clip_sample": False}, {}),
    "Euler": (EulerDiscreteScheduler, BETAS, {}),
    "Euler, v": (EulerDiscreteScheduler, {**BETAS, "prediction_type": "v_prediction"}, {}),
    "Euler, Karras": (EulerDiscreteScheduler, {**BETAS, "use_karras_sigmas": True}, {}),
    "ancestral": (EulerAncestralDiscreteScheduler, BETAS, {}),
    "Heun": (HeunDiscreteScheduler, BETAS, {}),
    "KDPM2": (KDPM2DiscreteScheduler, BETAS, {}),
    "2M": (DPMSolverMultistepScheduler, BETAS, {}),
    "2M, flow": (DPMSolverMultistepScheduler, FLOW, {}),
    "2M, v, Karras": (
        DPMSolverMultistepScheduler,
        {**BETAS, "prediction_type": "v_prediction", "use_karras_sigmas": True},
        {},
    ),
    "2M, SDE": (DPMSolverMultistepScheduler, {**BETAS, "algorithm_type": "sde-dpmsolver++"}, {}),
    "UniPC": (UniPCMultistepScheduler, BETAS, {}),
    "DEIS": (DEISMultistepScheduler, BETAS, {}),
    "PNDM": (PNDMScheduler, {**BETAS, "skip_prk_steps": True}, {}),
}


def made(case, steps=10, **changes):
    kind, settings, extra = SCHEDULERS[case]
    scheduler = kind(**{**settings, **changes})
    scheduler.set_timesteps(steps)
    return scheduler, extra


def reading(scheduler, start=0, **extra):
    return read_sampler(scheduler, start, len(scheduler.timesteps) - start, **extra)


def close(found, expected):
    """To a hundred thousandth of the largest; the schedulers keep float32."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def at_least_the_next(weights):
    return np.maximum(weights, [*weights[1:], 0.0])


# Against formulas.


@pytest.mark.parametrize("steps", [4, 10, 28])
def test_flow_matching_with_euler(steps):
    scheduler, _ = made("flow Euler", steps)
    linear = np.linspace(1, 1 / 1000, 1000)[[0, -1]]  # the ends of training's sigmas, before the shift
    shifted = [3 * s / (1 + 2 * s) for s in linear]
    spaced = np.linspace(*shifted, steps)  # and the inference's lie between the shifted ends, shifted again
    sigmas = np.append(3 * spaced / (1 + 2 * spaced), 0.0)
    found = reading(scheduler)
    close(found.times, 1000 * sigmas[:-1])
    close(found.gains, np.diff(sigmas))
    close(found.weights, at_least_the_next(-np.diff(sigmas)))


def ddim(betas, times, gap, eta):
    """(gains, weights) of noise prediction; abar = 1 after the last step."""
    abar = np.cumprod(1 - betas)
    gains, weights = [], []
    for t in times:
        before, after = abar[t], abar[t - gap] if t >= gap else 1.0
        s = eta * np.sqrt((1 - after) / (1 - before) * (1 - before / after))
        one_step = np.sqrt(1 - after - s**2) - np.sqrt(after / before) * np.sqrt(1 - before)
        gains.append(one_step / np.sqrt(after))
        weights.append(abs(gains[-1]) * np.sqrt(before))  # the sample over sqrt(abar) stays what it is
    return gains, weights


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(spacing, eta):
    scheduler, _ = made(f"DDIM, {spacing}")
    times = list(range(901, 0, -100)) if spacing == "leading" else list(range(999, 0, -100))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    found = reading(scheduler, eta=eta)
    gains, weights = ddim(betas, times, 100, eta)
    assert list(found.times) == times
    close(found.gains, gains)
    close(found.weights, at_least_the_next(weights))


def test_ddim_without_noise_moves_by_the_step_in_noise_over_signal():
    scheduler, _ = made("DDIM, leading")
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    s = [np.sqrt((1 - abar[t]) / abar[t]) for t in range(901, 0, -100)]
    close(reading(scheduler).gains, np.diff([*s, 0.0]))


def test_euler_with_noise_prediction():
    scheduler, _ = made("Euler")
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    sigmas = np.append(np.interp(np.linspace(999, 0, 10), np.arange(1000), np.sqrt((1 - abar) / abar)), 0.0)
    found = reading(scheduler)
    close(found.gains, np.diff(sigmas))
    scaled = -np.diff(sigmas) / np.sqrt(1 + sigmas[:-1] ** 2)  # the input has unit variance
    close(found.weights, at_least_the_next(scaled))


@pytest.mark.parametrize("case", ["UniPC", "2M"])
def test_a_multistep_solver_weighs_about_as_one_of_first_order(case):
    scheduler, _ = made(case, 50)
    sigmas = scheduler.sigmas.double().numpy()
    first_order = -np.diff(sigmas) / np.sqrt(1 + sigmas[:-1] ** 2)
    np.testing.assert_allclose(reading(scheduler).weights[10:40], first_order[10:40], rtol=0.3)


def test_euler_with_v_prediction():
    scheduler, _ = made("Euler, v")
    sigmas = scheduler.sigmas.double().numpy()
    # x' = x + (sigma' - sigma) (x - x0) / sigma with x0 = x / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1)
    one_step = np.diff(sigmas) / np.sqrt(sigmas[:-1] ** 2 + 1)
    grows = 1 + np.diff(sigmas) * sigmas[:-1] / (sigmas[:-1] ** 2 + 1)
    close(reading(scheduler).gains, [one_step[i] * np.prod(grows[i + 1 :]) for i in range(10)])


def test_heun_weighs_both_ends_of_an_interval_with_half_of_it():
    scheduler, _ = made("flow Heun", 4)
    sigmas = np.append(np.unique(scheduler.sigmas.numpy())[:0:-1], 0.0)  # descending, one each
    halves = np.diff(sigmas) / 2
    close(reading(scheduler).gains, [*np.repeat(halves[:-1], 2), 2 * halves[-1]])


# Against one prediction moved at a time.


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("case", SCHEDULERS)
def test_is_what_moving_one_prediction_does(case, start):
    scheduler, extra = made(case)
    count = len(scheduler.timesteps) - start
    found = reading(scheduler if start == 0 else begun(scheduler, start), start, **extra)
    plain = oracle.samples(scheduler, count, **extra)
    moved = [oracle.samples(scheduler, count, bumped, **extra) for bumped in range(count)]
    assert list(found.times) == scheduler.timesteps.tolist()[start:]
    close(found.gains, [one[-1] - plain[-1] for one in moved])
    shifted = oracle.samples(scheduler, count, start=2.0, **extra)
    kept = [(shifted[-1] - plain[-1]) / (shifted[i] - plain[i]) for i in range(count)]
    close(
        found.weights, at_least_the_next([abs((one[-1] - plain[-1]) / k) for one, k in zip(moved, kept, strict=True)])
    )


def begun(scheduler, start):
    """As image-to-image pipelines do."""
    scheduler.set_begin_index(start) if hasattr(scheduler, "set_begin_index") else None
    return scheduler


@pytest.mark.parametrize("case", SCHEDULERS)
def test_a_run_whose_predictions_are_all_moved_is_the_sum(case):
    """Linear: also far from where it was read."""
    scheduler, extra = made(case)
    count = len(scheduler.timesteps)
    silent = copy.deepcopy(scheduler)
    plain = oracle.samples(silent, count, **extra)[-1]
    moved = oracle.samples(silent, count, bumped="all", **extra)[-1]
    assert moved - plain == pytest.approx(sum(reading(scheduler, **extra).gains), rel=1e-4)


# The scheduler and its cache.


def state(scheduler):
    return {name: copy.deepcopy(value) for name, value in vars(scheduler).items()}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or bool(np.all(a == b))


@pytest.mark.parametrize("case", SCHEDULERS)
def test_reading_changes_nothing(case):
    scheduler, extra = made(case, steps=9)
    before, noise = state(scheduler), torch.get_rng_state()
    reading(scheduler, **extra)
    assert torch.equal(torch.get_rng_state(), noise)
    assert vars(scheduler).keys() == before.keys()
    assert all(same(before[name], value) for name, value in vars(scheduler).items())


def test_is_read_once():
    scheduler, _ = made("2M")
    assert reading(scheduler) is reading(scheduler)
    twin, _ = made("2M")
    assert reading(twin) is reading(scheduler)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("flow Euler", {"shift": 3.00001}),
        ("DDIM, leading", {"beta_end": 0.0120001}),
        ("DDIM, leading", {"set_alpha_to_one": False}),
        ("2M", {"solver_order": 1}),
        ("2M", {"final_sigmas_type": "sigma_min"}),
        ("Euler", {"prediction_type": "v_prediction"}),
    ],
)
def test_a_changed_scheduler_is_read_anew(case, changes):
    before, after = reading(made(case)[0]), reading(made(case, **changes)[0])
    assert before.gains != after.gains


def test_other_steps_another_start_and_eta_are_read_anew():
    scheduler, _ = made("DDIM, leading")
    before = reading(scheduler)
    assert reading(scheduler, eta=0.5).gains != before.gains
    assert reading(scheduler, 4).gains == pytest.approx(before.gains[4:])
    scheduler.set_timesteps(20)
    assert len(reading(scheduler).gains) == 20


def test_a_shift_that_is_set_on_the_scheduler_is_seen():
    scheduler, _ = made("flow Euler")
    before = reading(scheduler)
    scheduler.set_shift(5.0)
    scheduler.set_timesteps(10)
    assert reading(scheduler).gains != before.gains


def test_methods_that_the_engine_replaced_are_not_called():
    scheduler, _ = made("flow Euler")
    expected = reading(scheduler)
    scheduler.set_shift(3.0)

    def watched(*args, **kwargs):
        raise AssertionError("the original was called, or its watch")

    scheduler.step = scheduler.set_timesteps = watched
    scheduler.marker = 1  # not in the cache
    assert reading(scheduler) == expected


# What cannot be read.


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("DDIM, leading", {"clip_sample": True}),
        ("DDIM, leading", {"thresholding": True}),
        ("DDPM", {"clip_sample": True}),
        ("2M", {"thresholding": True}),
        ("UniPC", {"thresholding": True}),
    ],
    ids=str,
)
def test_clipping_is_refused_with_the_flag_and_the_mend(case, changes):
    scheduler, _ = made(case, **changes)
    (flag,) = changes
    with pytest.raises(ValueError) as error:
        reading(scheduler)
    for words in (type(scheduler).__name__, flag, f"{flag}=False", "--hybrid_guidance reuse"):
        assert words in str(error.value)


class Broken(DDIMScheduler):
    def step(self, *args, **kwargs):
        raise RuntimeError("not on a copy")


def test_a_scheduler_that_cannot_be_run_on_a_copy_is_refused():
    scheduler = Broken(clip_sample=False)
    scheduler.set_timesteps(5)
    with pytest.raises(
        ValueError, match=r"Broken could not be run on a copy \(not on a copy\).*--hybrid_guidance reuse"
    ):
        reading(scheduler)
