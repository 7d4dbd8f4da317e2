"""What a client may ask for, and who then answers: a body becomes an `Asked`, or a `Refusal` in OpenAI's shape."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from factory.errors import shown
from serve.clients import scales_for
from serve.engine import Scales, scales_of
from serve.market import Installed
from serve.router import Route, route
from serve.supervisor import Serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# OpenAI's own fields, handed on as they are.
SHARED = {
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "stream", "stream_options",
    "frequency_penalty", "presence_penalty", "logit_bias", "logprobs",
}  # fmt: skip
PASSED = {
    CHAT: SHARED | {"messages", "top_logprobs", "response_format", "tools", "tool_choice"},
    TEXT: SHARED | {"prompt", "echo"},
}
# Fields that would reach past the gateway: which adapter is on, whose cache is read, which slot works.
ENGINE = {
    "lora", "id_slot", "cache_prompt", "n_cache_reuse", "n_keep", "n_discard", "n_cmpl", "n_predict", "grammar",
    "chat_template", "chat_template_kwargs", "reasoning_format", "cache_salt", "lora_path", "kv_transfer_params",
}  # fmt: skip
LARGEST_SCALE = 8.0
BY_NAME = "asked for by name"


class Refusal(Exception):
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse({"error": told}, self.status, headers)


@dataclass(frozen=True)
class Asked:
    """One request, checked: which path and fields go to the engine, and who answers."""

    path: str
    sent: dict[str, Any]
    expert: Installed | None
    scales: Scales
    chosen: Route
    headers: dict[str, str]
    messages: tuple[int, ...]  # a hash of each, for the choice of a slot

    @property
    def model(self) -> str:
        return self.expert.name if self.expert else "base"

    @property
    def told(self) -> dict[str, Any]:
        """The `dmoe` object of the reply."""
        adapter = self.expert.digest if self.expert else None
        return {"expert": self.expert.name if self.expert else None, "reason": self.chosen.reason, "adapter": adapter}


async def read_body(request: Request, most: int) -> Any:
    """The request's JSON; never more than `most` bytes of it are held.

    Raises:
        Refusal: 413, or 400 for what is not JSON.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise Refusal(413, f"the body is larger than {most} bytes", "too_large")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON", "invalid_json") from None


def asked(serving: Serving, path: str, body: Any, default: Mapping[str, float] | None) -> Asked:
    """What the engine is to be asked, and who answers.

    Args:
        default: adapter digest -> scale that this client has chosen; used where the request names no model.

    Raises:
        Refusal: 400 for what the gateway relies on (the engine checks the rest), 404 for an unknown model.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object", "invalid_json")
    for name in sorted(ENGINE & body.keys()):
        raise Refusal(400, f"{name}: reaches into the engine; choose an expert by `model`", "engine_field", name)
    if body.get("n") not in (None, 1):
        raise Refusal(400, "n: one choice a request; ask again for another", "unsupported", "n")
    turns = _turns(body) if path == CHAT else [_prompt(body)]
    expert, scales, chosen = _who(serving, body.get("model"), turns, default)
    sent = {name: body[name] for name in PASSED[path] & body.keys()}
    told = body["messages"] if path == CHAT else []
    hashes = tuple(hash(json.dumps(message, sort_keys=True)) for message in told)
    return Asked(path, sent, expert, scales, chosen, _headers(expert, body, path), hashes)


def _who(
    serving: Serving, model: Any, turns: list[str], default: Mapping[str, float] | None
) -> tuple[Installed | None, Scales, Route]:
    if model is None and default is not None:
        return _by_default(serving, default)
    if model in (None, "auto"):
        chosen = route(serving.router, turns)
    elif model == "base" or (isinstance(model, str) and model in serving.experts):
        chosen = Route(None if model == "base" else model, BY_NAME)
    else:
        known = ", ".join(["auto", "base", *serving.experts])
        raise Refusal(404, f"model: there is no {shown(model)}; known are {known}", "model_not_found", "model")
    expert = serving.experts[chosen.expert] if chosen.expert else None
    return expert, scales_of(serving.engine, expert), chosen


def _by_default(serving: Serving, default: Mapping[str, float]) -> tuple[Installed | None, Scales, Route]:
    scales = scales_for(default, [adapter.digest for adapter in serving.engine.adapters])
    on = [a for a, scale in zip(serving.engine.adapters, scales, strict=True) if scale]
    expert = max(on, key=lambda adapter: abs(default[adapter.digest])) if on else None
    how = " + ".join(f"{adapter.name} x {default[adapter.digest]:g}" for adapter in on)
    return expert, scales, Route(expert.name if expert else None, f"set by POST /lora-adapters: {how or 'none'}")


def _turns(body: dict[str, Any]) -> list[str]:
    """The user's messages, oldest first."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        text = "messages: must be a list of at least one message, each with a role and a content"
        raise Refusal(400, text, "invalid_messages", "messages")
    return [_text(message.get("content")) for message in messages if message.get("role") == "user"] or [""]


def _is_message(message: Any) -> bool:
    """As far as OpenAI's kinds go: the engine would answer the rest with 500."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str | list | None)


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    return " ".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))


def _prompt(body: dict[str, Any]) -> str:
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise Refusal(400, "prompt: must be one text", "invalid_prompt", "prompt")
    return prompt


def _headers(expert: Installed | None, body: dict[str, Any], path: str) -> dict[str, str]:
    headers = {"x-dmoe-expert": expert.name if expert else "base"}
    if expert:
        headers["x-dmoe-adapter"] = expert.digest
    # The caller's own words go into a header: only what cannot break out of one.
    ignored = body.keys() - PASSED[path] - {"model", "user", "n"}
    unknown = sorted(key for key in ignored if re.fullmatch(r"[\w.-]{1,40}", key, re.ASCII))
    return headers | ({"x-dmoe-ignored": ", ".join(unknown[:20])} if unknown else {})


def chosen_adapters(serving: Serving, body: Any) -> dict[str, float]:
    """llama.cpp's body of POST /lora-adapters, [{"id": 0, "scale": 1.0}, ...], as digest -> scale; others are off.

    Raises:
        Refusal: 400, another shape, an unknown id, or a scale that is no use.
    """
    digests, chosen = [adapter.digest for adapter in serving.engine.adapters], {}
    for entry in body if isinstance(body, list) else [None]:
        if not isinstance(entry, dict) or not {"id", "scale"} <= entry.keys():
            raise Refusal(400, 'must be a list such as [{"id": 0, "scale": 1.0}]', "invalid_adapters")
        number, scale = entry["id"], entry["scale"]
        if type(number) is not int or not 0 <= number < len(digests):
            raise Refusal(400, f"id: there is no adapter {shown(number)}; see GET /lora-adapters", "invalid_id", "id")
        if type(scale) not in (int, float) or not math.isfinite(scale) or abs(scale) > LARGEST_SCALE:
            raise Refusal(400, f"scale: {shown(scale)} is no number from -{LARGEST_SCALE:g} to {LARGEST_SCALE:g}",
                          "invalid_scale", "scale")  # fmt: skip
        if scale:
            chosen[digests[number]] = float(scale)
    return chosen
