"""`xdit-hybrid serve`: requests by a real HTTP client to ranks on this machine's CPU."""

import io
import json
import os
import re
import signal
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor

import av
import httpx
import numpy as np
import nursery
import pytest
import tiny
import torch
import xdit_tiny
from PIL import Image
from ranks import Ranks

from hybridiff_xdit import HybridConfig, hybrid, last_report
from hybridiff_xdit.seam.hooks import configure
from hybridiff_xdit.xdit import cli, serve
from hybridiff_xdit.xdit.serving.messages import Messages

pytestmark = pytest.mark.usefixtures("one_thread")

QUEUE = 8
CAT = {"prompt": "a cat", "negative_prompt": "ugly", "seed": 3, "num_inference_steps": 8, "guidance_scale": 7.0}
LONG = {"prompt": "a cat", "num_inference_steps": 1000, "tolerance": 1e-9}
WAIT = 60  # seconds for something that takes one, on a machine that is busy

#: The command, with `xdit_serve_worker` as its processes.
WITH_WORKER = """
import sys
from hybridiff_xdit.xdit import cli, processes
start = processes.start
processes.start = lambda module, args, argv: start("xdit_serve_worker", args, argv)
if __name__ == "__main__":
    sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return xdit_tiny.save("sd3", tmp_path_factory.mktemp("sd3"))


class Server:
    """The command, and a client of it."""

    def __init__(self, model, folder):
        self.folder, self.output, self.errors = folder, folder / "output", folder / "errors"
        command = folder / "command.py"
        command.write_text(WITH_WORKER)
        self.output.touch(), self.errors.touch()
        flags = ("serve", "--model", model, "--parallel", "hybrid-cond", "--port", "0", "--queue", str(QUEUE))
        self.process = nursery.start(command, *flags, cwd=folder, output=self.output, errors=self.errors)
        while not (said := self.output.read_text()).endswith("\n") and self.process.is_alive():
            time.sleep(0.02)
        found = re.search(r"on 2 ranks at (http://127\.0\.0\.1:(\d+))$", said)
        assert found, self.errors.read_text()[-4000:]
        self.url, self.port = found[1], int(found[2])
        self.client = httpx.Client(base_url=self.url, timeout=200, limits=httpx.Limits(max_keepalive_connections=0))

    def generate(self, asked):
        return self.client.post("/generate", json=asked)

    def health(self):
        return self.client.get("/health").json()

    def metric(self, name):
        found = re.search(rf"^hybridiff_{re.escape(name)} (.*)$", self.client.get("/metrics").text, re.M)
        return float(found[1]) if found else 0

    def until(self, **expected):
        """Wait until its health says so."""
        deadline = time.monotonic() + WAIT
        while not expected.items() <= (found := self.health()).items():
            assert time.monotonic() < deadline, found
            time.sleep(0.02)

    def leave_open(self, asked):
        """Ask, and return the connection without having read the answer."""
        body = json.dumps(asked).encode()
        head = (
            f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(head.encode() + b"\r\n" + body)
        return connection

    def pid(self, rank):
        return int((self.folder / f"pid {rank}").read_text())

    def kill(self):
        self.client.close()
        self.process.kill()
        self.process.join()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    server = Server(model, tmp_path_factory.mktemp("serve"))
    yield server
    server.process.terminate()
    try:
        server.process.join(WAIT)
        assert server.process.exitcode == 128 + signal.SIGTERM
    finally:
        server.kill()


@pytest.fixture
def own_server(model, tmp_path):
    server = Server(model, tmp_path)
    yield server
    server.kill()


def pixels(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)


# Pictures.


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, HybridConfig()),
        ({"num_inference_steps": 20, "speedup": 2.4}, HybridConfig(speedup=2.4)),
        ({"num_inference_steps": 20, "tolerance": 0.5, "height": 24, "width": 40}, HybridConfig(tolerance=0.5)),
    ],
)
def test_the_picture_is_that_of_one_process(server, changes, config):
    asked = {"height": 32, "width": 32, **CAT, **changes}
    answer = server.generate(asked)
    pipe = xdit_tiny.pipeline("sd3")
    call = {name: value for name, value in asked.items() if name not in ("seed", "speedup", "tolerance")}
    with hybrid(pipe, config, simulate=True):
        expected = pipe(**call, generator=torch.Generator().manual_seed(asked["seed"])).images[0]
        report = last_report(pipe)
    assert np.abs(pixels(answer) - np.asarray(expected)).max() <= 1
    assert answer.headers["x-hybrid-plan"] == report["plan"]
    assert ("S" in report["plan"]) == bool(changes)
    assert float(answer.headers["x-hybrid-bound"]) == pytest.approx(report["speedup_bound"], rel=1e-3)
    assert float(answer.headers["x-hybrid-error"]) == pytest.approx(report["estimated_error"], rel=1e-3, abs=1e-9)
    assert float(answer.headers["x-hybrid-seconds"]) > 0


MIXED = [
    {"prompt": "a cat", "num_inference_steps": 2},
    {"prompt": "a cat", "num_inference_steps": 2, "seed": 1},
    {"prompt": "two dogs", "num_inference_steps": 3},
    {"prompt": "two dogs", "num_inference_steps": 3, "negative_prompt": "grey"},
    {"prompt": "two dogs", "num_inference_steps": 3, "guidance_scale": 2.0},
    {"prompt": "rain", "num_inference_steps": 2, "height": 24, "width": 40},
    {"prompt": "rain", "num_inference_steps": 2, "height": 40, "width": 24},
    {"prompt": "rain", "num_inference_steps": 10, "speedup": 2.5},
    {"prompt": "rain", "num_inference_steps": 10, "tolerance": 1.0},
    {"prompt": "rain", "num_inference_steps": 10},
]


def test_many_requests_from_eight_clients(server):
    alone = [server.generate(asked) for asked in MIXED]
    assert len({answer.content for answer in alone}) == len(MIXED), "these requests are told apart by their pictures"
    made, full = server.metric("seconds_count"), server.metric('steps_total{kind="FULL"}')
    order = [(7 * place) % len(MIXED) for place in range(4 * len(MIXED))]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda number: server.generate(MIXED[number]), order))
    for number, answer in zip(order, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.content == alone[number].content
        assert answer.headers["x-hybrid-plan"] == alone[number].headers["x-hybrid-plan"]
    assert server.metric("seconds_count") == made + len(order)
    counted = sum(answer.headers["x-hybrid-plan"].count("F") for answer in answers)
    assert server.metric('steps_total{kind="FULL"}') == full + counted


def test_health_and_metrics(server, model):
    answer = server.client.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "model": str(model), "ranks": 2, "busy": False, "queue": 0}
    skipped, good = server.metric('steps_total{kind="SKIPPED"}'), server.metric('requests_total{status="200"}')
    seconds = server.metric("seconds_sum")
    plan = server.generate({"prompt": "rain", "num_inference_steps": 20, "speedup": 2.4}).headers["x-hybrid-plan"]
    assert server.metric('steps_total{kind="SKIPPED"}') == skipped + plan.count("S") > skipped
    assert server.metric('requests_total{status="200"}') == good + 1
    assert server.metric("seconds_sum") > seconds
    text = server.client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in text.text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) hybridiff_\w+ .+|hybridiff_\w+(\{\w+=\"\w+\"\})? [\d.]+", line), line


# What is refused, what fails.


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": "a" * 5000}, "prompt", "4096"),
        ({"prompt": ["a cat", "a dog"]}, "prompt", "string"),
        ({"negative_prompt": 3}, "negative_prompt", "string"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": "1"}, "seed", "integer"),
        ({"seed": 1 << 64}, "seed", "less than"),
        ({"height": 30}, "height", "divisible by 4"),  # the model's own rule
        ({"height": 0}, "height", "8"),
        ({"width": 1 << 20}, "width", "8192"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "1000"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "integer"),
        ({"num_frames": 9}, "num_frames", "drop it"),
        ({"guidance_scale": -1}, "guidance_scale", "0"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"tolerance": 0}, "tolerance", "positive"),
        ({"tolerance": float("inf")}, "tolerance", "finite"),
        ({"speedup": 1.5}, "speedup", "from 2"),
        ({"speedup": 2.5, "tolerance": 0.1}, "speedup", "not both"),
        ({"speedup": 6}, "speedup", "num_inference_steps"),  # found when the run's length is known
        ({"output_directory": "/tmp"}, "output_directory", "no such field: use prompt, "),
        ({"model": "other"}, "model", "no such field"),
        ({"a" * 1000: 1}, "a" * 64, "no such field"),
        ({"prompt": "\ud800"}, "prompt", "unicode"),
    ],
)
def test_a_wrong_field_is_named_with_the_mend(server, changes, field, words):
    body = json.dumps({**CAT, **changes})
    answer = server.client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    (problem,) = answer.json()["detail"]
    assert problem["loc"] == ["body", field]
    assert words in problem["msg"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        ("{", "application/json", 422),
        ("[]", "application/json", 422),
        (json.dumps(CAT), "text/plain", 422),  # a page of another site may send that unasked
        (json.dumps({"prompt": "a" * 200_000}), "application/json", 413),
        ("[" * 100_000, "application/json", 400),
        (b"\xff", "application/json", 400),
        (json.dumps({**CAT, "\ud800": 1}), "application/json", 422),  # half a character, which UTF-8 does not have
        (json.dumps({**CAT, **{f"field {number}": 1 for number in range(3000)}}), "application/json", 422),
    ],
)
def test_a_body_that_is_none(server, body, kind, status):
    answer = server.client.post("/generate", content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert len(answer.text) < 5000


@pytest.mark.parametrize("prompt", ["fail in a step", "fail at the end"])
def test_an_error_on_one_rank_is_one_requests_error(server, prompt):
    before = server.generate(CAT)
    answer = server.generate({**CAT, "prompt": prompt})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "OutOfMemoryError: no memory is left"}
    assert "request failed on rank 1" in server.errors.read_text()
    assert server.generate(CAT).content == before.content


# The queue, and clients that go away.


def test_a_client_that_goes_away_ends_its_run(server):
    before = server.generate(CAT)
    made, gone = server.metric("seconds_count"), server.metric('requests_total{status="499"}')
    for step in range(3):  # now and again at another place of the run
        connection = server.leave_open({**LONG, "seed": step})
        server.until(busy=True)
        connection.close()
        server.until(busy=False, queue=0)
    assert server.generate(CAT).content == before.content
    assert server.metric("seconds_count") == made + 1
    assert server.metric('requests_total{status="499"}') == gone + 3


def test_a_full_queue_and_clients_that_leave_it(server):
    before = server.generate(CAT)
    made = server.metric("seconds_count")
    running = server.leave_open(LONG)
    server.until(busy=True, queue=0)
    waiting = [server.leave_open(LONG) for _ in range(QUEUE)]
    server.until(busy=True, queue=QUEUE)
    answer = server.generate(CAT)
    assert answer.status_code == 429
    assert f"{QUEUE} requests are waiting" in answer.json()["detail"] and answer.headers["retry-after"]
    waiting.pop().close()
    server.until(busy=True, queue=QUEUE - 1)
    with ThreadPoolExecutor(1) as client:
        last = client.submit(server.generate, CAT)
        server.until(busy=True, queue=QUEUE)
        for connection in (*waiting, running):
            connection.close()
        assert last.result().content == before.content
    server.until(busy=False, queue=0)
    assert server.metric("seconds_count") == made + 1


# A rank that dies.


def ended(server):
    """The exit status of a server that ends by itself, and what it said after it was ready."""
    server.process.join(WAIT)
    assert len(server.output.read_text().splitlines()) == 1
    return server.process.exitcode, server.errors.read_text().splitlines()[-1]


def test_a_rank_that_is_killed_while_idle(own_server):
    assert own_server.generate(CAT).status_code == 200
    os.kill(own_server.pid(1), signal.SIGKILL)
    killed = time.monotonic()
    while (answer := own_server.client.get("/health")).status_code == 200:
        assert time.monotonic() < killed + 5
    assert answer.status_code == 503
    assert own_server.generate(CAT).status_code == 503
    status, line = ended(own_server)
    assert status == 128 + signal.SIGKILL
    assert line.startswith("xdit-hybrid: error: rank 1 has ended: Signal 9 (SIGKILL)")
    assert "Traceback" not in own_server.errors.read_text()


def test_a_rank_that_is_killed_during_a_request(own_server):
    with ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(own_server.generate, LONG) for _ in range(3)]
        own_server.until(busy=True, queue=2)
        killed = time.monotonic()
        os.kill(own_server.pid(1), signal.SIGKILL)
        assert [answer.result().status_code for answer in answers] == [503] * 3
        assert time.monotonic() < killed + 10
    status, line = ended(own_server)
    assert status == 128 + signal.SIGKILL
    assert line.startswith("xdit-hybrid: error: rank 1 has ended: Signal 9 (SIGKILL)")
    assert "Traceback" not in own_server.errors.read_text()


# Without a server.


TOLD = [b"", b"a cat", bytes(range(256)) * 5000]


def talk(idle):
    """What this rank hears, of messages for the first of which it waits longer than the default group may."""
    messages, heard = Messages(), []
    for data in TOLD:
        if messages.rank == 0:
            time.sleep(0 if heard else idle)
            messages.tell(data)
            heard.append(messages.receive(1))
        else:
            heard.append(messages.tell())
            messages.send(heard[-1][::-1])
    return heard


def test_ranks_that_wait_longer_than_the_time_out():
    ranks = Ranks(2, group_timeout=4)
    try:
        assert ranks.run(talk, 5, timeout=120) == [[data[::-1] for data in TOLD], TOLD]
    finally:
        ranks.close()


def notice(dying):
    """Which rank has ended, as one that lives learns it without torchrun."""
    messages, lost = Messages(), Future()
    messages.watch(lost.set_result)
    if messages.rank == dying:
        messages.tell() if dying else messages.receive(1)
        os.kill(os.getpid(), signal.SIGKILL)
    messages.send(b"") if dying == 0 else messages.tell()
    return lost.result(timeout=10)


@pytest.mark.parametrize("dying", [0, 1])
def test_the_end_of_a_rank_is_noticed_by_the_other(dying):
    ranks = Ranks(2)
    try:
        outcomes = ranks.outcomes(notice, dying, timeout=120)
        assert (outcomes[1 - dying].value, outcomes[1 - dying].error) == (dying, None)
        assert "exit code -9" in outcomes[dying].error
    finally:
        ranks.close()


def test_another_tolerance_for_the_runs_to_come():
    pipe = tiny.pipeline("sd3")
    with pytest.raises(ValueError, match="not applied"):
        configure(pipe, speedup=2.4)
    plans = []
    with hybrid(pipe, HybridConfig(speedup=1.2)):
        for changes in ({}, {"speedup": 1.35}, {"tolerance": 1e-9}, {}):
            configure(pipe, **changes)
            tiny.call(pipe, "sd3", num_inference_steps=14)
            plans.append(last_report(pipe)["plan"])
        with pytest.raises(ValueError, match="not both"):
            configure(pipe, speedup=2.4, tolerance=0.1)
    assert plans[0] == plans[3]
    assert plans[1].count("S") > plans[0].count("S") > plans[2].count("S") == 0
    with (
        hybrid(pipe, HybridConfig(policy="cfg")),
        pytest.raises(ValueError, match="no effect with --hybrid_policy cfg"),
    ):
        configure(pipe, tolerance=0.1)


def test_a_video_is_a_file():
    from hybridiff_xdit.xdit.serving import ranks

    levels = np.linspace(0, 1, 9)[:, None, None, None]
    for video in (
        np.broadcast_to(levels, (9, 32, 48, 3)),
        [Image.new("RGB", (48, 32), (i * 31,) * 3) for i in range(9)],
    ):
        with av.open(io.BytesIO(ranks.mp4(video, 12))) as container:
            assert container.streams.video[0].average_rate == 12
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 9 and frames[0].shape == (32, 48, 3)
        assert [abs(frame.mean() - 255 * i / 8) < 8 for i, frame in enumerate(frames)] == [True] * 9


@pytest.fixture
def launched(monkeypatch):
    """The torchrun command instead of its run."""
    commands = []
    monkeypatch.setattr(cli, "_run", lambda command, is_verbose: commands.append(command) or 0)
    return commands


def test_the_command_starts_the_processes(launched, model):
    argv = ["--model", str(model), "--parallel", "hybrid-cond", "--ulysses_degree", "2", "--hybrid_speedup", "2.5"]
    assert cli.main(["serve", *argv, "--port", "1234"]) == 0
    ((*_, module, host, port, queue), rest) = launched[0][: -len(argv)], launched[0][-len(argv) :]
    assert "--nproc_per_node=4" in launched[0] and rest == argv
    assert [module, host, port, queue] == [
        *("hybridiff_xdit.xdit.serve", "--host=127.0.0.1", "--port=1234", "--queue=16"),
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--parallel cfg", ("--parallel hybrid-cond",)),
        ("", ("--parallel hybrid-cond",)),
        ("--parallel hybrid-cond --data_parallel_degree 2", ("--data_parallel_degree 2", "Drop it")),
        ("--parallel hybrid-cond --prompt cat", ("--prompt", "Drop")),
        ("--parallel hybrid-cond --output-directory=x --profile", ("--profile and --output_directory", "Drop")),
        ("--parallel hybrid-cond --port 70000", ("--port 70000", "65535")),
        ("--parallel hybrid-cond --queue 0", ("--queue 0", "1 or more")),
        ("--parallel hybrid-cond --hybrid_tolerance 0", ("--hybrid_tolerance", "positive")),
        ("--parallel hybrid-cond --no_such_flag", ("--no_such_flag",)),
    ],
)
def test_wrong_flags_end_before_the_launch(launched, model, capfd, flags, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "--model", str(model), *flags.split()])
    message = capfd.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert all(word in message for word in words), message
    assert not launched


def test_help(launched, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "--help"])
    assert not stopped.value.code
    text = capsys.readouterr().out
    assert all(word in text for word in ("--host", "--port", "--queue", "127.0.0.1", "/generate"))


def test_what_is_not_installed_is_named(monkeypatch, capfd):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["serve", "--model", "emoji-sd3", "--parallel", "hybrid-cond"])
    assert "fastapi and uvicorn not installed: pip install hybridiff_xdit[serve]" in capfd.readouterr().err


def test_a_port_in_use_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: Address already in use. Give another one"):
            serve._listen("127.0.0.1", port)
