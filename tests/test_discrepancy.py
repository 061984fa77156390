import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridiff_xdit.schedule.discrepancy import rel_mae
from hybridiff_xdit.schedule.paper import SlopeDetector

SDXL = dict(window=12, threshold=4e-4)
SD3 = dict(window=15, threshold=5e-4)


def u_shaped(steps: int = 50, floor: float = 0.05, fall: float = 4.0, rise: float = 6.0) -> list[float]:
    """Falls from 0.57, lies on its floor, rises to 0.12 at the end: what a guided run measures."""
    return [floor + 0.52 * math.exp(-i / fall) + 0.07 * math.exp((i - steps + 1) / rise) for i in range(steps)]


def brute_force(series: list[float], window: int, threshold: float) -> int | None:
    """First i with 0 <= (M[i - L] - M[i]) / L < g, straight from the definition."""
    slopes = {i: (series[i - window] - series[i]) / window for i in range(window, len(series))}
    return min((i for i, slope in slopes.items() if 0 <= slope < threshold), default=None)


def fired(series: list[float], window: int, threshold: float) -> int | None:
    detector = SlopeDetector(window, threshold)
    return next((i for i, value in enumerate(series) if detector.update(i, value)), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rel_mae_is_the_published_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    u, c = (torch.randn(2, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))
    a, b = u.double().numpy(), c.double().numpy()
    assert rel_mae(u, c).item() == pytest.approx(np.abs(b - a).mean() / np.abs(a).mean(), rel=1e-5)


def test_rel_mae_does_not_overflow_in_half_precision():
    u = torch.full((4, 128, 128), 100.0, dtype=torch.float16)  # its sum is far above 65504
    assert rel_mae(u, u * 2).item() == pytest.approx(1.0)
    assert rel_mae(u, u * 2).dtype == torch.float32


def test_rel_mae_of_a_zero_uncond_prediction_is_not_finite():
    assert not math.isfinite(rel_mae(torch.zeros(3), torch.ones(3)))


# Each rule fires on the flat part of the curve: after the fall, before the rise.
@pytest.mark.parametrize(("constants", "expected"), [(SDXL, 30), (SD3, 31)], ids=["sdxl", "sd3"])
def test_published_constants_fire_on_the_floor(constants, expected):
    series = u_shaped()
    assert brute_force(series, **constants) == expected
    assert fired(series, **constants) == expected


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_a_threshold_that_goes_with_the_first_step_fires_on_the_floor_of_any_model(size):
    """The same curve of a model whose branches differ by another amount; the published number would miss it."""
    series = u_shaped()
    fires = SlopeDetector(**SD3, level=series[0]).update
    assert next(i for i, value in enumerate(series) if fires(i, size * value)) == brute_force(series, **SD3)
    assert size == 1 or brute_force([size * value for value in series], **SD3) != brute_force(series, **SD3)


@pytest.mark.parametrize("constants", [SDXL, SD3], ids=["sdxl", "sd3"])
def test_early_plateau_fires_as_soon_as_a_window_is_full(constants):
    assert fired([0.3] * 50, **constants) == constants["window"]


@pytest.mark.parametrize("constants", [SDXL, SD3], ids=["sdxl", "sd3"])
def test_a_rising_discrepancy_does_not_fire(constants):
    assert fired([0.1 + 1e-5 * i for i in range(50)], **constants) is None


@pytest.mark.parametrize("constants", [SDXL, SD3], ids=["sdxl", "sd3"])
def test_a_steady_fall_does_not_fire(constants):
    assert fired([1 - 0.01 * i for i in range(50)], **constants) is None


def test_the_threshold_itself_is_not_below_the_threshold():
    series = [1.0, 0.75, 0.5]  # falls by exactly a quarter a step
    assert fired(series, window=2, threshold=0.25) is None
    assert fired(series, window=2, threshold=0.26) == 2


@given(
    series=st.lists(st.floats(0, 2), max_size=60),
    window=st.integers(1, 20),
    threshold=st.floats(1e-5, 0.2),
)
def test_any_series_fires_where_the_definition_says(series, window, threshold):
    assert fired(series, window, threshold) == brute_force(series, window, threshold)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 13])
def test_a_series_that_is_not_finite_is_an_error_that_says_so(value, step):
    detector = SlopeDetector(**SDXL)
    for i in range(step):
        detector.update(i, 1 - 0.01 * i)
    with pytest.raises(ValueError, match=rf"discrepancy at step {step} is {value}.*not finite.*dtype"):
        detector.update(step, value)
