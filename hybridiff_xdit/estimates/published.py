"""Rules that keep no history: the published code's, and no guidance. A step's one prediction serves as both."""

from .base import Rule


class Mixed(Rule):
    """The published code: each rank has its branch's embeddings in its stage; the one output serves as both.

    With two stages, stage 0 has uncond's and stage 1 cond's.

    The guided prediction is that mixed output, and w has no effect on the step.
    """

    stage0_branch = "uncond"


class NoGuidance(Rule):
    """All stages are cond; the cond prediction is used unguided."""
