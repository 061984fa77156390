"""Condition-hybrid parallel denoising: classifier-free-guided diffusion on several GPUs.

Vocabulary: a *branch* (uncond, cond) is one of the two denoiser evaluations of a *step*. A FULL step evaluates both,
on half of the ranks each; a PIPELINED step evaluates the network once, its layers split over the ranks in *stages*, and
the guidance is estimated; a SKIPPED step evaluates nothing, and both predictions are estimated. What the branches and
the estimates are measured to miss decides when. Method: arXiv 2602.21760; SKIPPED steps, the estimates and the adaptive
policy are ours.

Folders, from bottom to top, which is the order to read them in (within one, the order is that of the names here):

* `trees`: nests of tensors;
* `ranks`: comm, agreement;
* `schedule`, which kind a step is: discrepancy, sampler, plan, fixed, paper, adaptive, policies;
* `estimates`, what stands for a prediction that is not evaluated: base, published, reuse, deferred, rules;
* `evaluate`: graphs, tokens, and `stages`: cuts, anatomy, blocks, unet, families, executor;
* `config` and `report`;
* `planner`, what a layout of GPUs would bring: denoisers, cost, layouts;
* `seam`, where a diffusers pipeline is met: encoding, hooks, checkpoints;
* `xdit`: the strategy in xDiT.
"""

from .config import HybridConfig
from .seam.hooks import apply_hybrid, hybrid, last_report, remove_hybrid

__all__ = ["HybridConfig", "apply_hybrid", "hybrid", "last_report", "remove_hybrid"]
