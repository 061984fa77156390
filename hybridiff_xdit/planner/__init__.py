"""What would a layout of N GPUs bring? The cost model (`cost`), and what it predicts of the layouts (`layouts`)."""

from .cost import NETWORK, NVLINK, SPEEDS, Cost, Link, Machine, Point, Speed, calibrate, cost_of, speed_of
from .layouts import (
    TYPICAL_SPEEDUP,
    Layout,
    Prediction,
    aligned,
    best,
    every_layout,
    expected_plan,
    one_gpu,
    predict,
    rank_layouts,
    table,
)

__all__ = [
    "NETWORK",
    "NVLINK",
    "SPEEDS",
    "TYPICAL_SPEEDUP",
    "Cost",
    "Layout",
    "Link",
    "Machine",
    "Point",
    "Prediction",
    "Speed",
    "aligned",
    "best",
    "calibrate",
    "cost_of",
    "every_layout",
    "expected_plan",
    "one_gpu",
    "predict",
    "rank_layouts",
    "speed_of",
    "table",
]
