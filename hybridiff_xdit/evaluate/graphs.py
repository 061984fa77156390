"""CUDA graphs of the pieces that a rank runs: a branch's forward, and its segments of a PIPELINED step.

On a fast GPU, launching a denoiser's kernels from Python takes longer than running them. A graph launches them all at
once. A *piece* is a function of the denoiser's inputs and of what else it needs, nests of tensors and constants. Its
first call with a *key* runs as it is (and so compiles and tunes what there is to), the second is captured, the later
ones are replays. Where another piece has been captured with the same inputs, as a forward before a part of it, the
first call is captured: its kernels have run already, and now would take memory beside that of the graphs. The key is
all that a graph would not notice by itself:

* the shapes, dtypes and constants of the arguments (adapter scales among them);
* the addresses of the weights, the modules and the constants in them, looked at when a run begins;
* the adapters in use and their scales, the attention processors with all that they hold, and PyTorch's settings (TF32,
  attention), looked at on every step, since callbacks change them. (The rest would take the host 5 ms a step for SDXL.
  Other weights or modules loaded by a callback come into effect with the next run.)

All graphs of a session share one memory pool: they are replayed one at a time, and what they return is copied out. What
cannot be captured, or holds an object whose state cannot be told, runs as it is, and the log says so once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import ExitStack, suppress
from functools import cache, wraps
from itertools import count, pairwise
from statistics import median
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn

from ..ranks.comm import Comm
from ..trees import Indescribable, describe, map_tensors, modules_of, tensors_of

logger = logging.getLogger(__name__)

#: Keys kept, the ones used last: enough for the pieces of a few resolutions.
MOST_KEYS = 24
#: States of the denoiser kept (a large one's takes a megabyte); then all is forgotten.
MOST_STATES = 64
#: First calls of a piece in a row, with another key each time, that are no coincidence.
MOST_FIRST_CALLS = 8
#: Replays that are timed, of the denoiser's units.
REPLAYS = 5

#: What PEFT's layers keep of their adapters, beside the weights.
_ADAPTERS = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")

_CONSTANTS = frozenset((bool, int, float, str, type(None)))

#: What every module holds: its tensors, modules and hooks are looked at by themselves. What a compiled module knows of
#: its compiler changes with its first call, and says nothing that the module and its inputs do not.
_MODULES_OWN = frozenset(vars(nn.Module())) | {"forward", "dynamo_ctx"}

#: What is looked at on every step, or is refused if it does anything.
_LOOKED_AT = frozenset(("processor", "_diffusers_hook", *_ADAPTERS))

#: Graphs that hold exchanges of a process group.
_HOLDING: WeakSet[Graphs] = WeakSet()
_UNDO = ExitStack()  # of what has them released

Piece = Callable[..., Any]


class _Key(NamedTuple):
    """What a graph belongs to: the piece, the state of the denoiser, its inputs, and the piece's other arguments."""

    name: str
    state: int
    inputs: Hashable
    others: Hashable


class _Graph(NamedTuple):
    """A captured piece: what to fill in, how to run it, and what it then holds."""

    inputs: list[torch.Tensor]
    replay: Callable[[], None]
    outputs: Any


class Graphs:
    """Calls pieces of a denoiser, by graph where that can be.

    Args:
        denoiser: whose pieces they are.
        is_on: whether anything is to be captured.
        across: the ranks that evaluate with this one what it evaluates, where tokens are split. Pieces then hold
            exchanges between them, which all these ranks must capture, or none.
    """

    def __init__(self, denoiser: nn.Module, is_on: bool = True, across: Comm | None = None) -> None:
        self.denoiser = denoiser
        self._is_on, self._across = is_on, across
        self._device = torch.device("cpu")
        self._states: dict[Hashable, int] = {}  # numbered: a key is looked up often
        self._numbers = count()
        self._fixed: int | None = None  # number of the state that lasts a run; None: nothing is captured
        self._state = 0  # of all of it
        self._changing: list[nn.Module] = []  # of which the rest is read on every step
        self._graphs: dict[_Key, _Graph | None] = {}  # in order of use; None: called once
        self._first_calls: Counter[str] = Counter()  # in a row, by piece
        self._pool: Any = None

    def begin(self, device: torch.device) -> None:
        """Note the state of the denoiser that lasts a run; to be called when one begins.

        Args:
            device: where it runs, which is not where an offloaded one lies.
        """
        self._device = device
        self._fixed = None
        if not can_capture(self._device):
            return
        if len(self._states) > MOST_STATES:
            self.clear()
        state: Hashable = None
        if self._is_on:
            try:
                state, self._changing = _state_of(self.denoiser)
                self._fixed = self._number(state)
            except (_Uncapturable, Indescribable) as reason:
                self.refuse(str(reason))
        numbers = self._everywhere(-1 if self._fixed is None else self._fixed)
        if min(numbers) < 0:
            self.refuse("another rank of those that split the tokens does")
        elif len(set(numbers)) > 1:  # what is new to one of the ranks is new to all
            self.clear()
            self._fixed = self._number(state)

    def look(self) -> None:
        """Note the rest; to be called before the pieces of a step."""
        if self._fixed is not None:
            try:
                self._state = self._number((self._fixed, _switches(), *map(_present, self._changing)))
            except Indescribable as reason:
                self.refuse(str(reason))

    def __call__(self, name: str, piece: Piece, inputs: Any, *others: Any) -> Any:
        """``piece(inputs, *others)``, of the denoiser's inputs: a nest of tensors and constants, the caller's own."""
        args = inputs, *others
        if self._fixed is None:
            return piece(*args)
        try:
            key = _Key(name, self._state, describe(inputs, _given), describe(others, _given))
        except Indescribable as reason:
            self.refuse(f"among the denoiser's arguments {reason}")
            return piece(*args)
        is_first = key not in self._graphs
        if is_first:
            has_run = any(
                graph and other.name != name and (other.state, other.inputs) == (key.state, key.inputs)
                for other, graph in self._graphs.items()
            )
            self._remember(key, None)
            self._first_calls[name] += 1
            if self._first_calls[name] > MOST_FIRST_CALLS:
                self.refuse("the denoiser is called with another argument, or is itself another, on every step")
            if not has_run or self._fixed is None:
                return piece(*args)
        else:
            self._first_calls[name] = 0
        graph = self._graphs.pop(key)
        if graph is None:
            failure = "on another rank of those that split the tokens"
            try:
                graph = self._record(piece, args)
            except Exception as error:  # whatever a model's code does that a capture does not allow
                failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            is_everywhere = all(self._everywhere(graph is not None))
            if graph is None or not is_everywhere:
                if is_first:  # it may be what a first call compiles or tunes
                    self._remember(key, None)
                else:
                    self.refuse(f"capturing failed ({failure})")
                return piece(*args)
        else:
            for ours, given in zip(graph.inputs, tensors_of(args), strict=True):
                ours.copy_(given, non_blocking=True)
        self._remember(key, graph)
        graph.replay()
        return map_tensors(torch.clone, graph.outputs)

    @property
    def captures(self) -> bool:
        """Whether something may be captured in this run."""
        return self._fixed is not None

    def captured(self) -> dict[str, Callable[[], None]]:
        """A replay of each piece captured, the last one of a name: to be timed."""
        return {key.name: graph.replay for key, graph in self._graphs.items() if graph is not None}

    def refuse(self, reason: str) -> None:
        """Capture nothing from now on, and say why."""
        if self._is_on:
            logger.warning("hybrid-cond: runs without CUDA graphs, since %s.", reason)
        self._is_on, self._fixed = False, None
        self.clear()

    def clear(self) -> None:
        """Release the graphs and their memory."""
        self._graphs.clear()
        self._states.clear()
        self._numbers = count()
        self._first_calls.clear()
        self._pool = None

    def _number(self, state: Hashable) -> int:
        return self._states.setdefault(state, next(self._numbers))

    def _everywhere(self, mine: int | bool) -> list[int]:
        """A number of each rank that splits the tokens with this one. The host waits."""
        if self._across is None:
            return [mine]
        return torch.cat(self._across.all_gather(torch.tensor([mine], device=self._device))).tolist()

    def _remember(self, key: _Key, graph: _Graph | None) -> None:
        self._graphs[key] = graph
        if len(self._graphs) > MOST_KEYS:
            del self._graphs[next(iter(self._graphs))]

    def _record(self, piece: Piece, args: Any) -> _Graph:
        """Capture; the inputs are filled in with these arguments, whatever device they are on."""
        ours = map_tensors(lambda t: torch.empty_like(t, device=self._device).copy_(t), args)
        inputs = list(tensors_of(ours))
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        replay, outputs = _capture(lambda: piece(*ours), self._pool)
        return _Graph(inputs, replay, outputs)


def release_before_groups(graphs: Graphs) -> Callable[[], None]:
    """Release graphs that hold exchanges of a process group when one is to be destroyed: NCCL would wait for them.

    Returns:
        What ends it. The last to end it puts PyTorch's function back.
    """
    destroy = dist.destroy_process_group

    @wraps(destroy)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        for holding in list(_HOLDING):
            holding.clear()
        destroy(*args, **kwargs)

    def put_back() -> None:
        if dist.destroy_process_group is destroy_process_group:
            dist.destroy_process_group = destroy

    def end() -> None:
        _HOLDING.discard(graphs)
        if not _HOLDING:
            _UNDO.close()

    if not _HOLDING:
        dist.destroy_process_group = destroy_process_group
        _UNDO.callback(put_back)
    _HOLDING.add(graphs)
    return end


def can_capture(device: torch.device) -> bool:
    """Whether it has CUDA graphs."""
    return device.type == "cuda"


def seconds_between(run: Callable[[Callable[[], None]], Any]) -> tuple[float, ...] | None:
    """Seconds on the GPU between the marks of ``run(mark)``: of its graph, so without what launching takes.

    Returns:
        One number less than there are marks, each the median of `REPLAYS`; None where it cannot be captured.
    """
    events: list[Any] = []

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True, external=True))  # external: PyTorch 2.8
        events[-1].record()

    try:
        with torch.no_grad():
            run(lambda: None)  # compiles and tunes what there is to
            replay, _ = _capture(lambda: run(mark), None)
    except Exception as error:
        logger.info("hybrid-cond: the GPU's time could not be taken by CUDA graph (%s).", error)
        return None
    samples = []
    for _ in range(REPLAYS):
        replay()
        events[-1].synchronize()
        samples.append([before.elapsed_time(after) / 1e3 for before, after in pairwise(events)])
    del replay  # and with it the graph, whose memory nothing else can have before it is given back
    torch.cuda.empty_cache()
    return tuple(map(median, zip(*samples, strict=True)))


class _Uncapturable(Exception):
    """Why a denoiser's kernels cannot be replayed."""


def _capture(piece: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """(replay, outputs) of a piece; nothing is run."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pool = pool or torch.cuda.graph_pool_handle()
    try:
        # Other threads may use the GPU meanwhile: NCCL's watchdog asks for its events.
        with torch.cuda.graph(graph, pool=pool, stream=_capturing(stream.device), capture_error_mode="thread_local"):
            outputs = piece()
    except Exception:
        # PyTorch leaves the capture's stream current, the generator in a state for captures, and the allocator in the
        # belief that a capture is under way: it would give no memory back from then on, to whoever asked.
        torch.cuda.set_stream(stream)
        device = torch.cuda.current_device()
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        with suppress(RuntimeError):  # where the capture itself was sound, the allocator knows that it has ended
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)  # else the graph does
        raise
    return graph.replay, outputs


@cache
def _capturing(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which pieces are captured. PyTorch's own is the first GPU's, for all of them."""
    return torch.cuda.Stream(device)


def _state_of(denoiser: nn.Module) -> tuple[Hashable, list[nn.Module]]:
    """What the denoiser's kernels depend on, but its arguments and what `_present` reads.

    Returns:
        The state, and the modules of which the rest is to be read.

    Raises:
        _Uncapturable: Python code that a replay would not run is hooked in, or the mode forbids it.
    """
    if torch.is_grad_enabled():
        raise _Uncapturable("gradients are on (call the pipeline under torch.no_grad())")
    if torch.is_autocast_enabled():
        raise _Uncapturable("autocast is on (load the pipeline in the dtype that you want)")
    state: list[Any] = [_switches()]
    changing = []
    for module in modules_of(denoiser):
        own = vars(module)
        # A pipeline that names its calls (`cache_context`) leaves a registry without hooks.
        if "_hf_hook" in own or ("_diffusers_hook" in own and own["_diffusers_hook"].hooks):
            raise _Uncapturable(f"{type(module).__name__} is offloaded, cached or cast by a hook")
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            for hook in (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()):
                if getattr(hook, "__module__", "").partition(".")[0] != "hybridiff_xdit":
                    raise _Uncapturable(f"{type(module).__name__} has a forward hook")
        state += [type(module), module.training, own.get("forward")]
        for tensors in (own["_parameters"], own["_buffers"]):
            if tensors:
                state += [tensor.data_ptr() for tensor in tensors.values() if tensor is not None]
        for name, value in own.items():
            if name in _MODULES_OWN:
                continue
            kind = type(value)
            if kind in _CONSTANTS or (kind is tuple and _CONSTANTS.issuperset(map(type, value))):
                state.append(value)
            elif name not in _LOOKED_AT:
                state.append((name, describe(value, _at)))
        if "scaling" in own or "processor" in own or "processor" in own["_modules"]:  # hasattr takes twice as long
            changing.append(module)
    return tuple(state), changing


def _switches() -> Hashable:
    """PyTorch's and diffusers' settings by which kernels are chosen."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    cuda = torch.backends.cuda
    sdp = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()
    precision = torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    backend = _AttentionBackendRegistry.get_active_backend()
    return sdp, precision, torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), str(backend)


def _present(module: Any) -> Hashable:
    """The adapters in use and their scales, or the attention processor with all that it holds."""
    own = vars(module)
    if "scaling" in own:
        return repr([own.get(name) for name in _ADAPTERS])
    processor = module.processor
    if isinstance(processor, nn.Module):
        held = {name: value for name, value in vars(processor).items() if name not in _MODULES_OWN}
    else:
        held = getattr(processor, "__dict__", {})
    return (id(processor), describe(held, _at)) if held else id(processor)


def _at(tensor: torch.Tensor) -> Hashable:
    """A tensor that a module holds: a graph reads it where it lies."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _given(tensor: torch.Tensor) -> Hashable:
    """A tensor that is handed in: its contents are copied to where the graph reads them."""
    return tensor.shape, tensor.stride(), tensor.dtype
