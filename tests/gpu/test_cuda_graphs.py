"""CUDA graphs on one GPU that plays both ranks: the same bits as without, and what they cost."""

import gc
from functools import cache

import pytest
import tiny
import torch
from peft import LoraConfig

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid
from hybridiff_xdit.evaluate import graphs
from hybridiff_xdit.evaluate.graphs import seconds_between
from hybridiff_xdit.seam.hooks import _SESSIONS, denoiser_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PLAN = "FFFSPFFPPPFPPPSF"
FIXED = dict(plan=PLAN, balance="flops")  # without graphs nothing is timed, and the cuts are the FLOPs'


@pytest.fixture(params=["float32", "float16"])
def dtype(request):
    return getattr(torch, request.param)


@cache  # the partition of a new denoiser takes seconds to find
def shared(name, dtype):
    return pipeline(name, dtype)


def pipeline(name, dtype=torch.float16):
    return tiny.PIPELINES[name]().to("cuda", dtype)


def call(pipe, name, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return tiny.call(pipe, name, **{"num_inference_steps": len(PLAN), **kwargs})


def add_lora(denoiser):
    torch.manual_seed(1)
    targets = ["to_q", "to_v"]
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets), "other")


def captured(pipe):
    return set(_SESSIONS[pipe].graphs(denoiser_of(pipe)).captured())


@pytest.mark.parametrize("fields", [dict(plan=PLAN), dict(policy="cfg"), dict(speedup=2.5)], ids=str)
@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_graphs_give_the_same_bits(name, fields, dtype):
    pipe = shared(name, dtype)
    calls = [dict(), dict(height=48), dict(seed=1)]
    apply_hybrid(pipe, HybridConfig(**fields, balance="flops", cuda_graphs=False), simulate=True)
    expected = [call(pipe, name, **kwargs) for kwargs in calls]
    plan = last_report(pipe)["plan"]
    assert not captured(pipe)
    apply_hybrid(pipe, HybridConfig(**fields, balance="flops"), simulate=True)
    found = [call(pipe, name, **kwargs) for kwargs in calls]
    assert last_report(pipe)["plan"] == plan
    assert len(captured(pipe)) >= (3 if "plan" in fields else 1)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_other_weights_and_adapters_are_noticed(name):
    """Between calls and, by a callback, within one."""
    pipe = pipeline(name)
    denoiser = pipe.transformer if name == "sd3" else pipe.unet

    def scales(pipe, step, timestep, tensors):
        if step == 8:
            pipe.set_adapters("other", 0.25)
        return {}

    def changes():
        yield {}
        add_lora(denoiser)
        pipe.set_adapters("other", 1.0)
        yield {}
        yield dict(callback_on_step_end=scales)
        pipe.set_adapters("other", 0.5)
        yield {}
        pipe.disable_lora()
        yield {}
        pipe.to("cpu")
        ballast = torch.empty(2**20, device="cuda")
        pipe.to("cuda")
        yield {}
        del ballast
        with torch.no_grad():
            next(denoiser.parameters()).mul_(1.5)
        yield {}

    def pictures(**fields):
        apply_hybrid(pipe, HybridConfig(plan=PLAN, **{"balance": "flops", **fields}), simulate=True)
        before = {key: value.clone() for key, value in denoiser.state_dict().items()}
        found = [call(pipe, name, **kwargs) for kwargs in changes()]
        pipe.unload_lora_weights()
        denoiser.load_state_dict(before)
        return found

    graphed, eager = pictures(), pictures(cuda_graphs=False)
    assert all(map(torch.equal, graphed, eager))
    assert len({picture.sum().item() for picture in eager}) >= 5


def test_what_runs_on_the_host_is_left_alone(caplog):
    """An offloaded denoiser, and a forward that a capture does not allow: eager, said once, and right."""
    pipe = pipeline("sdxl")
    expected = call(apply_hybrid(pipe, HybridConfig(**FIXED, cuda_graphs=False), simulate=True), "sdxl")
    apply_hybrid(pipe, HybridConfig(**FIXED), simulate=True)
    block = pipe.unet.mid_block
    original = block.forward

    def forward(hidden, *args, **kwargs):
        assert hidden.isfinite().all().item()  # waits for the GPU
        return original(hidden, *args, **kwargs)

    block.forward = forward
    for _ in range(2):
        assert torch.equal(call(pipe, "sdxl"), expected)
    assert caplog.text.count("capturing failed") == 1 and not captured(pipe)
    assert torch.randn(3, device="cuda").isfinite().all()
    del block.forward
    remove_hybrid(pipe)
    pipe.enable_model_cpu_offload()
    apply_hybrid(pipe, HybridConfig(**FIXED), simulate=True)
    assert torch.equal(call(pipe, "sdxl"), expected)
    assert "by a hook" in caplog.text and not captured(pipe)


def test_a_failed_capture_gives_its_memory_back():
    """And PyTorch gives back what others free later."""

    def waits():
        torch.ones(2**26, device="cuda").sum().item()

    before = reserved()
    with pytest.raises(RuntimeError):
        graphs._capture(waits, None)
    torch.ones(2**26, device="cuda")
    assert reserved() == before


def test_compiled_blocks_are_captured(caplog):
    pipe = pipeline("sd3")
    for block in pipe.transformer.transformer_blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    expected = call(apply_hybrid(pipe, HybridConfig(**FIXED, cuda_graphs=False), simulate=True), "sd3")
    assert torch.equal(call(apply_hybrid(pipe, HybridConfig(**FIXED), simulate=True), "sd3"), expected)
    assert len(captured(pipe)) == 4 and "CUDA graphs" not in caplog.text


def reserved():
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_memory_is_released_on_removal():
    pipe = pipeline("sdxl")

    def used():
        """Reserved while the graphs are there, and after."""
        apply_hybrid(pipe, HybridConfig(**FIXED), simulate=True)
        call(pipe, "sdxl", height=512, width=512)
        during = reserved()
        remove_hybrid(pipe)
        return during, reserved()

    _, first = used()  # the stream of captures keeps a workspace of cuBLAS's from its first use on
    during, second = used()
    assert second == first < during


def test_timing_gives_its_memory_back():
    """Else it would lie beside that of the graphs."""
    size = 2**28

    def run(mark):
        mark()
        torch.ones(size, device="cuda", dtype=torch.uint8)
        mark()

    before = reserved()
    assert seconds_between(run) is not None
    assert torch.cuda.memory_reserved() - before < size
