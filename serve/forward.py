"""One request's way through the engine and back: it waits its turn, and its reply is marked with who answered.

The engine is read as fast as it writes, into memory, so that a client who reads slowly holds no place in it. A client
who leaves ends the engine's work.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from factory.errors import UserError
from serve.metrics import Metrics
from serve.requests import Asked, Refusal
from serve.supervisor import Serving, Supervisor
from serve.turns import Busy, Gone, Place

RETRY_SECONDS = 2  # for a client who met a dead engine or a full queue
SLOW_SECONDS = 60.0  # for a client to take one piece of its reply
LEFT = 499  # what metrics call a request whose client has left

LOG = logging.getLogger("dmoe.requests")
Events = asyncio.Queue[Response | bytes | None]  # the head, with its body if that is whole; pieces of a stream; the end


@dataclass
class Reply(Response):
    """The answer to one request; it runs when it is sent."""

    asked: Asked
    again: Callable[[Serving], Asked]  # the same for another engine
    serving: Serving
    supervisor: Supervisor
    metrics: Metrics
    client: str
    wait_seconds: float
    fresh: bool  # nothing that was kept may be used
    log_text: bool = False
    status: int = LEFT
    _began: float = field(default_factory=time.perf_counter)
    _said: list[str] = field(default_factory=list)  # kept for the log alone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events: Events = asyncio.Queue()
        reading, sending = asyncio.create_task(self._read(events)), asyncio.create_task(self._send(events, send))
        gone = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (gone, sending, reading):
                task.cancel()
            ended = await asyncio.gather(sending, reading, return_exceptions=True)
            self.metrics.requests.labels(self.asked.model, str(self.status)).inc()
            self.metrics.seconds.labels(self.asked.model).observe(time.perf_counter() - self._began)
            self._log()
        for end in ended:
            if isinstance(end, Exception) and not isinstance(end, OSError | TimeoutError):  # of a client who has left
                raise end

    def _log(self) -> None:
        """One line a request; of its text nothing, unless the settings ask for it."""
        took = round((time.perf_counter() - self._began) * 1e3, 1)
        line = {"client": self.client, "model": self.asked.model, "status": self.status, "ms": took}
        if self.log_text:
            line |= {"reason": self.asked.chosen.reason, "asked": self.asked.sent, "said": "".join(self._said)}
        LOG.info(json.dumps(line, ensure_ascii=False))

    async def _send(self, events: Events, send: Send) -> None:
        head = await events.get()
        assert isinstance(head, Response)
        status, piece = head.status_code, getattr(head, "body", b"")
        await send({"type": "http.response.start", "status": status, "headers": head.raw_headers})
        while piece is not None:
            async with asyncio.timeout(SLOW_SECONDS):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await events.get()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self.status = status

    async def _read(self, events: Events) -> None:
        try:
            await self._in_turn(events)
        except Refusal as refusal:
            events.put_nowait(refusal.response())
        events.put_nowait(None)

    async def _in_turn(self, events: Events) -> None:
        """Asks the engine when it is this request's turn.

        Raises:
            Refusal: no place in time, no engine, or more than this kind of engine can do.
        """
        engine, asked = self.serving.engine, self.asked
        owner = None if self.fresh else (asked.scales, self.client)
        waiting = asyncio.timeout(self.wait_seconds)
        try:
            async with waiting, engine.turns.turn(engine.group(asked.scales), owner, asked.messages) as place:
                waiting.reschedule(None)
                self.metrics.waited.observe(time.perf_counter() - self._began)
                await self._ask(place, events)
        except TimeoutError:
            raise Refusal(503, "waited too long for a place", "overloaded", retry_after=RETRY_SECONDS) from None
        except Busy:
            raise overloaded() from None
        except Gone:
            if not await self._moved():
                raise down(self.supervisor) from None
            await self._in_turn(events)
        except UserError as error:
            raise Refusal(400, str(error), "unsupported") from None

    async def _moved(self) -> bool:
        """Whether another engine has taken over between this request's arrival and its turn; it then goes there."""
        try:
            serving = await self.supervisor.ready(self.wait_seconds)
        except Gone:
            return False
        moved = serving is not self.serving
        if moved:
            self.serving, self.asked = serving, self.again(serving)
        return moved

    async def _ask(self, place: Place, events: Events) -> None:
        import aiohttp

        asked, engine = self.asked, self.serving.engine
        body = asked.sent | engine.fields(asked.scales, place, self.client)
        try:
            async with await engine.send(asked.path, body) as response:
                if response.ok and body.get("stream"):
                    await self._stream(response, events)
                else:
                    events.put_nowait(self._whole(await response.read(), response.status))
                place.answered = response.ok
        except (aiohttp.ClientError, TimeoutError):
            self.supervisor.suspect()
            if not body.get("stream") or not self._streaming:
                raise down(self.supervisor) from None
            events.put_nowait(_lost())

    _streaming: bool = False  # a head was sent: an error can only be told in the stream

    def _whole(self, data: bytes, status: int) -> Response:
        try:
            reply = json.loads(data)
        except ValueError:
            raise Refusal(502, "the engine's reply is not JSON", "engine_reply") from None
        if status == 200:
            self.metrics.tokens_of(self.asked.model, reply.get("timings") or {}, reply.get("usage") or {})
            self._hear(reply)
            reply = self._marked(reply)
        return JSONResponse(reply, status, self.asked.headers)

    def _hear(self, reply: dict[str, Any]) -> None:
        if self.log_text:
            for choice in reply.get("choices", []):
                said = choice.get("message") or choice.get("delta") or choice
                self._said.append(said.get("content") or said.get("text") or "")

    def _marked(self, reply: dict[str, Any]) -> dict[str, Any]:
        return {**reply, "model": self.asked.model, "dmoe": self.asked.told}

    async def _stream(self, response: Any, events: Events) -> None:
        """Passes the engine's events on: the first one marked, in all of them our name for the engine's."""
        theirs, ours = b"", b'"model":' + json.dumps(self.asked.model).encode()
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if not self._streaming:
                events.put_nowait(
                    StreamingResponse(_none(), headers=self.asked.headers, media_type="text/event-stream")
                )
                self._streaming = True
            if not theirs and line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                theirs = b'"model":' + json.dumps(chunk.get("model")).encode()
                line = b"data: " + json.dumps(self._marked(chunk), separators=(",", ":")).encode() + b"\n"
            elif theirs:
                line = line.replace(theirs, ours)  # inside a text its quotes would be escaped: it is the field
            if self.log_text and line.startswith(b"data: {"):
                self._hear(json.loads(line[6:]))
            if b'"timings"' in line or b'"usage":{' in line:
                last = json.loads(line[6:])
                self.metrics.tokens_of(self.asked.model, last.get("timings") or {}, last.get("usage") or {})
            events.put_nowait(line + b"\n")


def overloaded() -> Refusal:
    """429: the queue is full."""
    return Refusal(429, "too many requests wait already", "overloaded", retry_after=RETRY_SECONDS)


def down(supervisor: Supervisor) -> Refusal:
    """503: come again soon."""
    return Refusal(503, f"no engine answers: {supervisor.trouble}", "engine_down", retry_after=RETRY_SECONDS)


def _lost() -> bytes:
    error = {"message": "the engine ended in the middle of this reply", "type": "server_error", "code": "engine_down"}
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


async def _none() -> Any:
    """An empty stream: only its response's headers are used."""
    return
    yield


async def _left(receive: Receive) -> None:
    with suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
