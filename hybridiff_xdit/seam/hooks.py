"""Apply `hybrid-cond` to a diffusers pipeline, and take it off again.

The pipeline's own loop, guidance, scheduler and callbacks stay as they are. Its denoiser is called as always with the
CFG batch [uncond, cond]; the call is answered by the group of ranks with (pred_u, pred_c) in the same layout. The
public verbs stand at the end of the file.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import platform
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..config import HybridConfig
from ..estimates.base import Pair, Rule
from ..estimates.published import Mixed
from ..estimates.rules import RULES
from ..evaluate.graphs import Graphs, release_before_groups
from ..evaluate.stages.anatomy import Anatomy, Inputs
from ..evaluate.stages.executor import Branch, Executor
from ..evaluate.stages.families import read
from ..evaluate.tokens import SequenceSplit
from ..ranks.agreement import differing, disagreement, fingerprint
from ..ranks.comm import Comm, Solo, checksum
from ..report import write_report
from ..schedule.discrepancy import Trial, rel_mae
from ..schedule.plan import FULL, PIPELINED, SKIPPED, Plan, Policy, StepKind
from ..schedule.policies import make_policy
from ..schedule.sampler import Sampler, read_sampler
from ..trees import map_tensors, tensors_of
from .encoding import Encoding

logger = logging.getLogger(__name__)

_SESSION = "_hybrid_cond"


class _Unread(NamedTuple):
    """Measurements of a FULL step, on their way to the host."""

    step: int
    values: torch.Tensor  # [discrepancy, drifted, two errors per trial of the rule ...], on the host
    arrival: torch.cuda.Event | None  # when they are there
    distances: list[float]  # of the trials


class _Run:
    """State of one run: one call of the pipeline, one pass through the scheduler's timesteps."""

    def __init__(
        self,
        num_steps: int,
        policy: Policy,
        rule: Rule,
        sampler: Sampler | None,
        is_guided: bool,
        timesteps: torch.Tensor,
    ) -> None:
        self.num_steps = num_steps
        self._timesteps = timesteps  # kept, so that their addresses stay theirs
        self._host_timesteps = dict(zip((t.data_ptr() for t in timesteps), timesteps.cpu(), strict=True))
        self.policy = policy
        self.rule = rule
        self.sampler = sampler
        self.kinds: list[StepKind] = []
        self.discrepancy: list[tuple[int, float]] = []
        self.trials: list[tuple[int, list[Trial]]] = []
        self.unread: list[_Unread] = []
        self.is_guided = is_guided
        self.is_known = False  # whether a FULL step lies behind, and the guidance has been on since

    def time(self, step: int) -> float:
        """Time of a step, in which boundaries are extrapolated."""
        return float(step) if self.sampler is None else self.sampler.times[step]

    def on_host(self, value: Any) -> Any:
        """A timestep of the run in host memory, anything else as it is.

        Schedulers look up tables in host memory by the timestep: from the GPU's, each would wait for the step before.
        """
        is_scalar = isinstance(value, torch.Tensor) and value.is_cuda and not value.ndim
        return self._host_timesteps.get(value.data_ptr(), value) if is_scalar else value

    @property
    def step(self) -> int:
        return len(self.kinds)


class _Session:
    """`hybrid-cond` on one pipeline: some of its methods replaced, and the current run."""

    def __init__(
        self, pipe: Any, anatomy: Anatomy, config: HybridConfig, comm: Comm, sequence: SequenceSplit | None, model: str
    ) -> None:
        self.pipe, self.anatomy, self.config, self.comm, self.model = pipe, anatomy, config, comm, model
        self.sequence = sequence
        self.denoiser: Any = anatomy.denoiser
        self.graphs = Graphs(self.denoiser, is_on=config.cuda_graphs is not False)
        self.across = sequence.comm if sequence else None
        self.executor = Executor(anatomy, comm, self.graphs, self.across, config.stages)
        self.signature = inspect.signature(type(self.denoiser).forward)
        self.run: _Run | None = None
        self.report: dict[str, Any] | None = None
        self._warned: set[str] = set()
        self._bar: Any = None
        self._undo: list[tuple[Any, str, Any]] = []
        self.scheduler: Any = None
        if sequence is not None:
            sequence.apply(anatomy)
            release_before_groups(self.graphs)  # they hold the exchanges between its ranks
        # A denoiser compiled as a whole calls this as it is: what kind a step is, is no matter for a graph.
        self.forward = self._replace(self.denoiser, "forward", torch.compiler.disable(self._forward))
        self.progress_bar = self._replace(pipe, "progress_bar", self._progress_bar)
        if comm.size > 1 and hasattr(pipe, "encode_prompt"):
            encoding = Encoding(pipe, comm, self.across)
            self._replace(pipe, "check_inputs", encoding.check_inputs)
            self._replace(pipe, "encode_prompt", encoding.encode_prompt)
        self._watch_scheduler()

    def close(self) -> None:
        """Put every replaced method back as it was."""
        self.executor.drain()
        self.graphs.clear()
        if self.sequence is not None:
            self.sequence.remove()
        for owner, name, before in reversed(self._undo):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._undo.clear()

    def _replace(self, owner: Any, name: str, method: Any) -> Any:
        self._undo.append((owner, name, vars(owner).get(name)))
        original = getattr(owner, name)
        setattr(owner, name, method)
        return original

    def _watch_scheduler(self) -> None:
        """A run begins where the scheduler's timesteps are set; the pipeline's scheduler may be another by then."""
        self.scheduler = self.pipe.scheduler
        original = self.scheduler.set_timesteps

        @wraps(original)  # pipelines look at its signature
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self.run = None
            return original(*args, **kwargs)

        self._replace(self.scheduler, "set_timesteps", set_timesteps)
        original_step = self.scheduler.step

        @wraps(original_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            extra = {name: value for name, value in kwargs.items() if name not in ("generator", "return_dict")}
            run = self.run
            if extra and run is not None and run.sampler is not None and run.step == 1:
                # What the loop adds (eta) is known with its first call only, before the scheduler has stepped.
                run.sampler = read_sampler(self.scheduler, run.time(0), run.num_steps, **extra)
                run.rule.sampler = run.policy.sampler = run.sampler
            if run is not None:
                args = tuple(map(run.on_host, args))
            return original_step(*args, **kwargs)

        self._replace(self.scheduler, "step", step)

    def _progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        self._bar = self.progress_bar(*args, **kwargs)
        return self._bar

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    # A step.

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.signature.bind(None, *args, **kwargs).arguments
        inputs.pop("self")
        if inputs.get("skip_layers") is not None:  # skip-layer guidance: a third evaluation within the step
            return self.forward(*args, **kwargs)
        if not isinstance(inputs["timestep"], torch.Tensor):  # a number would be part of what a CUDA graph holds fixed
            inputs["timestep"] = torch.as_tensor(inputs["timestep"], device=next(tensors_of(inputs)).device)
        if self.scheduler is not self.pipe.scheduler:
            self._watch_scheduler()
            self.run = None
        if self.run is None:
            self.run = self._begin(inputs)
        run = self.run
        if not run.is_guided or run.step >= run.num_steps:
            return self.forward(*args, **kwargs)
        if not self.pipe.do_classifier_free_guidance:  # a callback has turned the guidance off
            run.kinds.append(FULL)
            run.is_known = False
            output = self.forward(*args, **kwargs)
        else:
            pred = torch.cat(self._evaluate(run, inputs))  # [2B, C, H, W]
            output = (pred,) if inputs.get("return_dict") is False else self._output_class()(sample=pred)
        if run.step == run.num_steps:
            self._end(run)
        return output

    def _evaluate(self, run: _Run, inputs: Inputs) -> Pair:
        """Answer one call of the denoiser, both branches at once."""
        branches = _branches({**inputs, "return_dict": False})
        if run.unread and run.policy.reads_discrepancy(run.unread[-1].step):
            self._read(run, keep=run.policy.lag)
        guidance = float(getattr(self.pipe, "guidance_scale", 2.0)) - 1
        step, kind = run.step, run.policy.kind(run.step, guidance)
        # Guidance that was off for a step leaves nothing to go on from: every rank sees that and evaluates FULL.
        if not run.is_known:
            kind = FULL
        with torch.profiler.record_function(f"step {step} {kind.name}"):
            pair = self._answer(run, kind, branches, inputs, guidance)
        run.kinds.append(kind)
        self._show(run)
        return pair

    def _answer(
        self, run: _Run, kind: StepKind, branches: dict[Branch, Inputs], inputs: Inputs, guidance: float
    ) -> Pair:
        """(pred_u, pred_c) of a step of this kind."""
        step = run.step
        if kind is SKIPPED:
            pair = run.rule.skipped(step, guidance)
        elif kind is PIPELINED:
            pred = self.executor.pipelined(
                branches,
                run.rule.stage0_branch,
                run.time(step),
                hand_over=step + 1 < run.num_steps and run.policy.kind(step + 1) is PIPELINED,
                extrapolate=run.rule.extrapolates_boundary,
            )
            pair = run.rule.pipelined(step, pred, guidance)
        else:
            pred_u, pred_c, drifted = self.executor.full(
                self.forward, branches, inputs, run.time(step), extrapolate=run.rule.extrapolates_boundary
            )
            trials = run.rule.trials(step, pred_u, pred_c, guidance) if run.policy.reads_trials else []
            measured = [rel_mae(pred_u, pred_c), drifted.float(), *(error for trial in trials for error in trial[1:])]
            values, arrival = torch.stack(measured).to("cpu", non_blocking=True), None
            if drifted.is_cuda:  # waiting for the copy alone leaves what is queued behind it running
                arrival = torch.cuda.Event()
                arrival.record()
            run.unread.append(_Unread(step, values, arrival, [trial.distance for trial in trials]))
            pair = run.rule.full(step, pred_u, pred_c, guidance)
            run.is_known = True
            # Reading makes the host wait, and the GPU then for the host: what no policy needs is read a FULL step late.
            self._read(run, keep=1)
        return pair

    def _read(self, run: _Run, keep: int) -> None:
        """Bring measurements to the host, but for the last ``keep``.

        Every rank reads the same values at the same step (the exchange gave all ranks the same bits, and the ranks'
        devices are of one type), so all raise or none, and all take the same decision.
        """
        while len(run.unread) > keep:
            step, values, arrival, distances = run.unread.pop(0)
            if arrival is not None:
                arrival.synchronize()
            discrepancy, drifted, *errors = values.tolist()
            if drifted:
                raise _drifted(step)
            trials = list(map(Trial, distances, errors[::2], errors[1::2]))
            run.discrepancy.append((step, discrepancy))
            run.trials.append((step, trials))
            if run.policy.reads_discrepancy(step):
                run.policy.observe(step, discrepancy, trials)

    # A run.

    def _begin(self, inputs: Inputs) -> _Run:
        """Check that the ranks agree and that the configuration fits, before anything is evaluated."""
        self.comm.bytes_sent = 0
        self.report = None
        num_steps = int(self.pipe.num_timesteps)
        self._agree(inputs, num_steps)
        self.executor.drain()
        config = self.config
        is_guided = bool(self.pipe.do_classifier_free_guidance)
        if not is_guided:
            self._warn("hybrid-cond: guidance is off (guidance_scale <= 1), so every rank evaluates the whole model.")
            config = HybridConfig(policy="cfg")
        # Where nothing is approximated, no rule is needed; but FULL steps of several stages may be extrapolated to.
        is_exact = config.policy == "cfg" and config.stages == 2
        rule = Mixed if is_exact else RULES[str(config.guidance)]
        sampler = None
        if config.policy == "adaptive" or rule.needs_sampler:
            start = float(inputs["timestep"].flatten()[0])
            sampler = read_sampler(self.pipe.scheduler, start, num_steps)
        policy = make_policy(config, num_steps, self.anatomy.family, sampler)
        if policy.may_pipeline or config.stages > 2:  # FULL steps then have stages too
            self.anatomy.check_inputs(inputs)
            is_timed = config.balance != "flops" and self.sequence is None
            self.executor.prepare(_branches(inputs)["cond"], is_timed)
        self.graphs.begin(next(tensors_of(inputs)).device)
        return _Run(num_steps, policy, rule(sampler), sampler, is_guided, self.scheduler.timesteps)

    def _agree(self, inputs: Inputs, num_steps: int) -> None:
        """Compare what must be the same on every rank, by one small exchange whose size depends on nothing."""
        pipe, denoiser = self.pipe, self.denoiser
        tensors = dict(inputs)
        noise = tensors.pop("sample" if "sample" in inputs else "hidden_states")
        timesteps = pipe.scheduler.timesteps
        # Reductions give the same bits only on the same hardware with the same number of threads.
        is_cuda = noise.device.type == "cuda"
        device = torch.cuda.get_device_name(noise.device) if is_cuda else (platform.machine(), torch.get_num_threads())
        shapes = [tuple(t.shape) for t in tensors_of(inputs)]
        dtypes = [str(t.dtype) for t in tensors_of(inputs)]
        facts: dict[str, Any] = {
            "guidance on or off (--guidance_scale)": bool(pipe.do_classifier_free_guidance),
            "number of steps (--num_inference_steps)": num_steps,
            "strategy (--hybrid_* flags)": str(self.config),
            "model (--model)": _settings(denoiser),
            "model weights or adapters (--model)": fingerprint(denoiser),
            "device types or CPU threads (OMP_NUM_THREADS)": device,
            "dtypes": dtypes,
            "number of prompts, pictures, or the resolution": shapes,
            "scheduler": _settings(pipe.scheduler),
            "timesteps": checksum(torch.as_tensor(timesteps)),
            "initial noise (give every rank a generator with the same seed: --seed)": checksum(noise),
            "prompts (--prompt, --negative_prompt)": checksum(tensors),
        }
        if names := differing(facts, self.comm, self.across, noise.device):
            raise disagreement(names)

    def _end(self, run: _Run) -> None:
        self._read(run, keep=0)
        if self.executor.drifted():
            raise _drifted(run.num_steps - 1)
        self.executor.drain()
        plan = Plan(run.kinds)
        degree = self.sequence.comm.size if self.sequence else 1
        mine = torch.tensor([self.comm.bytes_sent], device=next(self.denoiser.parameters()).device)
        bytes_sent = [int(count) for count in self.comm.all_gather(mine)]
        self.report = {
            "model": self.model,
            "config": {**asdict(self.config), "report": self.config.report and os.fspath(self.config.report)},
            "num_steps": run.num_steps,
            "plan": str(plan),
            "discrepancy": [[step, _finite(value)] for step, value in run.discrepancy],
            "trials": [
                [step, [list(map(_finite, trial)) for trial in trials]] for step, trials in run.trials if trials
            ],
            "tau_1": run.policy.tau_1,
            "tau_2": run.policy.tau_2,
            "speedup_bound": plan.speedup_bound(self.config.stages),
            "bytes_sent": bytes_sent,
            "seconds_per_step": None,  # timing waits for the GPU: benchmarks/ measures it
            "world_size": self.comm.size * degree,
            "sequence_degree": degree,
            "versions": _versions(),
        }
        if self.config.report is not None and self.comm.rank == 0 and not (self.sequence and self.sequence.comm.rank):
            write_report(self.report, Path(self.config.report))

    def _show(self, run: _Run) -> None:
        if self._bar is not None:
            plan = Plan(getattr(run.policy, "plan", run.kinds))
            last = f", M={run.discrepancy[-1][1]:.3f}" if run.discrepancy else ""
            self._bar.set_postfix_str(f"{plan.phase(run.step - 1).name} {run.kinds[-1].name}{last}", refresh=False)

    def _output_class(self) -> Any:
        """The class of the denoiser's output, for a caller that did not ask for a tuple."""
        module = inspect.getmodule(type(self.denoiser))
        names = ("UNet2DConditionOutput", "Transformer2DModelOutput")
        return next(getattr(module, name) for name in names if hasattr(module, name))


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """The pipeline's denoiser, as it is beneath ``torch.compile``.

    Raises:
        ValueError: it has none, or does not do classifier-free guidance.
    """
    parts = (getattr(pipe, name, None) for name in ("transformer", "unet"))
    denoiser = next((part for part in parts if part is not None), None)
    if denoiser is None or not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise ValueError(
            f"hybrid-cond needs a pipeline that does classifier-free guidance with a `unet` or a `transformer`; "
            f"{type(pipe).__name__} is none."
        )
    return getattr(denoiser, "_orig_mod", denoiser)


def _branches(inputs: Inputs) -> dict[Branch, Inputs]:
    """The arguments of each branch, batch B, from those of both, batch 2B in the order uncond, cond."""
    batch = next(tensors_of(inputs)).shape[0]
    if batch % 2:
        raise ValueError(f"hybrid-cond: guidance is on, but the denoiser's batch is {batch}, not [uncond, cond].")

    def half(index: int) -> Inputs:
        return map_tensors(
            lambda t: t.chunk(2)[index] if t.ndim and t.shape[0] == batch else t,
            inputs,
        )

    return {"uncond": half(0), "cond": half(1)}


def _drifted(step: int) -> RuntimeError:
    return RuntimeError(
        f"hybrid-cond: at step {step} the ranks' latents or prompts are no longer the same. They drifted apart since "
        "the last FULL step or the one before: give every rank the same generator seed, scheduler, dtype and callbacks."
    )


def _settings(component: Any) -> list[str]:
    """Class and configuration of a diffusers component, without its private fields (paths, unordered sets)."""
    fields = [f"{key}={value}" for key, value in component.config.items() if not key.startswith("_")]
    return [type(component).__name__, *sorted(fields)]


def _finite(value: float) -> float | None:
    """For JSON, which has no nan and no infinity."""
    return value if math.isfinite(value) else None


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("hybridiff_xdit", "torch", "diffusers", "transformers", "xfuser"):
        with suppress(PackageNotFoundError):  # from plain diffusers, xfuser need not be there
            versions[package] = version(package)
    return versions


def apply_hybrid(
    pipe: Any,
    config: HybridConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    sequence: SequenceSplit | None = None,
    model: str | None = None,
    simulate: bool = False,
) -> Any:
    """Make a pipeline run `hybrid-cond` on the ranks of a group, half of them a branch's.

    They are two, or as many as `HybridConfig.stages`; each may be one of a group of its own that splits the tokens.

    Call it on every rank (one process a GPU, under torchrun, after ``torch.distributed.init_process_group``) with the
    pipeline on this rank's device, and then the pipeline with the same arguments and the same generator seed on every
    rank; every rank returns the pictures. Applying again replaces the configuration.

    Args:
        pipe: a diffusers pipeline with classifier-free guidance: Stable Diffusion 3 and XL, 1.5 and 2.1, and their
            image-to-image and inpainting relatives.
        config: the strategy; default `HybridConfig()`, the adaptive policy at its default tolerance.
        group: as many ranks as stages, uncond's first, then cond's; default the default group.
        sequence: splits the tokens of what this rank evaluates over a group of its own (an MMDiT's; `xdit.sequence`
            makes it on xDiT's groups). ``group`` is then this rank and those of equal place in the other such groups.
        model: name for the report; default the checkpoint the pipeline was loaded from.
        simulate: this process plays all ranks in turn, on its own: their pictures, without their speed.

    Returns:
        The pipeline.

    Raises:
        ValueError: the pipeline's denoiser is not understood or has no tokens to split, or the group has not as many
            ranks as there are stages.
        RuntimeError: (from the pipeline's call) the ranks differ in what must be the same, or one stopped answering.
    """
    config = config or HybridConfig()
    remove_hybrid(pipe)
    world_size = 1 if simulate else int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized() and world_size > 1:
        raise ValueError(
            f"hybrid-cond: there are {world_size} processes, but no process group. Call "
            "torch.distributed.init_process_group() before apply_hybrid()."
        )
    size = dist.get_world_size(group) if dist.is_initialized() and not simulate else 1
    if size not in (1, config.stages):
        raise ValueError(
            f"hybrid-cond with --hybrid_stages {config.stages} (HybridConfig.stages) runs on {config.stages} ranks, "
            f"but the group has {size}. Start it with --nproc_per_node {config.stages}, pass group= with as many, "
            "or give another number of stages."
        )
    denoiser = denoiser_of(pipe)
    is_wrapped = all(getattr(pipe, name, None) is not denoiser for name in ("transformer", "unet"))
    if is_wrapped or denoiser._compiled_call_impl is not None:
        logger.warning(
            "hybrid-cond answers the denoiser's calls itself, so that compiling the whole denoiser has no effect. "
            "Compile its blocks: block.forward = torch.compile(block.forward)."
        )
    anatomy = read(denoiser)
    if config.report is not None:
        Path(config.report).mkdir(parents=True, exist_ok=True)
    if size == 1 and not simulate:
        logger.warning(
            "hybrid-cond needs %d ranks and there is one: the pipeline runs as it always does.", config.stages
        )
        return pipe
    name = model or getattr(pipe, "name_or_path", None) or type(pipe).__name__
    comm = Solo() if simulate else Comm(group)
    setattr(pipe, _SESSION, _Session(pipe, anatomy, config, comm, sequence, str(name)))
    return pipe


def remove_hybrid(pipe: Any) -> Any:
    """Take `hybrid-cond` off a pipeline, which then is as it was before. Nothing to do is no error."""
    session = getattr(pipe, _SESSION, None)
    if session is not None:
        session.close()
        delattr(session.pipe, _SESSION)
    return pipe


def last_report(pipe: Any) -> dict[str, Any] | None:
    """Report of the pipeline's last finished run under `hybrid-cond`; None where there is none.

    Keys: ``model``, ``config``, ``num_steps``, ``plan`` (letters F, P and S), ``discrepancy`` (list of [step, value],
    None where it is not finite), ``trials`` (list of [step, [[distance, pipelined, skipped], ...]], see
    `discrepancy.Trial`; empty but for the adaptive policy), ``tau_1``, ``tau_2`` (None where the policy has none),
    ``speedup_bound`` (times what splitting a branch's tokens gives), ``bytes_sent`` (one count a rank of the group, of
    the denoising: without the texts' embeddings), ``seconds_per_step`` (None where not measured), ``world_size``,
    ``sequence_degree``, ``versions``.
    """
    session = getattr(pipe, _SESSION, None)  # xDiT's wrapper of a pipeline hands the question on
    return None if session is None else session.report
