"""Time large guided models: a branch's forward, one GPU, `hybrid-cond`, and how others split a denoiser.

    PYTHONPATH=. torchrun --nproc_per_node 2 benchmarks/modern.py --models qwen-image wan-14b --steps 10 --out DIR
    PYTHONPATH=. torchrun --nproc_per_node 2 benchmarks/modern.py --tiny --steps 5 --repeats 2 --out DIR

The denoisers have their real sizes and random weights in bf16. There are no text encoders and no VAE: embeddings go in
and latents come out. With ``--tiny`` they are small models of the same classes, for a CPU. The strategies are:

    eager     one branch's forward in a loop; Python launches the kernels
    graph     the same forward as a CUDA graph, where it can be captured
    one-gpu   the plain pipeline on rank 0, which evaluates all streams; the other ranks wait
    cfg       every step FULL
    plan      a fixed plan: one step in five is SKIPPED, spread evenly after a warm-up: a bound of 2.5 on two ranks
    plan-40   a fixed plan: two steps in five are, a bound of 3.3
    pipelined a fixed plan: 8-48/4 of 50 steps, 20 FULL and 30 PIPELINED; in other runs the same shares of the steps
    adaptive  a target speed-up of 2.5; with random weights its choice of steps means nothing
    context   diffusers' context parallelism: Ulysses over all ranks
    ulysses   xDiT's Ulysses over all ranks
    ring      xDiT's ring attention over all ranks
    dbcache   xDiT's Ulysses, and its ``--cache_method dbcache`` with the preset that it has for the model

The last three need ``--xdit``. With it the denoisers are xDiT's own, on its groups, for every strategy: with more than
two ranks those of a branch split its tokens by Ulysses. The strategies take turns. In each turn a strategy is set up
anew, warmed up by a run that ends, and measured by one whole run, or by as many forwards in a row as a run has steps: a
GPU slows down under load. A run's time is that of the whole call of the pipeline, from a barrier to the end of the
GPU's work, on the slower rank, and *loop* that of its denoising loop. All ranks measure a forward at once, each on its
own GPU. F is the smaller of eager and graph on the slower rank, and the floor of a run is F times the forwards that a
rank makes if their layers are split evenly. The results are in DIR/modern.json, which is rewritten after each turn, and
DIR/modern.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import group
import rivals
import timing
import torch
import torch.distributed as dist
from pipelines import MODELS, NAMES_IN_XDIT, make

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid
from hybridiff_xdit.evaluate.calls import Call, count_parts, part, read_call
from hybridiff_xdit.seam.hooks import denoiser_of

FORWARDS = ("eager", "graph")
OURS = ("cfg", "plan", "plan-40", "pipelined", "adaptive")
XDITS = {"ulysses": "ulysses_degree", "ring": "ring_degree", "dbcache": "ulysses_degree"}
STRATEGIES = (*FORWARDS, "one-gpu", *OURS, "context", *XDITS)
HEAD = "model | strategy | s, median (range) | ms a step | of floor | loop | over one GPU | bound | error | GiB | MB"


def plan_of(steps: int, share: float = 0.2) -> str:
    """Letters of a plan that SKIPS this share of the steps: nearly a third is warm-up, and the last step is FULL."""
    count, start = round(share * steps), round(0.3 * steps)
    skipped = {start + int((i + 0.5) * (steps - 1 - start) / count) for i in range(count)}
    return "".join("S" if step in skipped else "F" for step in range(steps))


def run(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The latents that the pipeline returns."""
    return pipe(**arguments, generator=torch.Generator().manual_seed(0))[0]


def middle_step(pipe: Any, denoiser: Any, arguments: dict[str, Any]) -> tuple[Call, int]:
    """The call that asks for cond alone, or its part of one, on the second of three steps, and how many streams it has.

    How fast a GPU multiplies depends on the numbers, and the first step's are not like the others'.
    """
    calls: list[Call] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(read_call(module, module.__call__, args, kwargs, None))

    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    run(pipe, arguments | dict(num_inference_steps=3))
    hook.remove()
    calls = calls[len(calls) // 3 : -(len(calls) // 3)]
    counts = [count_parts(call) for call in calls]
    cond = part(calls[0], 1, counts[0]) if counts[0] > 1 else calls[0]
    return cond, sum(counts)


class Found(NamedTuple):
    """What one turn of a strategy gave on one rank."""

    seconds: list[float]
    loop: list[float] = []
    memory: int = 0  # most bytes reserved
    plan: str | None = None
    bound: float | None = None
    sent: list[int] | None = None  # bytes, by rank
    refused: str | None = None


def forwards(denoiser: Any, inputs: Any, is_graph: bool, count: int, where: Any) -> Found:
    """Mean seconds of ``count`` forwards in a loop; none where the forward cannot be captured."""
    loop, device, host = where
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    graphs = timing.Graphs(denoiser, is_on=is_graph)
    with torch.no_grad():
        graphs.begin(device)
        graphs.look()
        call: Any = partial(graphs, "forward", lambda given: denoiser(**given), inputs)
        if is_graph:
            for _ in range(2):  # the second is captured
                call()
            call = graphs.captured().get("forward")
        dist.barrier(group=host)
        if call is None:
            return Found([], refused="not captured")
        call()  # warms up
        begin = loop._mark()
        for _ in range(count):
            call()
        end = loop._mark()
    if not is_cuda:
        return Found([(end - begin) / count])
    torch.cuda.synchronize()
    return Found([begin.elapsed_time(end) / 1e3 / count], memory=torch.cuda.max_memory_reserved())


def applied(pipe: Any, what: str, config: HybridConfig | None, name: str | None, steps: int) -> Any:
    """A strategy on a pipeline, for the length of a ``with`` block.

    Args:
        config: of one of `OURS`.
        name: the model's in xDiT, whose groups are then set up.
        steps: of a run.
    """
    return by_diffusers(pipe, what, config) if name is None else by_xdit(pipe, what, config, name, steps)


@contextmanager
def by_diffusers(pipe: Any, what: str, config: HybridConfig | None) -> Iterator[None]:
    if config is not None:
        apply_hybrid(pipe, config)
    if what == "context":
        context = diffusers.ContextParallelConfig(ulysses_degree=dist.get_world_size())
        denoiser_of(pipe).enable_parallelism(config=context)
    try:
        yield
    finally:
        remove_hybrid(pipe)
        if what == "context":
            stop_context(denoiser_of(pipe))


@contextmanager
def by_xdit(pipe: Any, what: str, config: HybridConfig | None, name: str, steps: int) -> Iterator[None]:
    ranks = dist.get_world_size()
    within = "data_parallel_degree" if config is None else "ulysses_degree"  # of ranks that evaluate alone, or a branch
    degrees = {XDITS[what]: ranks} if what in XDITS else {"use_cfg_parallel": True, within: ranks // 2}
    engine_config = group.xdit_config(**degrees)
    from xfuser.core.distributed import initialize_runtime_state

    from hybridiff_xdit.xdit.groups import apply_on_groups, one_branch

    initialize_runtime_state(pipe, engine_config)
    if config is not None:
        apply_on_groups(pipe, config, engine_config, splits=True)
    # Of Qwen-Image's models only the one for editing has a preset for guided calls.
    preset = name.replace("Qwen-Image", "Qwen-Image-Edit")
    try:
        with one_branch(), rivals.cached_steps(pipe, preset, steps) if what == "dbcache" else nullcontext():
            yield
    finally:
        remove_hybrid(pipe)


def stop_context(denoiser: Any) -> None:
    """Take diffusers' context parallelism off a denoiser."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    remove_context_parallel(denoiser, denoiser._cp_plan)
    denoiser._parallel_config = None
    for module in denoiser.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = None


def whole_run(pipe: Any, setting: Any, call: Any, warm_up: int, where: Any, is_ours: bool) -> Found:
    """Seconds of one run, after another of ``warm_up`` steps."""
    loop, device, host = where
    try:
        with setting:
            warm = timing.measure(partial(call, warm_up), loop, device, host)
            sample = timing.measure(call, loop, device, host)
            report = last_report(pipe) or {}
    except Exception as reason:  # on every rank alike
        if is_ours and not isinstance(reason, ValueError):
            raise
        return Found([], refused=f"{type(reason).__name__}: {reason}".splitlines()[0])
    memory = max(warm.memory, sample.memory)
    return Found([sample.seconds], [sample.loop], memory, *map(report.get, ("plan", "speedup_bound", "bytes_sent")))


def compare(model: str, args: argparse.Namespace, where: Any) -> Iterator[list[dict[str, Any]]]:
    """One line a strategy that has run so far, after each turn."""
    start = time.perf_counter()
    name = NAMES_IN_XDIT.get(model) if args.xdit else None
    if args.xdit:
        group.xdit_config(use_cfg_parallel=True, ulysses_degree=dist.get_world_size() // 2)
    pipe, arguments = make(model, where[1], args.tiny, name is not None)
    denoiser = denoiser_of(pipe)
    arguments["num_inference_steps"] = args.steps
    with applied(pipe, "one-gpu", None, name, args.steps):
        cond, streams = middle_step(pipe, denoiser, arguments)
    facts = dict(model=model, steps=args.steps, streams=streams, ranks=dist.get_world_size())
    facts["parameters"] = sum(weight.numel() for weight in denoiser.parameters())
    plans = {"plan": plan_of(args.steps), "plan-40": plan_of(args.steps, 0.4)}
    plans["pipelined"] = f"{round(0.16 * args.steps)}-{round(0.96 * args.steps)}/4"
    configs = {what: HybridConfig(plan=plan, stages=args.stages) for what, plan in plans.items()}
    configs["cfg"] = HybridConfig(policy="cfg", stages=args.stages)
    configs["adaptive"] = HybridConfig(speedup=2.5, stages=args.stages)
    latents: dict[str, torch.Tensor] = {}
    lines: dict[str, dict[str, Any]] = {}

    def call(what: str, steps: int | None = None) -> None:
        if what != "one-gpu" or dist.get_rank() == 0:
            latents[what] = run(pipe, arguments | dict(num_inference_steps=steps or args.steps))

    for what in args.strategies * args.repeats:
        if lines.get(what, {}).get("refused"):
            continue
        gc.collect()
        torch.cuda.empty_cache()  # does nothing on a CPU
        setting = applied(pipe, what, configs.get(what), name, args.steps)
        if what in FORWARDS:
            with setting:
                found = forwards(denoiser, cond.inputs, what == "graph", args.steps, where)
        else:
            # A plain pipeline captures nothing, and a plan fits runs of its own length alone.
            warm_up = args.warm_up if what == "cfg" else args.steps if what in (*OURS, "dbcache") else 1
            found = whole_run(pipe, setting, partial(call, what), warm_up, where, what in configs)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found, group=where[2])
        line = lines.setdefault(
            what, {**facts, "strategy": what, "seconds": [], "loop": [], "by_rank": [], "memory": []}
        )
        refused = next((rank.refused for rank in ranks if rank.refused), None)  # all ranks leave it out from then on
        line |= dict(plan=found.plan, bound=found.bound, sent=found.sent, refused=refused)
        line["seconds"] += map(max, zip(*(rank.seconds for rank in ranks), strict=False))  # one may have none
        line["loop"] += map(max, zip(*(rank.loop for rank in ranks), strict=False))
        line["by_rank"].append([rank.seconds for rank in ranks])
        line["memory"].append([rank.memory for rank in ranks])
        line["since_start"] = time.perf_counter() - start
        if what in latents and "one-gpu" in latents:
            ours, reference = latents[what].float(), latents["one-gpu"].float()
            line["error"] = float((ours - reference).norm() / reference.norm())  # nan where not finite
        yield list(lines.values())


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, a row a model and strategy; ratios are of medians, and the error is that to one GPU's latents."""
    rows = [HEAD, "--- | " * HEAD.count("|") + "---"]
    medians = {(line["model"], line["strategy"]): statistics.median(line["seconds"] or [0]) for line in lines}
    for line in lines:
        model, what, seconds, plan = (line[key] for key in ("model", "strategy", "seconds", "plan"))
        if not seconds:
            rows.append(f"{model} | {what} | {line['refused']}" + " |" * (HEAD.count("|") - 2))
            continue
        median, is_run = medians[model, what], what not in FORWARDS
        alone = min(filter(None, (medians.get((model, name)) for name in FORWARDS)), default=None)
        # The forwards of a rank. What splits the tokens has no floor of forwards.
        made = {"one-gpu": line["streams"] * line["steps"], **dict.fromkeys(FORWARDS, 1)}.get(what)
        if plan:
            made = line["streams"] * line["steps"] / line["bound"]
        one = medians.get((model, "one-gpu"))
        memory = [max(turns) / 2**30 for turns in zip(*line["memory"], strict=True)]
        cells = [model, f"{what} {plan or ''}".strip(), f"{median:.4g} ({min(seconds):.4g} - {max(seconds):.4g})"]
        cells.append(f"{1e3 * median / line['steps']:.1f}" if is_run else "")
        cells.append(f"{median / made / alone:.3f}" if alone and made else "")
        loop = statistics.median(line["loop"]) if line["loop"] else None
        cells.append(f"{loop / made / alone:.3f}" if alone and made and loop else "")
        cells.append(f"{one / median:.2f}" if one and is_run else "")
        cells.append(f"{line['bound']:.2f}" if line["bound"] else "")
        cells.append(f"{line['error']:.1e}" if "error" in line else "")
        cells.append(" / ".join(f"{count:.1f}" for count in memory if count))
        cells.append(" / ".join(f"{count / 1e6:.0f}" for count in line["sent"] or []))
        rows.append(" | ".join(cells))
    return "".join(f"| {row} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=[*FORWARDS, "one-gpu", "cfg", "plan"])
    parser.add_argument("--stages", type=int, default=2, help="of ours, where there are more than two ranks")
    parser.add_argument("--xdit", action="store_true", help="xDiT's own denoisers, on its groups")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each strategy")
    parser.add_argument("--warm-up", type=int, default=3, metavar="STEPS", help="of cfg, whose turn begins with them")
    parser.add_argument("--tiny", action="store_true", help="small models of the same classes")
    parser.add_argument("--commit", help="for the report, where there is no git repository")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    device = group.join()
    if not args.xdit and (needs := {*XDITS} & {*args.strategies}):
        raise SystemExit(f"{' and '.join(sorted(needs))}: give --xdit.")
    if args.xdit and dist.get_world_size() % 2:
        raise SystemExit("--xdit: give an even --nproc_per_node.")
    where = timing.Loop(device), device, dist.new_group(backend="gloo")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    facts = {key: value for key, value in vars(args).items() if key != "out"}
    facts["commit"] = args.commit or git.stdout.strip() or "unknown"
    facts["device"] = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    facts |= dict(dtype="bfloat16", torch=torch.__version__, diffusers=diffusers.__version__)
    done: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        lines: list[dict[str, Any]] = []
        for lines in compare(model, args, where):
            if dist.get_rank() == 0:  # what is measured is kept, whatever comes next
                text = f"{', '.join(f'{key} {value}' for key, value in facts.items())}\n\n{table(done + lines)}"
                (args.out / "modern.json").write_text(json.dumps({**facts, "lines": done + lines}, indent=1))
                (args.out / "modern.md").write_text(text)
        done += lines
        gc.collect()
        torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        print(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
