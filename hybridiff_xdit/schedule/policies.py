"""The policies by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .adaptive import AdaptivePolicy
from .fixed import FixedPolicy
from .paper import PAPER_PRESETS, PaperConstants, PaperPolicy
from .plan import DEFAULT_KINDS, FULL, Plan, Policy
from .sampler import Sampler

if TYPE_CHECKING:
    from ..config import HybridConfig

#: Policies by name, with what each does.
POLICIES = {
    "adaptive": "FULL steps as far apart as --hybrid_tolerance on the predicted guidance error allows",
    "cfg": "every step FULL",
    "paper": "one PIPELINED window of k steps, as published",
    "fixed": "the plan given with --hybrid_plan",
}


def make_policy(
    config: HybridConfig, num_steps: int, family: str, sampler: Sampler | None = None, gain: float | None = None
) -> Policy:
    """Build the policy of one run.

    Args:
        config: its policy, and the fields that belong to that.
        num_steps: denoiser evaluations in the run.
        family: the denoiser's family, ``unet`` or ``mmdit``: selects the published constants.
        sampler: of the run; ``adaptive`` needs it.
        gain: evaluations of a FULL step on one GPU, over those of the busiest rank; default as many as stages.

    Raises:
        ValueError: the policy does not fit the run.
    """
    if config.policy == "cfg":
        return FixedPolicy([FULL] * num_steps)
    if config.policy == "fixed":
        return FixedPolicy(Plan.parse(config.plan or "", num_steps))
    if config.policy == "adaptive":
        assert sampler is not None
        return AdaptivePolicy(
            sampler,
            tolerance=config.tolerance,
            speedup=config.speedup,
            kinds=config.kinds or DEFAULT_KINDS,
            stages=config.stages,
            gain=gain,
        )
    preset = vars(PAPER_PRESETS[family].scaled(num_steps))
    given = {name: value for name, value in config.paper_constants().items() if value is not None}
    return PaperPolicy(num_steps, PaperConstants(**{**preset, **given}))
