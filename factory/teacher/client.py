"""Sends requests to an OpenAI-compatible server: as many at once as it bears, again where that helps, never for ever.

`openai` with its aiohttp transport carries them. A request ends in an answer, in NoReply (this one
brought nothing), or in a UserError (no request will bring anything). Neither key nor password
leaves this module: every text that a server sends is cleaned of them.
"""

import asyncio
import base64
import os
import random
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import openai
from httpx2 import AsyncByteStream

from factory.errors import UserError
from factory.teacher import NoReply
from factory.teacher.limit import Limiter

LARGEST = 1 << 20  # bytes of one HTTP reply; a variant is a few hundred
TRIES = 5  # of one request that the server breaks (500, hang, early close, no JSON)
LOST = 16  # requests that brought nothing, one after another: no other will bring anything
SILENT = 60.0  # seconds of "busy" from everybody, after which the server counts as gone
UNHEARD = 5.0  # the same while nobody has answered at all and the port is closed
SLOWEST, FASTEST = 300.0, 5.0  # bounds of the time-out, seconds
CONNECT = 10.0  # seconds for a connection, and for a list of models
SECRET = 6  # characters: a shorter key ("EMPTY", "none") is no secret, and would tear holes into replies
LEARNT, UNSURE = 20, 10.0  # replies after which the time-out follows from them; before, not under this
NOBODY = "nobody answers at that address"
BUSY = {429, 502, 503, 504, 529}
KEY_CURE = "\n  then set DMOE_TEACHER_KEY to a key that it takes"
STOP = {401: KEY_CURE, 403: KEY_CURE, 404: "\n  then check the address's path (/v1) and teacher.model in params.yaml"}


@dataclass(frozen=True)
class Answer:
    """The text of one chat completion."""

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Fault:
    """Why a request brought nothing: its kind (busy, broken, refused, stop), in words, and when to come again."""

    kind: str
    text: str
    again: float = 0.0  # seconds, from Retry-After


@dataclass(frozen=True)
class Address:
    """Where the server is and how to be let in; only `shown` may be printed."""

    url: str  # without user and password
    headers: dict[str, str]
    secrets: tuple[str, ...]
    local: bool = False  # our own: no proxy of the environment may stand between

    @property
    def shown(self) -> str:
        return urlunsplit(urlsplit(self.url)._replace(query=""))


def address(environment: dict[str, str] | None = None) -> Address:
    """The server of DMOE_TEACHER_URL, with the key of DMOE_TEACHER_KEY or the URL's user and password.

    Raises:
        UserError: there is none, or it is no http URL.
    """
    values = dict(os.environ) if environment is None else environment
    given, key = values.get("DMOE_TEACHER_URL", "").strip(), values.get("DMOE_TEACHER_KEY", "").strip()
    if not given:
        raise UserError(
            "DMOE_TEACHER_URL is not set, and params.yaml's teacher is a server\n"
            "  then run: export DMOE_TEACHER_URL=http://127.0.0.1:8000/v1 (and DMOE_TEACHER_KEY where it wants a key)"
        )
    try:
        parts = urlsplit(given)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise UserError("DMOE_TEACHER_URL: is no http URL; it looks like http://127.0.0.1:8000/v1")
    place = f"[{host}]" if ":" in host else host
    url = urlunsplit((parts.scheme, place + (f":{port}" if port else ""), parts.path, parts.query, ""))
    if any(not c.isprintable() or not c.isascii() for c in key):
        raise UserError("DMOE_TEACHER_KEY: holds a character that no header may hold")
    secrets = [key, unquote(parts.password or ""), parts.password or "", *(v for _, v in parse_qsl(parts.query))]
    if parts.username is not None and not key:
        pair = base64.b64encode(f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()).decode()
        return Address(url, {"Authorization": f"Basic {pair}"}, _hidden([*secrets, pair]))
    return Address(url, {"Authorization": f"Bearer {key or 'none'}"}, _hidden(secrets))


def _hidden(secrets: list[str]) -> tuple[str, ...]:
    return tuple(sorted({s for s in secrets if len(s) >= SECRET}, key=len, reverse=True))


class TooLarge(openai.OpenAIError):
    """An HTTP reply of more than `LARGEST` bytes; the rest of it is not read."""


class Bounded(AsyncByteStream):
    """A reply's body that ends with TooLarge instead of filling the memory."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for block in self._stream:
            size += len(block)
            if size > LARGEST:
                raise TooLarge("the reply is too large")
            yield block

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: Any) -> None:
    response.stream = Bounded(response.stream)


class Client:
    """One server, many requests at once. Make it with `connected`."""

    def __init__(self, server: Address, sender: openai.AsyncOpenAI) -> None:
        self.server, self._sender = server, sender
        self.limiter = Limiter()
        self._heard = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=100)  # of the last replies
        self._replies = self._lost = 0
        self._flights: dict[asyncio.Timeout, tuple[float, int]] = {}

    async def ask(self, body: dict[str, Any], keep: Callable[[Answer], None]) -> Answer:
        """One chat completion. `keep` is called before the request's place goes to the next one.

        Raises:
            NoReply: refused, or broken `TRIES` times.
            UserError: the server is gone, lets nobody in, or has answered nothing for too long.
        """
        broken = waits = 0
        first = 0.0
        while True:
            async with self.limiter:
                sent = time.monotonic()
                first = first or sent
                found = await self._send(body, broken)
                if isinstance(found, Answer):
                    keep(found)
                    self._answered(sent)
                    return found
            # a hang is overload only where nobody else was answered meanwhile
            if found.kind == "busy" or (found.kind == "slow" and self._heard < sent):
                self.limiter.cut(sent)
            self._despair(found, first)
            broken += found.kind in ("broken", "slow")
            if found.kind == "refused" or broken == TRIES:
                self._lost += 1
                if self._lost >= LOST:
                    text = f"{LOST} requests one after another brought nothing: {found.text}"
                    raise UserError(f"{self.server.shown}: {text}")
                raise NoReply(found.text)
            waits += 1
            pause = found.again or min(8.0, 0.25 * 2 ** min(waits - 1, 5))
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))

    async def models(self) -> list[str]:
        """The models that the server says it has.

        Raises:
            UserError: it does not answer.
        """
        try:
            async with asyncio.timeout(CONNECT):
                listed: Any = await self._sender.get("/models", cast_to=object)
            return [str(model["id"]) for model in listed["data"]]
        except (openai.OpenAIError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.server.shown}: {self._fault(error).text}") from None

    # -- one try ----------------------------------------------------------------------------------

    async def _send(self, body: dict[str, Any], broken: int) -> Answer | Fault:
        try:
            async with asyncio.timeout(self.timeout(broken)) as deadline:
                self._flights[deadline] = (asyncio.get_running_loop().time(), broken)
                try:
                    reply = await self._sender.post("/chat/completions", body=body, cast_to=object)
                finally:
                    del self._flights[deadline]
            return self._answer(reply)
        except TooLarge:
            return Answer("", "too_large")
        except (openai.OpenAIError, TimeoutError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            return self._fault(error)

    def _answer(self, reply: Any) -> Answer:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message = choice["message"]
        finish = str(choice.get("finish_reason") or "stop")
        if message.get("refusal") or finish == "content_filter":
            finish = "declined"
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        return Answer(self.clean(str(message.get("content") or "")), finish, *tokens)

    def _fault(self, error: Exception) -> Fault:
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            kind = "busy" if status in BUSY else "stop" if status in STOP else "broken" if status >= 500 else "refused"
            text = f"{status}: {self._said(error)}{STOP.get(status, '')}"
            return Fault(kind, text, _again(error.response.headers.get("retry-after")))
        root = _root(error)
        if isinstance(error, TimeoutError):
            return Fault("slow", "no reply in time")
        if isinstance(root, ConnectionRefusedError | socket.gaierror | TimeoutError):  # the last: no connection in time
            return Fault("busy", NOBODY)
        if isinstance(root, ssl.SSLError):
            return Fault("stop", f"no secure connection: {root.reason or root}")
        if isinstance(error, openai.APIConnectionError):
            return Fault("broken", "the connection was closed in the middle")
        return Fault("broken", "the reply is no chat completion")

    def _said(self, error: openai.APIStatusError) -> str:
        body: Any = error.body
        text = body.get("message") or body.get("detail") if isinstance(body, dict) else body
        return " ".join(self.clean(str(text or "without a word")).split())[:300]

    def clean(self, text: str) -> str:
        """`text` without the key, the password, and what no file can hold."""
        for secret in self.server.secrets:
            text = text.replace(secret, "***")
        return text if text.isascii() else text.encode("utf-8", "replace").decode()

    # -- patience ---------------------------------------------------------------------------------

    def _answered(self, sent: float) -> None:
        self._heard = time.monotonic()
        self._seconds.append(self._heard - sent)
        self._replies += 1
        self._lost = 0
        self.limiter.replied()

    def _despair(self, fault: Fault, since: float) -> None:
        """Ends the run where waiting is of no use; `since`: when the request first went out."""
        if fault.kind == "stop":
            raise UserError(f"{self.server.shown}: {fault.text}")
        silence = time.monotonic() - max(self._heard, since)
        patience = max(SILENT, 4 * self.timeout(0)) if self._replies else SILENT
        if not self._replies and fault.text == NOBODY:
            patience = UNHEARD
        if fault.kind in ("busy", "slow") and silence > patience:
            raise UserError(f"{self.server.shown}: no answer for {silence:.0f} s: {fault.text}")

    def timeout(self, broken: int) -> float:
        """Seconds that a request may take: four times the slowest of late, more after each failure."""
        if not self._replies:
            return SLOWEST
        least, times = (FASTEST, 4) if self._replies >= LEARNT else (UNSURE, 20)
        return min(SLOWEST, max(least, times * max(self._seconds)) * 2.0**broken)

    async def watch(self) -> None:
        """Once a second, holds requests in flight to the time-out as it has been learnt since they went out."""
        while True:
            await asyncio.sleep(1.0)
            for deadline, (began, broken) in list(self._flights.items()):
                if not deadline.expired():
                    deadline.reschedule(began + self.timeout(broken))


@asynccontextmanager
async def connected(server: Address) -> AsyncIterator[Client]:
    """A client of `server`; nothing is sent yet."""
    parts = urlsplit(server.url)
    http = openai.DefaultAioHttpClient(
        timeout=openai.Timeout(None, connect=CONNECT), event_hooks={"response": [_bound]}, trust_env=not server.local
    )
    async with openai.AsyncOpenAI(
        base_url=urlunsplit(parts._replace(query="")), default_query=dict(parse_qsl(parts.query)),
        api_key="none", default_headers=server.headers, max_retries=0, http_client=http,
    ) as sender:  # fmt: skip
        client = Client(server, sender)
        watch = asyncio.create_task(client.watch())
        try:
            yield client
        finally:
            watch.cancel()


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _again(value: str | None) -> float:
    """Seconds of a Retry-After header, a minute at most; 0 where it has none or a date."""
    try:
        return min(60.0, max(0.0, float(value or 0)))
    except ValueError:
        return 0.0
