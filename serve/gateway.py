"""The gateway: OpenAI's API over one engine. `model` is auto (routed), base, or an expert's name.

Run: dmoe serve
"""

import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route as Path_

from factory.errors import UserError, shown
from factory.llama import CONNECTIONS, REPLY_SECONDS
from serve.engine import Engine, started
from serve.market import Installed
from serve.router import Route, Router, make_router, route

# OpenAI's own fields, handed on as they are.
PASSED = {
    "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "stream",
    "stream_options", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs",
    "response_format", "tools", "tool_choice",
}  # fmt: skip
# Fields of llama.cpp that would reach past the gateway: which adapter is on, whose cache is read, which slot works.
ENGINE = {
    "lora", "id_slot", "cache_prompt", "n_cache_reuse", "n_keep", "n_discard", "n_cmpl", "n_predict", "grammar",
    "prompt", "chat_template", "chat_template_kwargs", "reasoning_format",
}  # fmt: skip
LARGEST_BODY = 1 << 20  # bytes


class Refusal(Exception):
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


def app(engine: Engine, router: Router) -> Starlette:
    """The gateway as an ASGI application; it keeps one pool of connections to the engine."""

    @asynccontextmanager
    async def lifespan(state: Starlette) -> AsyncIterator[None]:
        headers, limits = {"Authorization": f"Bearer {engine.llama.key}"}, httpx.Limits(max_connections=CONNECTIONS)
        async with httpx.AsyncClient(
            base_url=engine.llama.url, headers=headers, limits=limits, timeout=REPLY_SECONDS, trust_env=False
        ) as client:
            state.state.client = client
            yield

    async def chat(request: Request) -> Response:
        body = await _body(request)
        chosen = choose(engine, router, body)
        sent = {key: body[key] for key in PASSED & body.keys()}
        sent |= {"cache_prompt": False, **engine.llama.lora(engine.scales(chosen.expert))}
        return await _forward(request.app.state.client, sent, chosen, _headers(chosen, body))

    async def models(request: Request) -> Response:
        names = ["auto", "base", *(expert.name for expert in engine.experts)]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "dmoe"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def health(request: Request) -> Response:
        try:
            ok = (await request.app.state.client.get("/health", timeout=5.0)).is_success
        except httpx.HTTPError:
            ok = False
        return JSONResponse({"status": "ok" if ok else "the engine does not answer"}, 200 if ok else 503)

    routes = [
        Path_("/v1/chat/completions", chat, methods=["POST"]),
        Path_("/v1/models", models),
        Path_("/health", health),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={Refusal: _refused})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    told = {"message": error.message, "type": "invalid_request_error", "param": error.param, "code": error.code}
    return JSONResponse({"error": told}, error.status)


async def _body(request: Request) -> dict[str, Any]:
    """The request's JSON, checked for what the gateway itself relies on; the engine checks the rest."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST_BODY:
            raise Refusal(413, f"the body is larger than {LARGEST_BODY} bytes", "too_large")
    try:
        body = json.loads(data)
    except ValueError:
        raise Refusal(400, "the body is not JSON", "invalid_json") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object", "invalid_json")
    for field in sorted(ENGINE & body.keys()):
        raise Refusal(400, f"{field}: reaches into the engine; choose an expert by `model`", "engine_field", field)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refusal(400, "messages: must be a list of at least one message", "invalid_messages", "messages")
    return body


def choose(engine: Engine, router: Router, body: dict[str, Any]) -> Route:
    """Who answers this request.

    Raises:
        Refusal: 404, `model` is neither auto, base nor an expert.
    """
    model, names = body.get("model", "auto"), [expert.name for expert in engine.experts]
    if model == "auto":
        return route(router, question(body["messages"]))
    if model == "base":
        return Route(None, "asked for by name")
    if model in names:
        return Route(model, "asked for by name")
    known = ", ".join(["auto", "base", *names])
    raise Refusal(404, f"model: there is no {shown(model)}; known are {known}", "model_not_found", "model")


def question(messages: list[dict[str, Any]]) -> str:
    """The text of the last message of the user."""
    content = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), "")
    parts = content if isinstance(content, list) else [{"text": content}]
    return " ".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))


def _headers(chosen: Route, body: dict[str, Any]) -> dict[str, str]:
    headers = {"x-dmoe-expert": chosen.expert or "base"}
    ignored = body.keys() - PASSED - {"model", "user"}
    # The caller's own words go into a header: only what cannot break out of one.
    unknown = sorted(key for key in ignored if re.fullmatch(r"[\w.-]{1,40}", key, re.ASCII))
    return headers | ({"x-dmoe-ignored": ", ".join(unknown[:20])} if unknown else {})


async def _forward(client: httpx.AsyncClient, sent: dict[str, Any], chosen: Route, headers: dict[str, str]) -> Response:
    try:
        response = await client.send(client.build_request("POST", "/v1/chat/completions", json=sent), stream=True)
        if sent.get("stream") and response.is_success:
            return StreamingResponse(_marked(response, chosen), media_type="text/event-stream", headers=headers)
        await response.aread()
    except httpx.HTTPError as error:
        raise Refusal(502, f"the engine does not answer ({type(error).__name__})", "engine_down") from None
    reply = response.json()
    return JSONResponse(_mark(reply, chosen) if response.is_success else reply, response.status_code, headers)


def _mark(reply: dict[str, Any], chosen: Route) -> dict[str, Any]:
    return {**reply, "model": chosen.expert or "base", "dmoe": {"expert": chosen.expert, "reason": chosen.reason}}


async def _marked(response: httpx.Response, chosen: Route) -> AsyncIterator[str]:
    """The engine's events as they come, the first of them marked. Closed early, it stops the engine's work too."""
    first = True
    try:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = {**json.loads(line[6:]), "model": chosen.expert or "base"}  # llama.cpp names its file's path
                line, first = "data: " + json.dumps(_mark(chunk, chosen) if first else chunk), False
            yield line + "\n"
    except httpx.HTTPError:
        yield 'data: {"error": {"message": "the engine does not answer", "code": "engine_down"}}\n\n'
    finally:
        await response.aclose()


def serve(
    base: Path,
    experts: Sequence[Installed],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    slots: int = 4,
    context: int = 2048,
    threads: int | None = None,
    log: Path,
    ready: Callable[[str], None],
) -> None:
    """Serves until interrupted; `ready` is told the URL once requests are taken.

    Raises:
        UserError: the port is taken, or the engine did not start.
    """
    import uvicorn

    try:  # before the engine: loading takes long, and would be for nothing
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"port {port} on {host} cannot be used: {error.strerror}; choose another with --port") from None
    with listener, started(base, experts, slots=slots, context=context, threads=threads, log=log) as engine:
        config = uvicorn.Config(app(engine, make_router(experts)), log_level="warning", access_log=False)
        server = uvicorn.Server(config)
        ready(f"http://{host}:{listener.getsockname()[1]}")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
