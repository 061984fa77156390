"""Pieces called by graph, on a CPU: capturing is replaced by a tape that runs the piece again on the inputs held.

What the tape cannot show, that a GPU's graphs give the same bits, is tests/gpu/test_cuda_graphs.py.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import test_simulate
import tiny
import torch
import torch.distributed as dist
from torch import nn

from hybridiff_xdit import HybridConfig, apply_hybrid, remove_hybrid
from hybridiff_xdit.evaluate import graphs
from hybridiff_xdit.evaluate.graphs import MOST_FIRST_CALLS, MOST_KEYS, Graphs, release_before_groups
from hybridiff_xdit.trees import map_tensors, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tape(monkeypatch):
    """Calls of each captured piece."""
    taped = []

    def capture(piece, pool):
        outputs = map_tensors(lambda t: torch.full_like(t, -77), piece())  # a capture computes nothing
        index = len(taped)
        taped.append(0)

        def replay():
            taped[index] += 1
            for held, new in zip(tensors_of(outputs), tensors_of(piece()), strict=True):
                held.copy_(new)

        return replay, outputs

    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return taped


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 2.0))
        self.inner = nn.Identity()
        self.note = [].append  # a method: a list would be state that changes on every call

    def forward(self, x, scale=1.0):
        self.note(x)
        return self.weight * self.inner(x) * scale


@pytest.fixture
def double(tape):
    module = Double()
    caller = Graphs(module)

    def call(value, **kwargs):
        with torch.no_grad():
            caller.begin(torch.device("cpu"))
            caller.look()
            return caller("piece", lambda x, kwargs: module(x, **kwargs), torch.full((2,), value), kwargs)[0].item()

    call.module, call.graphs, call.tape = module, caller, tape
    return call


def test_the_second_call_is_captured_and_later_ones_are_replays(double):
    assert [double(v) for v in (1.0, 2.0, 3.0, 4.0)] == [2.0, 4.0, 6.0, 8.0]
    assert double.tape == [3]


def test_compiled_blocks_are_captured_on_the_second_call_too(double):
    block = nn.Linear(2, 2, bias=False)
    nn.init.eye_(block.weight)
    double.module.inner = torch.compile(block, backend="eager")
    assert [double(v) for v in (1.0, 2.0, 3.0, 4.0)] == [2.0, 4.0, 6.0, 8.0]
    assert double.tape == [3]


def test_what_is_returned_is_the_callers_own(double):
    caller, module = double.graphs, double.module
    with torch.no_grad():
        caller.begin(torch.device("cpu"))
        caller.look()
        found = [caller("piece", module, torch.full((2,), float(i))) for i in range(4)]
    assert [out[0].item() for out in found] == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module, "weight", nn.Parameter(torch.full((2,), 5.0))),
        lambda module: setattr(module.weight, "data", torch.full((2,), 5.0)),
        lambda module: setattr(module, "inner", nn.Sequential()),
        lambda module: setattr(module, "scaling", {"default": 0.5}),
        lambda module: setattr(module.inner, "processor", object()),
        lambda module: module.eval(),
        lambda module: setattr(module, "s1", 0.9),
    ],
    ids=["parameter", "moved weights", "module", "adapter scale", "attention processor", "mode", "constant"],
)
def test_a_denoiser_that_changed_is_captured_anew(double, change):
    for value in (1.0, 2.0, 3.0):
        double(value)
    change(double.module)
    expected = double.module.weight[0].item()
    assert [double(v) for v in (1.0, 2.0, 3.0)] == [expected, 2 * expected, 3 * expected]
    assert double.tape == [2, 2]


class Scaled:
    """As an attention processor with a scale, which a callback changes."""

    scale = 1.0


def test_adapters_and_processors_are_noticed_within_a_run(double):
    module, caller = double.module, double.graphs
    module.inner.processor, module.scaling = Scaled(), {"default": 1.0}
    changes = {
        2: lambda: setattr(module.inner.processor, "scale", 0.5),
        4: lambda: module.scaling.update(default=0.5),
        6: lambda: setattr(module.inner, "processor", Scaled()),
    }
    with torch.no_grad():
        caller.begin(torch.device("cpu"))
        for step in range(8):
            changes.get(step, lambda: None)()
            caller.look()
            caller("piece", module, torch.ones(2))
    assert double.tape == [1, 1, 1, 1]


@pytest.fixture
def part(double):
    """Calls a part of the forward: another piece, whose inputs are the forward's."""

    def call(value, **kwargs):
        x = torch.full((2,), value)
        with torch.no_grad():
            return double.graphs("part", lambda x, kwargs: 10 * double.module(x, **kwargs), x, kwargs)[0]

    return call


def test_a_part_of_a_captured_forward_is_captured_on_its_first_call(double, part):
    double(1.0)
    assert part(1.0) == 20.0 and not double.tape  # the forward has run, but is not captured
    double(1.0)
    assert part(2.0) == 40.0 and double.tape == [1, 1]
    assert part(3.0, scale=2.0) == 120.0 and double.tape == [1, 1, 1]  # as a boundary would be
    with torch.no_grad():
        assert double.graphs("part", lambda x: 5 * x, torch.ones(3))[0] == 5.0  # other inputs
    assert double.tape == [1, 1, 1]
    double.module.weight = nn.Parameter(torch.full((2,), 3.0))
    double(1.0)
    assert part(1.0) == 30.0 and double.tape == [1, 1, 1]  # nor with these weights


def test_a_part_that_cannot_be_captured_at_once_is_captured_on_its_second_call(double, part, monkeypatch, caplog):
    for _ in range(2):
        double(1.0)
    capture, tries = graphs._capture, []

    def compiles_first(piece, pool):
        tries.append(piece)
        if len(tries) == 1:
            raise RuntimeError("autotuning is not permitted when stream is capturing")
        return capture(piece, pool)

    monkeypatch.setattr(graphs, "_capture", compiles_first)
    assert [part(v) for v in (1.0, 2.0, 3.0)] == [20.0, 40.0, 60.0]
    assert double.tape == [1, 2] and len(tries) == 2 and not caplog.text


def test_weights_changed_in_place_are_no_reason(double):
    for value in (1.0, 2.0, 3.0):
        double(value)
    with torch.no_grad():
        double.module.weight.mul_(2)
    assert double(3.0) == 12.0 and double.tape == [3]


def test_other_constants_have_a_graph_of_their_own(double):
    values = [double(1.0, scale=scale) for scale in (1.0, 3.0) * 3]
    assert values == [2.0, 6.0] * 3 and double.tape == [2, 2]


def test_a_constant_that_changes_on_every_step_is_said_and_not_captured(double, caplog):
    values = [double(1.0, scale=float(i)) for i in range(MOST_FIRST_CALLS + 5)]
    assert values == [2.0 * i for i in range(MOST_FIRST_CALLS + 5)] and not double.tape
    assert caplog.text.count("with another argument") == 1


def test_the_graphs_used_last_are_kept(double):
    for i in range(MOST_KEYS + 4):
        for _ in range(2):
            double(1.0, scale=float(i))
    assert len(double.graphs._graphs) == MOST_KEYS
    captured = len(double.tape)
    double(1.0, scale=float(MOST_KEYS + 3))
    assert len(double.tape) == captured
    double(1.0, scale=0.0)  # gone: called as it is
    double(1.0, scale=0.0)  # and captured anew
    assert len(double.tape) == captured + 1


HOOKS = {
    "forward hook": lambda m: m.inner.register_forward_hook(lambda *args: None),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "accelerate's": lambda m: setattr(m, "_hf_hook", object()),
    "diffusers'": lambda m: setattr(m.inner, "_diffusers_hook", SimpleNamespace(hooks={"cache": object()})),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_is_said_once_and_runs_on_every_call(double, kind, caplog):
    HOOKS[kind](double.module)
    assert [double(v) for v in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]
    assert not double.tape and len(double.module.note.__self__) == 3
    assert caplog.text.count("runs without CUDA graphs, since") == 1 and "hook" in caplog.text


def test_a_registry_without_hooks_is_no_matter(double):
    """As a pipeline leaves behind that names its calls."""
    double.module._diffusers_hook = SimpleNamespace(hooks={})
    assert [double(v) for v in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0] and double.tape == [2]


def test_state_that_changes_on_every_step_is_captured_for_none(double):
    """A list that a forward appends to, say."""
    double.module.noted = noted = []
    double.module.note = noted.append
    assert [double(v) for v in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0] and not double.tape


def test_gradients_and_autocast_are_no_matter_for_a_graph(tape, monkeypatch, caplog):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: not torch.is_grad_enabled())  # no GPU, no autocast
    for context, word in ((torch.enable_grad(), "gradients"), (nullcontext(), "autocast")):
        module = Double()
        caller = Graphs(module)
        with torch.no_grad(), context:
            for _ in range(3):
                caller.begin(torch.device("cpu"))
                caller.look()
                caller("piece", module, torch.ones(2))
        assert not tape and word in caplog.text


def test_what_cannot_be_captured_runs_as_it_is_and_is_said_once(double, monkeypatch, caplog):
    def capture(piece, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_capture", capture)
    assert [double(v) for v in (1.0, 2.0, 3.0, 4.0)] == [2.0, 4.0, 6.0, 8.0]
    assert caplog.text.count("operation not permitted") == 1


@pytest.mark.parametrize("fields", [{"plan": "FFSPFFPPSF"}, {"plan": "FFPPPFPPPF", "guidance": "mixed"}], ids=str)
@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_runs_are_the_oracle(tape, name, fields):
    test_simulate.check(tiny.pipeline(name), name, fields)
    assert sum(tape) >= 5


def test_a_second_run_and_another_resolution_are_right(tape):
    pipe = apply_hybrid(tiny.pipeline("sdxl"), HybridConfig(plan="FFPPPFPPPF"), simulate=True)
    try:
        sizes = ((32, 32), (32, 32), (48, 32), (32, 32))
        found = [tiny.call(pipe, "sdxl", height=h, width=w, seed=i) for i, (h, w) in enumerate(sizes)]
        eager = apply_hybrid(pipe, HybridConfig(plan="FFPPPFPPPF", cuda_graphs=False), simulate=True)
        before = sum(tape)
        expected = [tiny.call(eager, "sdxl", height=h, width=w, seed=i) for i, (h, w) in enumerate(sizes)]
        assert sum(tape) == before > 40
        assert all(map(torch.equal, found, expected))
    finally:
        remove_hybrid(pipe)


def test_graphs_that_hold_exchanges_are_released_before_a_group_is_destroyed(double, monkeypatch):
    held = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: held.append((group, double.graphs.captured())))
    before = dist.destroy_process_group
    for _ in range(2):
        end = release_before_groups(double.graphs)
    for _ in range(2):
        double(1.0)
    assert double.graphs.captured()
    dist.destroy_process_group("a group")
    assert held == [("a group", {})]
    end()
    assert dist.destroy_process_group is before
