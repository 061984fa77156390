"""Condition-hybrid parallel denoising: classifier-free-guided diffusion on several GPUs.

Vocabulary: a *stream* is one evaluation of a denoiser within a *step*; a *branch* (uncond, cond) is one of the two of
classifier-free guidance. A FULL step evaluates all streams, dealt out to the ranks; a PIPELINED step evaluates the
network once, its layers split over the ranks in *stages*, and the guidance is estimated; a SKIPPED step evaluates
nothing, and all predictions are estimated. What the branches and the estimates are measured to miss decides when.
Method: arXiv 2602.21760; SKIPPED steps, the estimates and the adaptive policy are ours.

Folders, from bottom to top, which is the order to read them in (within one, the order is that of the names here):

* `trees`: nests of tensors;
* `ranks`: comm, agreement;
* `schedule`, which kind a step is: discrepancy, sampler, settings, plan, fixed, paper, adaptive, policies;
* `estimates`, what stands for a prediction that is not evaluated: weights, base, published, reuse, deferred, rules;
* `evaluate`: calls, graphs, streams, tokens, and `stages`: cuts, anatomy, blocks, unet, families, executor, more;
* `config`, `report`, `measures`, and `engine`, one run's estimates and measurements;
* `planner`, what a layout of GPUs would bring: denoisers, cost, layouts;
* `seam`, where a diffusers pipeline is met: watch, coupling, pattern, step, pending, signals, run, hooks,
  checkpoints, compat;
* `xdit`: the strategy in xDiT.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import HybridConfig
    from .seam.hooks import apply_hybrid, hybrid, last_report, remove_hybrid

__all__ = ["HybridConfig", "apply_hybrid", "hybrid", "last_report", "remove_hybrid"]
__version__ = "0.1.0"

_MODULES = {"HybridConfig": ".config", **dict.fromkeys(__all__[1:], ".seam.hooks")}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a process that only reads flags then needs no diffusers."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
