"""Condition-hybrid parallel denoising: classifier-free-guided diffusion on several GPUs.

Vocabulary: a *branch* (uncond, cond) is one of the two denoiser evaluations of a *step*. A FULL step evaluates both,
on half of the ranks each; a PIPELINED step evaluates the network once, its layers split over the ranks in *stages*, and
the guidance is estimated; a SKIPPED step evaluates nothing, and both predictions are estimated. What the branches and
the estimates are measured to miss decides when. Method: arXiv 2602.21760; SKIPPED steps, the estimates and the adaptive
policy are ours.

Reading order: discrepancy, sampler, plan, guidance, adaptive, policies, partition, comm, executor, sequence,
agreement, encoding, hybrid; denoisers, checkpoints, planner for what a layout of GPUs would bring; then xdit/ for the
strategy in xDiT.
"""

from .config import HybridConfig
from .hybrid import apply_hybrid, last_report, remove_hybrid

__all__ = ["HybridConfig", "apply_hybrid", "last_report", "remove_hybrid"]
