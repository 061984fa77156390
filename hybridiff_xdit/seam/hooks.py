"""Apply `hybrid-cond` to a diffusers pipeline, and take it off again.

The pipeline's own loop, guidance, scheduler and callbacks stay as they are. What is watched is the pipeline's call, and
for as long as that lasts its denoisers and its scheduler: outside a call these are as they were, and a pipeline that
shares them runs as it always did. The public verbs stand at the end of the file.
"""

from __future__ import annotations

import inspect
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import cache, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from ..config import HybridConfig, retargeted
from ..evaluate.calls import Call, read_call
from ..evaluate.graphs import Graphs, release_before_groups
from ..evaluate.stages.executor import Executor
from ..evaluate.stages.families import read
from ..evaluate.stages.more import More
from ..evaluate.streams import Streams
from ..evaluate.tokens import SequenceSplit
from ..ranks.agreement import Gone, compare, disagreement, fingerprint, leave
from ..ranks.comm import Comm, Solo, checksum
from ..report import write_report
from .coupling import settings_of
from .run import Run, Setting
from .signals import RunOver
from .watch import watch

logger = logging.getLogger(__name__)

#: Components of a pipeline that predict. (A pipeline need not have all, and may call several within a run.)
DENOISERS = ("transformer", "transformer_2", "unet", "unconditional_transformer", "prior", "decoder")

_SESSIONS: WeakKeyDictionary[Any, _Session] = WeakKeyDictionary()


class _Session:
    """`hybrid-cond` on one pipeline, and the run that is on."""

    def __init__(
        self, pipe: Any, config: HybridConfig, comm: Comm, sequence: SequenceSplit | None, model: str, is_apart: bool
    ) -> None:
        self.applied = config
        self.config, self.comm, self.sequence, self.model = config, comm, sequence, model
        self.across = sequence.comm if sequence else None
        self.report: dict[str, Any] | None = None
        self.run: Run | None = None
        self._graphs: WeakKeyDictionary[torch.nn.Module, Graphs] = WeakKeyDictionary()
        self._warned: set[str] = set()
        self._context: str | None = None
        self._is_running = self._has_timesteps = self._is_agreed = False
        self._bar: Any = None
        self._undo = ExitStack()
        executor, is_split = None, sequence is not None and not sequence.is_within
        if is_split or config.has_stages:
            anatomy = read(denoiser_of(pipe))
            if sequence is not None and is_split:
                sequence.apply(anatomy)
                self._undo.callback(sequence.remove)
            if config.has_stages:
                kind = Executor if config.stages == 2 else More
                executor = kind(anatomy, comm, self.graphs, self.across, config.stages)
        streams = Streams(comm, self.across, self.graphs, is_apart)
        self.setting = Setting(config, streams, executor, self._warn)
        handlers: dict[str, Any] = {"__call__": partial(self._call, ref(pipe)), "progress_bar": self._progress_bar}
        self._undo.callback(watch(pipe, **handlers))

    def close(self) -> None:
        """Put everything back as it was. Waits for no other rank."""
        self._undo.close()
        if self.setting.executor is not None:
            self.setting.executor.forget()
        for graphs in self._graphs.values():
            graphs.clear()
        self.run = None

    def graphs(self, denoiser: torch.nn.Module) -> Graphs:
        """How a denoiser's kernels are launched."""
        if denoiser not in self._graphs:
            graphs = self._graphs[denoiser] = Graphs(denoiser, self.config.cuda_graphs is not False, self.across)
            if self.across is not None:  # they hold exchanges between its ranks
                self._undo.callback(release_before_groups(graphs))
        return self._graphs[denoiser]

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    # A call of the pipeline.

    def _call(self, pipe_of: Callable[[], Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        pipe = pipe_of()
        if self._is_running:
            raise RuntimeError(
                "hybrid-cond: the pipeline is called while another call of it is running (from another thread?). "
                "One run at a time: give each thread a pipeline and a process group of its own."
            )
        self._is_running, self._has_timesteps, self._is_agreed, self.run, self.report = True, False, False, None, None
        self._arguments = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        self.setting.may_guidance_change = _has_callback(self._arguments)
        if "_num_timesteps" in vars(pipe):
            vars(pipe)["_num_timesteps"] = None  # of the call before
        try:
            with self._watching(pipe):
                output = original(*args, **kwargs)
                self._end_early(pipe)
                return output
        except Gone:
            raise  # whoever has left waits for nobody
        except Exception as error:
            self._leave(pipe, error)
            raise
        finally:
            if self.run is not None and not self.run.is_finished:
                self.setting.earlier.clear()  # one rank may have learnt a step that another has not
            self._is_running, self.run, self._bar = False, None, None

    @contextmanager
    def _watching(self, pipe: Any) -> Iterator[None]:
        """Watch what the pipeline has now for a denoiser and a scheduler: both may have been replaced since."""
        with ExitStack() as stack:
            for denoiser in _denoisers(pipe):
                handlers: dict[str, Any] = {
                    "__call__": partial(self._denoise, pipe, denoiser),
                    "cache_context": self._cache_context,
                }
                stack.callback(watch(denoiser, get_ident(), **handlers))
            scheduler = pipe.scheduler
            steps: dict[str, Any] = {"set_timesteps": self._set_timesteps, "step": partial(self._step, scheduler)}
            stack.callback(watch(scheduler, get_ident(), **steps))
            self._stack = stack
            yield

    @contextmanager
    def _cache_context(self, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        before, self._context = self._context, name
        try:
            with original(name, *args, **kwargs) as entered:
                yield entered
        finally:
            self._context = before

    def _progress_bar(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._bar = original(*args, **kwargs)
        return self._bar

    def _set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.run is not None and not self.run.is_over:
            self.run.leave()  # a pipeline that makes its pictures in several passes
        self.run = None
        result = original(*args, **kwargs)
        self._has_timesteps = True
        return result

    def _denoise(
        self, pipe: Any, denoiser: torch.nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if not self._has_timesteps or (self.run is not None and self.run.is_over):
            return original(*args, **kwargs)
        call = read_call(denoiser, original, args, kwargs, self._context)
        if self.run is None:
            self.run = self._begin(pipe, call)
        return self.run.answer(call)

    def _step(self, scheduler: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if run is None or run.is_over:
            return original(*args, **kwargs)
        given = _signature_of(type(scheduler).step).bind(None, *args, **kwargs).arguments
        extra = {name: value for name, value in kwargs.items() if isinstance(value, int | float) and name not in _OURS}
        is_last = run.end_step(given["model_output"], given["timestep"], given["sample"], extra)
        result = original(*map(run.on_host, args), **{name: run.on_host(value) for name, value in kwargs.items()})
        self._show(run)
        if is_last:
            self._report(run, run.finish())
        return result

    # A run.

    def _begin(self, pipe: Any, call: Call) -> Run:
        """Check that the ranks agree and that the configuration fits, before anything is evaluated."""
        hint = vars(pipe).get("_num_timesteps")
        self.comm.bytes_sent = 0
        agreed = self._agree(pipe, call, hint)
        if self.across is not None:  # graphs then have something to exchange too
            agreed()
        device = call.tensors[0].device
        if device.type == "cuda":
            self._stack.enter_context(torch.cuda.device(device))  # events and graphs are of the current one
        present = {getattr(part, "_orig_mod", part) for part in _denoisers(pipe)} | set(_denoisers(pipe))
        for gone in set(self._graphs) - present:  # the pipeline has another denoiser now
            self._graphs.pop(gone).clear()
        for denoiser in _denoisers(pipe):
            self.graphs(denoiser).begin(device)  # while the GPU sums the weights, and the other ranks theirs
        agreed()
        try:
            return Run(self.setting, pipe.scheduler, hint if isinstance(hint, int) else None)
        except ValueError:
            self._has_timesteps, self._is_agreed = False, True
            raise

    def _agree(self, pipe: Any, call: Call, hint: Any) -> Callable[[], None]:
        """Compare what must be the same on every rank, by one small exchange whose size depends on nothing.

        Returns:
            What waits for it, and raises a RuntimeError on every rank if it is not.
        """
        if self.comm.size == 1 and self.across is None:
            return lambda: None
        device = call.tensors[0].device
        # Reductions give the same bits only on the same hardware with the same number of threads.
        is_cuda = device.type == "cuda"
        machine = torch.cuda.get_device_name(device) if is_cuda else (platform.machine(), torch.get_num_threads())
        others = [value for name, value in call.inputs.items() if value is not call.latents]
        denoisers, scheduler = _denoisers(pipe), pipe.scheduler
        arguments = self._arguments.items()
        facts: dict[str, Any] = {
            "guidance (--guidance_scale)": [(name, value) for name, value in arguments if _is_guidance(name, value)],
            "number of steps (--num_inference_steps)": (len(scheduler.timesteps), hint),
            "callbacks, or none": self.setting.may_guidance_change,
            "strategy (--hybrid_* flags)": str(self.config.agreed()),
            "model (--model)": [_settings(denoiser) for denoiser in denoisers],
            "model weights or adapters (--model)": checksum([fingerprint(d, device) for d in denoisers]),
            "adapters in use, their scales, attention processors, or offloading": [settings_of(d) for d in denoisers],
            "device types or CPU threads (OMP_NUM_THREADS)": machine,
            "dtypes": [str(tensor.dtype) for tensor in call.tensors],
            "number of prompts, pictures, or the resolution": [tuple(tensor.shape) for tensor in call.tensors],
            "scheduler": _settings(scheduler),
            "earlier runs (apply_hybrid anew on every rank)": len(self.setting.earlier),
            "timesteps": checksum(torch.as_tensor(scheduler.timesteps)),
            "initial noise (give every rank a generator with the same seed: --seed)": checksum(call.latents),
            "prompts (--prompt, --negative_prompt)": checksum([torch.zeros(1, device=device), others]),
        }
        self._is_agreed = True  # whatever is raised from here to the first evaluation is raised on all ranks
        read = cache(compare(facts, self.comm, self.across, device))

        def agreed() -> None:
            if names := read():
                self._has_timesteps = False
                raise disagreement(names)

        return agreed

    def _end_early(self, pipe: Any) -> None:
        """The pipeline has come to its end before the run has: it was interrupted, or left timesteps out."""
        run = self.run
        if run is None or run.is_over:
            return
        is_interrupted = bool(getattr(pipe, "_interrupt", False))
        if not run.leave():
            why = "interrupted" if is_interrupted else "its pipeline made fewer steps"
            raise RuntimeError(
                f"hybrid-cond: this rank left the run after step {run.step} of {run.num_steps} ({why}), others did "
                "not. Interrupt it on every rank at the same step. The run has ended on every rank."
            )
        if run.signals.own is not None:
            raise run.signals.own
        run.remember()
        if not is_interrupted:
            self._report(run, run.engine.report() | {"bytes_sent": [self.comm.bytes_sent]})

    def _leave(self, pipe: Any, error: Exception) -> None:
        """An error ends this rank's call: let the others know, if they can still be waiting for it."""
        run = self.run
        try:
            if run is not None and not run.is_over:
                run.leave()
            elif run is not None:
                if isinstance(error, RunOver):
                    run.settle()
            elif not self._is_agreed and self.comm.size > 1:
                leave(self.comm, self.across, torch.device(pipe._execution_device))
        except Exception as unheard:
            logger.warning("hybrid-cond: the other ranks could not be told of the error (%s).", unheard)

    def _report(self, run: Run, found: dict[str, Any]) -> None:
        config, degree = self.config, self.across.size if self.across else 1
        self.report = {
            "model": self.model,
            "config": {**asdict(config), "report": config.report and os.fspath(config.report)},
            "num_steps": run.num_steps,
            **found,
            "world_size": self.comm.size * degree,
            "sequence_degree": degree,
            "versions": _versions(),
        }
        if config.report is not None and self.comm.rank == 0 and not (self.across and self.across.rank):
            write_report(self.report, Path(config.report))

    def _show(self, run: Run) -> None:
        if hasattr(self._bar, "set_postfix_str") and run.engine.kinds:
            self._bar.set_postfix_str(run.engine.kinds[-1].name, refresh=False)  # the pipeline refreshes it


#: Arguments of a scheduler's step that change nothing of how it weighs predictions.
_OURS = ("return_dict",)


@lru_cache(maxsize=32)
def _signature_of(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _has_callback(arguments: dict[str, Any]) -> bool:
    return any(
        value is not None for name, value in arguments.items() if name.startswith("callback") and callable(value)
    )


def _is_guidance(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and any(word in name for word in ("guidance", "cfg"))


def _denoisers(pipe: Any) -> list[Any]:
    """The pipeline's denoisers, as it calls them; each once."""
    found = (getattr(pipe, name, None) for name in DENOISERS)
    return list({id(part): part for part in found if isinstance(part, torch.nn.Module)}.values())


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """The pipeline's (first) denoiser, as it is beneath ``torch.compile``.

    Raises:
        ValueError: it has none, or no scheduler.
    """
    denoisers = _denoisers(pipe)
    if not denoisers or not hasattr(type(getattr(pipe, "scheduler", None)), "set_timesteps"):
        raise ValueError(
            f"hybrid-cond needs a pipeline with a scheduler of diffusers' and a denoiser ({', '.join(DENOISERS)}); "
            f"{type(pipe).__name__} has none."
        )
    return getattr(denoisers[0], "_orig_mod", denoisers[0])


def _settings(component: Any) -> list[str]:
    """Class and configuration of a diffusers component, without its private fields (paths, unordered sets)."""
    config = getattr(component, "config", {})
    fields = [f"{key}={value}" for key, value in dict(config).items() if not key.startswith("_")]
    return [type(component).__name__, *sorted(fields)]


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
    """Make a pipeline run `hybrid-cond`, on one process or on the ranks of a group.

    Call it on every rank (one process a GPU, under torchrun, after ``torch.distributed.init_process_group``) with the
    pipeline on this rank's device, and then the pipeline with the same arguments and the same generator seed on every
    rank; every rank returns the pictures. On one process steps are saved where they are SKIPPED. It holds for this
    pipeline object: one that shares its components runs as it is, unless it is applied to that too. Applying again
    replaces the configuration.

    Args:
        pipe: a diffusers pipeline with a scheduler and a denoiser. How it asks for the branches of its guidance is
            learnt on the first step of a run: as one batch, or one call each; without guidance there is one.
        config: the strategy; default `HybridConfig()`, the adaptive policy at its default tolerance.
        group: the ranks, uncond's first, then cond's; default the default group. PIPELINED steps need as many as there
            are stages; else there may be any number, of which not more than there are streams have work to do.
        sequence: splits the tokens of what this rank evaluates over a group of its own (an MMDiT's; `xdit.sequence`
            makes it on xDiT's groups), or says that the denoiser does. ``group`` is then this rank and those of equal
            place in the other such groups.
        model: name for the report; default the checkpoint the pipeline was loaded from.
        simulate: this process plays two ranks (or as many as there are stages) in turn, on its own: their pictures,
            without their speed.

    Returns:
        The pipeline.

    Raises:
        ValueError: the pipeline has no denoiser or scheduler, the denoiser is not understood where steps may be
            PIPELINED, or the group has not as many ranks as there are stages.
        RuntimeError: (from the pipeline's call) the ranks differ in what must be the same, one left the run, or one
            stopped answering.
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
    if config.has_stages and size not in (1, config.stages):
        raise ValueError(
            f"hybrid-cond with --hybrid_stages {config.stages} (HybridConfig.stages) runs on {config.stages} ranks, "
            f"but the group has {size}. Start it with --nproc_per_node {config.stages}, pass group= with as many, "
            "or give another number of stages."
        )
    denoiser_of(pipe)
    if config.report is not None:
        if find_spec("matplotlib") is None:
            raise ValueError("--hybrid_report draws with matplotlib: pip install hybridiff_xdit[report].")
        Path(config.report).mkdir(parents=True, exist_ok=True)
    if size == 1 and config.has_stages and not simulate:
        logger.warning(
            "hybrid-cond: PIPELINED steps need %d ranks and there is one: the pipeline runs as it always does. On one "
            "GPU use --hybrid_kinds FS.",
            config.stages,
        )
        return pipe
    name = model or getattr(pipe, "name_or_path", None) or type(pipe).__name__
    comm = Solo() if size == 1 else Comm(group)
    _SESSIONS[pipe] = _Session(pipe, config, comm, sequence, str(name), is_apart=simulate)
    return pipe


def remove_hybrid(pipe: Any) -> Any:
    """Take `hybrid-cond` off a pipeline, which then is as it was before. Nothing to do is no error."""
    session = _SESSIONS.pop(_own(pipe), None)
    if session is not None:
        session.close()
    return pipe


def configure(pipe: Any, *, tolerance: float | None = None, speedup: float | None = None) -> None:
    """Give the following runs of a pipeline another tolerance or another target, on every rank.

    What is captured and measured is kept, which `apply_hybrid` would begin anew. With neither argument the runs are
    again as `apply_hybrid` was told.

    Raises:
        ValueError: the arguments are out of range or do not fit the policy, or `hybrid-cond` is not on the pipeline.
    """
    session = _SESSIONS.get(_own(pipe))
    if session is not None:
        session.setting.config = session.config = retargeted(session.applied, tolerance, speedup)
    elif (tolerance, speedup) != (None, None):
        raise ValueError("tolerance and speedup: hybrid-cond is not applied to this pipeline, so leave them out.")


@contextmanager
def hybrid(pipe: Any, config: HybridConfig | None = None, **kwargs: Any) -> Iterator[Any]:
    """`apply_hybrid` for the length of a ``with`` block; takes the same arguments."""
    apply_hybrid(pipe, config, **kwargs)
    try:
        yield pipe
    finally:
        remove_hybrid(pipe)


def last_report(pipe: Any) -> dict[str, Any] | None:
    """Report of the pipeline's last finished run under `hybrid-cond`; None where there is none.

    Keys: ``model``, ``config``, ``num_steps``, ``plan`` (letters F, P and S), ``discrepancy`` (list of [step, value],
    None where it is not finite), ``bends`` (list of [step, cond, delta], see `discrepancy.Bend`; empty but for the
    adaptive policy), ``tau_1``, ``tau_2`` (None where the policy has none), ``speedup_bound`` (times what splitting a
    branch's tokens gives), ``estimated_error`` (what the steps that were not FULL are estimated to have added to the
    latents, relative to their size; None but for the adaptive policy), ``bytes_sent`` (one count a rank of the group,
    of the denoising), ``world_size``, ``sequence_degree``, ``versions``.
    """
    session = _SESSIONS.get(_own(pipe))
    return None if session is None else session.report


def _own(pipe: Any) -> Any:
    """The diffusers pipeline in a wrapper of xDiT's."""
    return getattr(pipe, "module", pipe) if pipe not in _SESSIONS else pipe
