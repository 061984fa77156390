"""Time large guided models through plain diffusers: a branch's forward, one GPU, and `hybrid-cond` on two.

    PYTHONPATH=. torchrun --nproc_per_node 2 benchmarks/modern.py --models qwen-image wan-14b --steps 10 --out DIR
    PYTHONPATH=. torchrun --nproc_per_node 2 benchmarks/modern.py --tiny --steps 5 --repeats 2 --out DIR

The denoisers have their real sizes and random weights in bf16. There are no text encoders and no VAE: embeddings go in
and latents come out. With ``--tiny`` they are small models of the same classes, for a CPU. The strategies are:

    eager     one branch's forward in a loop; Python launches the kernels
    graph     the same forward as a CUDA graph, where it can be captured
    one-gpu   the plain pipeline on rank 0, which evaluates both branches; rank 1 waits
    cfg       every step FULL, on two ranks
    plan      a fixed plan on two ranks: one step in five is SKIPPED, spread evenly after a warm-up
    adaptive  a target speed-up of 2.5 on two ranks; with random weights its choice of steps means nothing

The strategies take turns. In each turn a strategy is set up anew, warmed up by a run that ends, and measured by one
whole run (or ``--forwards`` forwards). (A run that is interrupted teaches `hybrid-cond` nothing: where a pipeline calls
its denoiser once a branch, both ranks would evaluate both branches on the first step of the next run again.) A run's
time is that of the whole call of the pipeline, from a barrier to the end of the GPU's work, on the slower rank. Both
ranks measure a forward at once, each on its own GPU. F is the smaller of eager and graph on the slower rank, and the
floor of a run is F times the forwards that a rank makes. The results are
in DIR/modern.json, which is rewritten after each turn, and DIR/modern.md.
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
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import group
import timing
import torch
import torch.distributed as dist
from scenarios import SCENARIOS, _made_in
from torch.utils._pytree import tree_map

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid

MODELS = ("qwen-image", "wan-14b", "sd3-medium", "sdxl")
FORWARDS = ("eager", "graph")
STRATEGIES = (*FORWARDS, "one-gpu", "cfg", "plan", "adaptive")

QWEN_TINY: dict[str, Any] = dict(num_layers=4, num_attention_heads=3, attention_head_dim=16, axes_dims_rope=(8, 4, 4))
QWEN_TINY |= dict(joint_attention_dim=32, in_channels=16, out_channels=4)
QWEN_SHIFT = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
WAN_TINY = dict(num_layers=4, num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32)
WAN_FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
HEAD = "model | strategy | s, median (min - max) | ms a step | of floor | over one GPU | bound | error | GiB by rank"


def make(model: str, device: torch.device, is_tiny: bool) -> tuple[Any, dict[str, Any]]:
    """A model's pipeline, with the same random weights on every rank, and the arguments of its call."""
    absent: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if model == "qwen-image":
        with device, _made_in(torch.bfloat16):  # the classes' defaults are the published configurations
            denoiser: Any = diffusers.QwenImageTransformer2DModel(**QWEN_TINY if is_tiny else {})
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**QWEN_SHIFT)
        pipe: Any = diffusers.QwenImagePipeline(transformer=denoiser, scheduler=scheduler, **absent)
        side = 128 if is_tiny else 1024
        arguments: dict[str, Any] = dict(height=side, width=side, true_cfg_scale=4.0)
        arguments |= embeds(denoiser, denoiser.config.joint_attention_dim, 200, 20)
    elif model == "wan-14b":
        with device, _made_in(torch.bfloat16):
            denoiser = diffusers.WanTransformer3DModel(**WAN_TINY if is_tiny else {})
        scheduler = diffusers.UniPCMultistepScheduler(**WAN_FLOW)
        pipe = diffusers.WanPipeline(transformer=denoiser, scheduler=scheduler, **absent)
        size = dict(height=64, width=64, num_frames=9) if is_tiny else dict(height=480, width=832, num_frames=81)
        arguments = dict(size, guidance_scale=5.0, **embeds(denoiser, denoiser.config.text_dim, 512, 512))
    else:
        scenario = SCENARIOS[f"{model.partition('-')[0]}-tiny" if is_tiny else f"{model}-1024"]
        pipe = scenario.pipeline(device, torch.bfloat16)
        denoiser, arguments = pipe.unet if model == "sdxl" else pipe.transformer, scenario.arguments(pipe)
    fill(denoiser.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(arguments, output_type="latent", return_dict=False)


def embeds(denoiser: Any, width: int, cond: int, uncond: int) -> dict[str, torch.Tensor]:
    """Random embeddings of so many tokens."""
    generator, names = torch.Generator().manual_seed(1), ("prompt_embeds", "negative_prompt_embeds")
    tokens = zip(names, (cond, uncond), strict=True)
    return {
        name: torch.randn(1, n, width, generator=generator).to(denoiser.device, torch.bfloat16) for name, n in tokens
    }


@torch.no_grad()
def fill(denoiser: Any) -> None:
    """Draw the weights where they lie. What `from_pretrained` keeps in fp32 becomes fp32."""
    torch.manual_seed(0)
    for module in denoiser.modules():
        for name, weight in module.named_parameters(recurse=False):
            is_scale = name == "weight" and "Norm" in type(module).__name__
            weight.fill_(1) if is_scale else weight.normal_(0, 0.02)
    kept = denoiser._keep_in_fp32_modules or ()
    for name, weight in denoiser.named_parameters():
        if any(part in kept for part in name.split(".")):
            weight.data = weight.data.float()


def plan_of(steps: int) -> str:
    """Letters of a plan with one SKIPPED step in five: nearly a third is warm-up, and the last step is FULL."""
    count, start = round(0.2 * steps), round(0.3 * steps)
    skipped = {start + int((i + 0.5) * (steps - 1 - start) / count) for i in range(count)}
    return "".join("S" if step in skipped else "F" for step in range(steps))


def run(pipe: Any, arguments: dict[str, Any], steps: int | None = None) -> torch.Tensor:
    """The latents that the pipeline returns; with ``steps``, those after so many."""

    def stop(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        pipe._interrupt = step + 1 >= steps
        return {}

    generator = torch.Generator().manual_seed(0)
    return pipe(**arguments, generator=generator, callback_on_step_end=stop if steps else None)[0]


def branch_inputs(pipe: Any, denoiser: Any, arguments: dict[str, Any]) -> Any:
    """What the pipeline gives the denoiser for cond on its first step: the first call, or the second half of one."""
    calls: list[Any] = []
    hook = denoiser.register_forward_pre_hook(lambda module, *given: calls.append(given), with_kwargs=True)
    run(pipe, arguments, steps=1)
    hook.remove()
    if len(calls) == 2:
        return calls[0]
    return tree_map(lambda leaf: leaf[1:].clone() if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf, calls[0])


class Found(NamedTuple):
    """What one turn of a strategy gave on one rank."""

    seconds: list[float]
    memory: int = 0  # most bytes reserved
    plan: str | None = None
    bound: float | None = None
    refused: str | None = None


def forwards(denoiser: Any, inputs: Any, is_graph: bool, count: int, where: Any) -> Found:
    """Seconds of each of ``count`` forwards in a loop; none where the forward cannot be captured."""
    loop, device, host = where
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    graphs = timing.Graphs(denoiser, is_on=is_graph)
    with torch.no_grad():
        graphs.begin(device)
        graphs.look()
        call: Any = partial(graphs, "forward", lambda given: denoiser(*given[0], **given[1]), inputs)
        if is_graph:
            for _ in range(2):  # the second is captured
                call()
            call = graphs.captured().get("forward")
        dist.barrier(group=host)
        if call is None:
            return Found([], refused="not captured")
        marks = [loop._mark()]
        for _ in range(count + 1):  # the first warms up
            call()
            marks.append(loop._mark())
    if not is_cuda:
        return Found([b - a for a, b in pairwise(marks[1:])])
    torch.cuda.synchronize()
    return Found([a.elapsed_time(b) / 1e3 for a, b in pairwise(marks[1:])], torch.cuda.max_memory_reserved())


def whole_run(pipe: Any, config: HybridConfig | None, call: Any, warm_up: int, where: Any) -> Found:
    """Seconds of one run, after another of ``warm_up`` steps."""
    loop, device, host = where
    try:
        if config is not None:
            apply_hybrid(pipe, config)
    except ValueError as reason:  # on every rank alike
        return Found([], refused=str(reason))
    try:
        warm = timing.measure(partial(call, warm_up), loop, device, host)
        sample = timing.measure(call, loop, device, host)
        report = last_report(pipe) or {}
    finally:
        remove_hybrid(pipe)
    return Found([sample.seconds], max(warm.memory, sample.memory), report.get("plan"), report.get("speedup_bound"))


def compare(model: str, args: argparse.Namespace, where: Any) -> Iterator[list[dict[str, Any]]]:
    """One line a strategy that has run so far, after each turn."""
    start = time.perf_counter()
    pipe, arguments = make(model, where[1], args.tiny)
    denoiser: Any = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    arguments["num_inference_steps"] = args.steps
    inputs = branch_inputs(pipe, denoiser, arguments)
    facts = dict(model=model, steps=args.steps, parameters=sum(weight.numel() for weight in denoiser.parameters()))
    configs = {"one-gpu": None, "cfg": HybridConfig(policy="cfg"), "plan": HybridConfig(plan=plan_of(args.steps))}
    configs["adaptive"] = HybridConfig(speedup=2.5)
    latents: dict[str, torch.Tensor] = {}
    lines: dict[str, dict[str, Any]] = {}

    def call(what: str, steps: int | None = None) -> None:
        if configs[what] is not None:
            latents[what] = run(pipe, arguments | dict(num_inference_steps=steps or args.steps))
        elif dist.get_rank() == 0:
            latents[what] = run(pipe, arguments, steps)

    for what in args.strategies * args.repeats:
        if lines.get(what, {}).get("refused"):
            continue
        gc.collect()
        torch.cuda.empty_cache()  # does nothing on a CPU
        if what in FORWARDS:
            found = forwards(denoiser, inputs, what == "graph", args.forwards, where)
        else:
            # A plain pipeline captures nothing, and a plan fits runs of its own length alone.
            warm_up = 1 if configs[what] is None else args.warm_up if what == "cfg" else args.steps
            found = whole_run(pipe, configs[what], partial(call, what), warm_up, where)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found, group=where[2])
        line = lines.setdefault(what, {**facts, "strategy": what, "seconds": [], "by_rank": [], "memory": []})
        refused = next((rank.refused for rank in ranks if rank.refused), None)  # all ranks leave it out from then on
        line |= dict(plan=found.plan, bound=found.bound, refused=refused)
        line["seconds"] += map(max, zip(*(rank.seconds for rank in ranks), strict=False))  # one may have none
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
        made = (plan.count("F") + plan.count("P") / 2 if plan else 2 * line["steps"]) if is_run else 1
        one = medians.get((model, "one-gpu"))
        memory = [max(turns) / 2**30 for turns in zip(*line["memory"], strict=True)]
        cells = [model, f"{what} {plan or ''}".strip(), f"{median:.4g} ({min(seconds):.4g} - {max(seconds):.4g})"]
        cells.append(f"{1e3 * median / line['steps']:.1f}" if is_run else "")
        cells.append(f"{median / made / alone:.3f}" if alone else "")
        cells.append(f"{one / median:.2f}" if one and is_run else "")
        cells.append(f"{line['bound']:.2f}" if line["bound"] else "")
        cells.append(f"{line['error']:.1e}" if "error" in line else "")
        rows.append(" | ".join([*cells, " / ".join(f"{count:.1f}" for count in memory if count)]))
    return "".join(f"| {row} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES[:-1]))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each strategy")
    parser.add_argument("--forwards", type=int, default=3, help="that are timed in a turn")
    parser.add_argument("--warm-up", type=int, default=3, metavar="STEPS", help="of cfg, whose turn begins with them")
    parser.add_argument("--tiny", action="store_true", help="small models of the same classes")
    parser.add_argument("--commit", help="for the report, where there is no git repository")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    device = group.join()
    if dist.get_world_size() != 2 and set(args.strategies) - {*FORWARDS, "one-gpu"}:
        raise SystemExit("Give --nproc_per_node 2, or 1 with --strategies eager graph one-gpu.")
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
