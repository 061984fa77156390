"""The policies by name: what each does, what may be set of it, and how one is made for a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .adaptive import AdaptivePolicy, AdaptiveSettings
from .fixed import FixedPolicy, FixedSettings
from .paper import PaperPolicy, PaperSettings
from .plan import DEFAULT_KINDS, FULL, Plan, Policy
from .sampler import Sampler
from .settings import Settings


class Facts(NamedTuple):
    """What a policy is made for.

    Attributes:
        num_steps: denoiser evaluations in the run.
        family: the denoiser's family, ``unet``, ``mmdit`` or ``blocks``: selects the published constants.
        sampler: of the run; None where nothing needs it.
        gain: evaluations of a FULL step on one GPU, over those of the busiest rank; None: as many as stages.
    """

    num_steps: int
    family: str
    sampler: Sampler | None = None
    gain: float | None = None


class Registered(NamedTuple):
    """A policy.

    Attributes:
        summary: what it does.
        settings: what may be set of it.
        make: the policy of one run, from the settings (a `HybridConfig`) and the facts.
        needs_bends: whether the rule has to tell how predictions bend.
    """

    summary: str
    settings: type[Settings]
    make: Callable[[Any, Facts], Policy]
    needs_bends: bool = False


def _adaptive(config: Any, facts: Facts) -> Policy:
    assert facts.sampler is not None
    return AdaptivePolicy(
        facts.sampler,
        tolerance=config.tolerance,
        speedup=config.speedup,
        kinds=config.kinds or DEFAULT_KINDS,
        stages=config.stages,
        gain=facts.gain,
    )


POLICIES = {
    "adaptive": Registered(
        "skip as many steps as the tolerance or the target asks for, where the run measures that it costs least",
        AdaptiveSettings,
        _adaptive,
        needs_bends=True,
    ),
    "cfg": Registered(
        "every step FULL, which is exact", Settings, lambda config, facts: FixedPolicy([FULL] * facts.num_steps)
    ),
    "paper": Registered(
        "one window of PIPELINED steps, as published",
        PaperSettings,
        lambda config, facts: PaperPolicy(facts.num_steps, config.constants(facts.family, facts.num_steps)),
    ),
    "fixed": Registered(
        "the plan given with --hybrid_plan",
        FixedSettings,
        lambda config, facts: FixedPolicy(Plan.parse(config.plan, facts.num_steps)),
    ),
}


def make_policy(
    config: Any, num_steps: int, family: str, sampler: Sampler | None = None, gain: float | None = None
) -> Policy:
    """Build the policy of one run; see `Facts`.

    Raises:
        ValueError: the policy does not fit the run.
    """
    return POLICIES[config.policy].make(config, Facts(num_steps, family, sampler, gain))
