"""The gateway: OpenAI's API over one engine. `model` is auto (routed), base, or an expert's name.

Run: dmoe serve
"""

import asyncio
import hmac
import json
import logging
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route as Path_

from factory.errors import UserError
from factory.store import read_json
from serve.clients import Defaults, client_of, hashed
from serve.forward import LOG, Reply, down, overloaded
from serve.metrics import Metrics
from serve.requests import CHAT, TEXT, Refusal, asked, chosen_adapters, read_body
from serve.router import route
from serve.settings import Settings
from serve.supervisor import Serving, Supervisor
from serve.turns import Gone

GRACE_SECONDS = 30  # for replies that run when the server is told to end
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
PAGE = {path.name: path for path in (Path(__file__).parent / "pages").iterdir()}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Gateway:
    """Its endpoints are its methods; what they share is the supervisor, the settings, and who has chosen what."""

    def __init__(self, supervisor: Supervisor, settings: Settings, admin_token: str = "") -> None:
        self.supervisor, self.settings, self.metrics = supervisor, settings, Metrics()
        self.defaults = Defaults(settings.default_seconds)
        self.admin_hashes = [hash for hash in (settings.admin, hashed(admin_token) if admin_token else None) if hash]

    # -- who asks, and what serves --------------------------------------------------------------------

    def client(self, request: Request) -> str:
        """The client's name; refuses a wrong key, and pages of other sites that a browser has open."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self.settings.keys and host.rsplit(":", 1)[0] not in LOOPBACK:
            raise Refusal(403, f"host {host[:80]!r}: without keys this server answers on loopback alone", "wrong_host")
        if origin and origin.split("//")[-1] != host:
            raise Refusal(403, "a page of another site may not ask here", "wrong_origin")
        client = client_of(request.headers.get("authorization", ""), self.settings.keys)
        if client is None and not self.is_admin(request):
            raise Refusal(401, "the API key is wrong or missing", "invalid_api_key")
        return client or "admin"

    def is_admin(self, request: Request) -> bool:
        _, _, key = request.headers.get("authorization", "").partition(" ")
        return any(hmac.compare_digest(known, hashed(key.strip())) for known in self.admin_hashes)

    def admin(self, request: Request) -> None:
        self.client(request)
        if not self.is_admin(request):
            raise Refusal(403, "this takes the admin key", "not_admin")

    async def serving(self) -> Serving:
        try:
            return await self.supervisor.ready(self.settings.wait_seconds)
        except Gone:
            raise down(self.supervisor) from None

    # -- OpenAI's API -----------------------------------------------------------------------------------

    async def complete(self, request: Request) -> Response:
        client, serving = self.client(request), self.supervisor.serving
        if serving and serving.engine.turns.full:  # before any work: under a flood, saying no must be cheap
            raise overloaded()
        body = await read_body(request, self.settings.body_bytes)
        serving = await self.serving()
        again = partial(asked, path=request.url.path, body=body, default=self.defaults.get(client))
        fresh = "no-store" in request.headers.get("cache-control", "")
        wait, log_text = self.settings.wait_seconds, self.settings.log_text
        chosen = await asyncio.to_thread(again, serving) if serving.router.slow else again(serving)
        return Reply(chosen, again, serving, self.supervisor, self.metrics, client, wait, fresh, log_text)

    async def models(self, request: Request) -> Response:
        self.client(request)
        experts = (await self.serving()).experts.values()
        made = {"object": "model", "created": 0, "owned_by": "dmoe"}
        data: list[dict[str, Any]] = [{"id": "auto", **made}, {"id": "base", **made}]
        data += [
            {
                "id": e.name, **made, "parent": "base",
                "dmoe": {"lora_id": e.lora_id, "adapter": e.digest, "base_model": e.base_model, "scale": e.scale,
                         "routed": e.routed, "probe": [vars(p) for p in e.probes]},
            }
            for e in experts
        ]  # fmt: skip
        return JSONResponse({"object": "list", "data": data})

    async def explain(self, request: Request) -> Response:
        """Whom `auto` would choose, and why: GET /route?q=..., or POST with `messages` or `text`."""
        self.client(request)
        turns: Any = request.query_params.get("q", "")
        if request.method == "POST":
            body = await read_body(request, self.settings.body_bytes)
            messages = body.get("messages") if isinstance(body, dict) else None
            turns = body.get("text", "") if isinstance(body, dict) else ""
            if isinstance(messages, list):
                turns = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        if not isinstance(turns, str | list) or not all(isinstance(turn, str) for turn in turns) or not turns:
            raise Refusal(400, "give a question: ?q=..., or text, or messages", "invalid_messages")
        router = (await self.serving()).router
        chosen = await asyncio.to_thread(route, router, turns) if router.slow else route(router, turns)
        return JSONResponse(chosen.explain())

    # -- llama.cpp's contract, for one client -------------------------------------------------------------

    async def adapters(self, request: Request) -> Response:
        """GET shows this client's scales; POST sets them, for this client's requests that name no model."""
        client, serving = self.client(request), await self.serving()
        if request.method == "POST":
            self.defaults.set(client, chosen_adapters(serving, await read_body(request, self.settings.body_bytes)))
            return JSONResponse({"success": True})
        chosen = self.defaults.get(client) or {}
        data = [
            {"id": number, "path": f"{adapter.name}/{adapter.adapter.name}", "scale": chosen.get(adapter.digest, 0.0)}
            for number, adapter in enumerate(serving.engine.adapters)
        ]
        return JSONResponse(data)

    # -- for operators --------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """Whether this process answers; /ready says whether experts do."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        serving = self.supervisor.serving
        if serving is None or self.supervisor.suspected:
            return JSONResponse({"status": "not ready", "why": self.supervisor.trouble}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ready", "engine": serving.engine.kind, "experts": len(serving.experts)})

    async def status(self, request: Request) -> Response:
        """Load, for the page: what runs and waits, tokens said so far, each expert's last probe (null: none yet)."""
        self.client(request)
        serving, restarts = self.supervisor.serving, self.supervisor.restarts
        always = {"ready": serving is not None, "restarts": restarts, "tokens": self.metrics.said()}
        if serving is None:
            return JSONResponse({**always, "trouble": self.supervisor.trouble})
        turns, applied = serving.engine.turns, self.supervisor.applied
        experts = {e.name: {"adapter": e.digest, "applied": applied.get(e.name)} for e in serving.experts.values()}
        return JSONResponse({
            **always, "engine": serving.engine.kind, "running": turns.running.total(), "slots": turns.slots,
            "waiting": turns.length, "queue": turns.most, "experts": experts,
        })  # fmt: skip

    async def page(self, request: Request) -> Response:
        """What a browser shows at `/`. It holds nothing of its own: what it asks for needs the client's key."""
        path = PAGE.get(request.path_params.get("name", "index.html"))
        if path is None:
            raise Refusal(404, "there is no such page", "not_found")
        return FileResponse(path, headers=PAGE_HEADERS)

    async def show_metrics(self, request: Request) -> Response:
        if self.settings.keys or self.settings.admin:
            self.admin(request)
        return Response(self.metrics.text(self.supervisor), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def refused(self, request: Request, error: Exception) -> Response:
        """What is refused before anyone was chosen to answer it."""
        assert isinstance(error, Refusal)
        if request.url.path in (CHAT, TEXT):
            self.metrics.requests.labels("-", str(error.status)).inc()
        return error.response()

    async def reload(self, request: Request) -> Response:
        """Serves what is installed now: {"restart": bool}."""
        self.admin(request)
        body = await read_body(request, self.settings.body_bytes)
        try:
            done = await self.supervisor.reload(bool(isinstance(body, dict) and body.get("restart")))
        except UserError as error:
            raise Refusal(409, str(error), "not_reloaded") from None
        return JSONResponse(done)


@asynccontextmanager
async def opened(supervisor: Supervisor, settings: Settings) -> AsyncIterator[None]:
    """The engine, started, watched and probed for as long as the block lasts."""
    await supervisor.open()
    tasks = [asyncio.create_task(supervisor.watch())]
    if settings.probe_seconds:
        tasks.append(asyncio.create_task(supervisor.probe(settings.probe_seconds)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await supervisor.close()


def app(supervisor: Supervisor, settings: Settings, admin_token: str = "") -> Starlette:
    """The gateway as an ASGI application; the engine starts and ends with its lifespan, where that is on."""
    gateway = Gateway(supervisor, settings, admin_token)
    routes = [
        Path_("/", gateway.page),
        Path_("/page/{name}", gateway.page),
        Path_(CHAT, gateway.complete, methods=["POST"]),
        Path_(TEXT, gateway.complete, methods=["POST"]),
        Path_("/v1/models", gateway.models),
        Path_("/route", gateway.explain, methods=["GET", "POST"]),
        Path_("/lora-adapters", gateway.adapters, methods=["GET", "POST"]),
        Path_("/health", gateway.health),
        Path_("/ready", gateway.ready),
        Path_("/status", gateway.status),
        Path_("/metrics", gateway.show_metrics),
        Path_("/admin/reload", gateway.reload, methods=["POST"]),
    ]
    return Starlette(
        routes=routes, lifespan=lambda _: opened(supervisor, settings), exception_handlers={Refusal: gateway.refused}
    )


def listen(settings: Settings) -> socket.socket:
    """The port, taken before anything is loaded: loading takes long, and would be for nothing.

    Raises:
        UserError: it cannot be had.
    """
    host, port = settings.host, settings.port
    try:
        return socket.create_server((host, port), backlog=4096)
    except OSError as error:
        raise UserError(f"port {port} on {host} cannot be used: {error.strerror}; choose another with --port") from None


def serve(
    supervisor: Supervisor,
    settings: Settings,
    listener: socket.socket,
    note: Path,
    log: Path,
    ready: Callable[[str], None],
) -> None:
    """Serves until interrupted; `ready` is told the URL once requests are taken.

    Args:
        log: a line of JSON for each request; begun anew at 10 MB, the last five are kept.
        note: a file that tells `dmoe install` and others where this server is, and a token for it; removed at the end.

    Raises:
        UserError: the engine did not start.
    """
    import uvicorn

    token, url = secrets.token_urlsafe(24), f"http://{settings.host}:{listener.getsockname()[1]}"
    _log_requests(log)
    config = uvicorn.Config(
        app(supervisor, settings, token), log_level="critical", access_log=False, lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip

    async def run() -> None:
        async with opened(supervisor, settings):
            _leave_note(note, url, token)
            ready(url)
            await uvicorn.Server(config).serve(sockets=[listener])

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: replies are finished, the engine is ended
    try:
        with listener, suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(run())
    finally:
        if note.exists() and token in note.read_text(encoding="utf-8"):
            note.unlink()


def _log_requests(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=10_000_000, backupCount=5, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "request": %(message)s}'))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def poke(note: Path, restart: bool) -> dict[str, Any] | None:
    """Tells the server that left `note` to serve what is installed now; None where none runs.

    Raises:
        UserError: it could not; it serves as before.
    """
    import httpx

    if not note.exists():
        return None
    told = read_json(note)
    headers = {"Authorization": f"Bearer {told['token']}"}
    try:
        reply = httpx.post(f"{told['url']}/admin/reload", json={"restart": restart}, headers=headers, timeout=900,
                           trust_env=False)  # fmt: skip
    except httpx.ConnectError:
        return None  # it was killed, and left its note
    except httpx.HTTPError as error:
        raise UserError(f"the server at {told['url']} does not answer ({type(error).__name__})") from None
    if reply.is_error:
        raise UserError(f"the server goes on as before: {reply.json()['error']['message']}")
    return dict(reply.json())


def _leave_note(note: Path, url: str, token: str) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch(mode=0o600)
    note.write_text(json.dumps({"url": url, "token": token}), encoding="utf-8")
