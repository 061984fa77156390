"""The HTTP side of a server: ``POST /generate``, ``GET /health`` and ``GET /metrics``, on the first rank.

The event loop has the main thread, and one other thread makes what is asked for, one request after the other. All that
the two share is changed in the event loop alone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from ...config import HybridConfig, retargeted
from .. import options, output
from .metrics import Metrics
from .ranks import Cancelled, Lost, Made, Ranks, Refused
from .request import Asked, invalid, refuse_body

#: Bytes of a request's body, at most.
_MOST_BYTES = 1 << 17
#: Seconds for which a server whose ranks have ended still says so.
_LINGER = 2.0


@dataclass(eq=False)
class _Job:
    """A request that was let in.

    Attributes:
        made: of `Made`.
        is_waiting: whether it counts as one of the queue.
        is_cancelled: whether nobody waits for it any more.
    """

    arguments: dict[str, Any]
    made: asyncio.Future[Made]
    is_waiting: bool = True
    is_cancelled: bool = False


class Service:
    """Answers HTTP, and has the ranks make what is asked for.

    Args:
        model: its name.
        ranks: are loaded.
        hybrid: how they run.
        most_waiting: requests in the queue, at most.

    Attributes:
        ended: why nothing is made any more; None as long as there is.
        is_signalled: whether a signal was the reason, or came after it.
    """

    def __init__(self, model: str, ranks: Ranks, hybrid: HybridConfig, most_waiting: int) -> None:
        self.model, self.ranks, self.hybrid, self.most_waiting = model, ranks, hybrid, most_waiting
        self.ended: str | None = None
        self.is_signalled = False
        self.metrics = Metrics()
        self._open: dict[_Job, None] = {}  # in order of arrival, the one that is being made too
        self._is_busy = False
        self._server = _Server(self)

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return sum(job.is_waiting for job in self._open)

    def run(self, maker: Executor, listener: socket.socket) -> str:
        """Serve until a rank has ended or a signal has come; which it was.

        Args:
            maker: of one thread, the one that has loaded the model.
            listener: is bound.
        """
        asyncio.run(self._serve(maker, listener))
        assert self.ended is not None
        return self.ended

    async def _serve(self, maker: Executor, listener: socket.socket) -> None:
        self._loop, self._maker = asyncio.get_running_loop(), maker
        self.ranks.messages.watch(lambda rank: self.end(f"rank {rank} has ended"))
        await self._server.serve([listener])

    def end(self, reason: str) -> None:
        """Answer all that is open with 503, and soon end the server. It may be called from anywhere."""
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._end, reason)

    def _end(self, reason: str) -> None:
        if self.ended is None:
            self.ended = reason
            for job in self._open:
                self._settle(job, HTTPException(503, reason))
            self._loop.call_later(_LINGER, self._server.leave)

    # The thread that makes.

    def _make(self, job: _Job) -> Made | HTTPException | Cancelled:
        try:
            return self.ranks.make(job.arguments, lambda: job.is_cancelled)
        except Cancelled as error:
            return error
        except Refused as error:
            return invalid(str(error))
        except Lost as error:
            self.end(str(error))
            return HTTPException(503, str(error))
        except Exception as error:
            return HTTPException(500, str(error))

    # The event loop.

    def _begin_next(self) -> None:
        job = next((job for job in self._open if job.is_waiting), None)
        if job is not None and not self._is_busy and self.ended is None:
            job.is_waiting, self._is_busy = False, True
            making = self._loop.run_in_executor(self._maker, self._make, job)
            making.add_done_callback(lambda making: self._finish(job, making.result()))

    def _finish(self, job: _Job, found: Made | Exception) -> None:
        self._is_busy = False
        if isinstance(found, Made):
            self.metrics.count(found.plan, found.seconds)
        self._settle(job, found)
        self._begin_next()

    def _settle(self, job: _Job, found: Made | Exception) -> None:
        if job.is_cancelled or job.made.done():
            return
        if isinstance(found, Made):
            job.made.set_result(found)
        else:
            job.made.set_exception(found)

    async def generate(self, asked: Asked, request: Request) -> Response:
        """Answer ``POST /generate``."""
        self._check(asked)
        if self.ended is not None:
            raise HTTPException(503, self.ended)
        if self.waiting >= self.most_waiting:
            message = f"{self.waiting} requests are waiting, which is the most (--queue): try again later"
            raise HTTPException(429, message, {"Retry-After": "1"})
        job = _Job(asked.arguments(), self._loop.create_future())
        self._open[job] = None
        self._begin_next()
        gone = asyncio.create_task(_wait_until_gone(request))
        both: list[asyncio.Future[Any]] = [job.made, gone]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            del self._open[job]
            job.is_cancelled = not job.made.done()
        if job.is_cancelled:
            return Response(status_code=499)  # nobody reads it; it is counted
        made = job.made.result()
        numbers = {"Bound": made.bound, "Error": made.error, "Seconds": made.seconds}
        facts = {"Plan": made.plan} | {name: f"{value:.4g}" for name, value in numbers.items() if value is not None}
        headers = {f"X-Hybrid-{name}": fact for name, fact in facts.items() if fact}
        return Response(made.data, media_type=made.media_type, headers=headers)

    def _check(self, asked: Asked) -> None:
        """Refuse what can be seen to be wrong without the model."""
        try:
            hybrid = retargeted(self.hybrid, asked.tolerance, asked.speedup)
            if self.ranks.messages.size > 1:
                options.refuse_low(hybrid)
        except ValueError as error:
            raise invalid(str(error)) from error
        if asked.num_frames is not None and not self.ranks.makes_videos:
            raise invalid("num_frames has no effect on a model that makes pictures: drop it.")

    async def health(self) -> Response:
        """Answer ``GET /health``."""
        facts = {"model": self.model, "ranks": self.ranks.messages.size, "busy": self._is_busy, "queue": self.waiting}
        return JSONResponse({"status": self.ended or "ready", **facts}, 503 if self.ended else 200)

    async def tell_metrics(self) -> Response:
        """Answer ``GET /metrics``."""
        return Response(self.metrics.text(self.waiting), media_type="text/plain; version=0.0.4")


def build_app(service: Service) -> FastAPI:
    """The service as an application."""
    app = FastAPI(title="xdit-hybrid", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    app.post("/generate")(service.generate)
    app.get("/health")(service.health)
    app.get("/metrics")(service.tell_metrics)
    app.exception_handler(RequestValidationError)(refuse_body)
    app.add_middleware(_Gate, metrics=service.metrics)
    return app


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Gate:
    """Bounds the size of a request, and counts how the requests for pictures end."""

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        size = 0

        async def receive_some() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > _MOST_BYTES:
                raise HTTPException(413, f"the body is longer than {_MOST_BYTES} bytes")
            return message

        async def count(message: Any) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/generate":
                self._metrics.requests[message["status"]] += 1
            await send(message)

        await self._app(scope, receive_some, count)


class _Server(uvicorn.Server):
    """Tells its address, and leaves it to the service what a signal means."""

    def __init__(self, service: Service) -> None:
        self._service = service
        config = uvicorn.Config(
            build_app(service), loop="asyncio", lifespan="off", log_level="warning", timeout_graceful_shutdown=2
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        size = self._service.ranks.messages.size
        output.say([f"xdit-hybrid: {self._service.model} on {size} rank{'s' * (size > 1)} at {url}"])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.is_signalled = True
        self._service.end("the server is ending")

    def leave(self) -> None:
        """End the server."""
        self.should_exit = True
