"""What `dmoe teacher check` finds out: does the server answer, with which model, by the schema, and how fast."""

import asyncio
import secrets
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from factory.paths import Served
from factory.seeds import Seed
from factory.teacher import NoReply, Request
from factory.teacher.chat import ChatTeacher, read_variants
from factory.teacher.client import Answer, Client

REQUESTS = 8  # real ones, sent at once to see how fast it is; their replies are kept

Connect = Callable[[], AbstractAsyncContextManager[Client]]


@dataclass(frozen=True)
class Finding:
    """One line of the check: what was asked, what was found, whether that will do."""

    what: str
    found: str
    good: bool


async def probe(served: Served, connect: Connect, teacher: ChatTeacher, seeds: list[Seed]) -> list[Finding]:
    """Everything that can be told about the server in a few requests.

    Raises:
        UserError: it does not answer, or lets nobody in.
    """
    async with connect() as client:
        models = await client.models()
        findings = [Finding("answers", client.server.shown, True), _model(served, models)]
        findings.append(await _schema(served, client))
        findings += await _speed(client, teacher, seeds[:REQUESTS])
    return findings


def _model(served: Served, models: list[str]) -> Finding:
    if served.model in models:
        return Finding("model", served.model, True)
    listed = ", ".join(models[:5]) or "none"
    return Finding("model", f"{served.model!r} is not among its models: {listed}", False)


async def _schema(served: Served, client: Client) -> Finding:
    """Whether `response_format` binds the reply: a word that no model would say by itself must come back."""
    word = f"w{secrets.token_hex(4)}"
    schema = {
        "type": "object", "properties": {"word": {"type": "string", "enum": [word]}}, "required": ["word"],
        "additionalProperties": False,
    }  # fmt: skip
    body: dict[str, Any] = {
        "model": served.model, "messages": [{"role": "user", "content": "Tell me about the weather."}],
        "max_tokens": 64,
        "response_format": {"type": "json_schema", "json_schema": {"name": "word", "strict": True, "schema": schema}},
        **{name: value for name, value in served.sampling.items() if name != "max_tokens"},
    }  # fmt: skip
    try:
        answer = await client.ask(body, lambda answer: None)
    except NoReply as nothing:
        return Finding("schema", f"it refuses a request with a schema: {nothing}", False)
    good = word in answer.text and answer.text.lstrip().startswith("{")
    said = f"not honoured, it said {answer.text[:60]!r}; each reply is checked here all the same, more will be dropped"
    return Finding("schema", "honoured" if good else said, good)


async def _speed(client: Client, teacher: ChatTeacher, seeds: list[Seed]) -> list[Finding]:
    """Real requests, all at once: how many of their variants fit, how long they took."""
    seconds: list[float] = []

    async def one(seed: Seed) -> tuple[int, Answer] | NoReply:
        request, began = Request(seed, 0), time.monotonic()
        body = teacher.body(request)
        try:
            kept = await teacher.ask(request, teacher.key(request, body), body, client)
        except NoReply as nothing:
            return nothing
        seconds.append(time.monotonic() - began)
        variants = read_variants(kept, body["response_format"]["json_schema"]["schema"], teacher.variants)
        answer = Answer(kept.text, kept.finish_reason, kept.prompt_tokens, kept.completion_tokens)
        return sum(not variant.failure for variant in variants), answer

    began = time.monotonic()
    found = await asyncio.gather(*map(one, seeds))
    wall = time.monotonic() - began
    if lost := [str(reply) for reply in found if isinstance(reply, NoReply)]:
        return [Finding("requests", f"{len(lost)} of {len(seeds)} brought nothing: {lost[0]}", False)]
    replies = [reply for reply in found if not isinstance(reply, NoReply)]
    good, asked = sum(n for n, _ in replies), len(seeds) * teacher.variants
    tokens = sum(answer.completion_tokens for _, answer in replies)
    cut = sum(answer.finish_reason == "length" for _, answer in replies)
    note = f"; {cut} replies were cut off, raise teacher.sampling.max_tokens" if cut else ""
    return [
        Finding("variants", f"{good} of {asked} fit the template's schema{note}", good > asked // 2),
        Finding(
            "speed",
            f"{statistics.median(seconds):.2f} s a reply, {tokens / wall:,.0f} tokens/s "
            f"with {len(seeds)} in flight, {good / wall:,.1f} variants/s",
            True,
        ),
    ]
