"""The teacher on a server: vLLM or any other that speaks OpenAI's API. Every reply is kept, none is paid for twice.

One request asks for several variants of one seed, as JSON that the template's schema constrains.
What a reply holds is checked again here, variant by variant: a server may ignore the schema, and a
reply may be cut off in the middle.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic_core import from_json

from factory.paths import Served
from factory.teacher import NoReply, Reply, Request, Variant
from factory.teacher.cache import Cache, Kept, key_of
from factory.template import Template

if TYPE_CHECKING:
    from factory.teacher.client import Answer, Client

Connect = Callable[[], "AbstractAsyncContextManager[Client]"]


class ChatTeacher:
    """Asks the cache first and then the server, which is sought at the first request that needs it.

    Without `connect` only the cache is asked.
    """

    spare = 1
    budget = 4

    def __init__(self, template: Template, served: Served, cache: Cache, connect: Connect | None) -> None:
        self.template, self.served, self.cache, self.connect = template, served, cache, connect
        self.name = served.model + (f"@{served.revision}" if served.revision else "")
        self.variants = served.variants
        self.used: set[str] = set()  # keys of all replies asked for
        self.found: list[str] = []  # those of them that the cache held
        self.tokens = 0
        self._client: Client | None = None
        self._finding, self._open = asyncio.Lock(), AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cache.hit(self.found)
        await self._open.aclose()

    def status(self) -> str:
        """How many requests are in flight, how many there were, how many of them cost nothing, tokens."""
        active = self._client.limiter.active if self._client else 0
        asked = f"{len(self.used):,} requests, {len(self.found):,} answered from the cache, {self.tokens:,} tokens"
        return f"{active} in flight, {asked}" if active else asked

    async def reply(self, request: Request) -> Reply:
        """The variants of one request, from the cache or the server; see `Teacher.reply`."""
        body = self.body(request)
        key = self.key(request, body)
        self.used.add(key)
        kept = self.cache.get(key)
        if kept:
            self.found.append(key)
        else:
            kept = await self.ask(request, key, body, await self._server())
        schema = body["response_format"]["json_schema"]["schema"]
        answered = read_variants(kept, schema, self.variants)
        variants = [self._tidy(request, variant) for variant in answered]
        if request.number == 0:
            variants.insert(0, own_words(request, variants))
        return Reply(variants, key, kept.text, kept.finish_reason, kept.prompt_tokens, kept.completion_tokens)

    def body(self, request: Request) -> dict[str, Any]:
        """The request as it goes out: all that the reply depends on.

        No `seed` is sent: vLLM's CPU build dies of one. What makes a reply the same the next time is that
        it is kept.
        """
        seed, declared = request.seed, self.template.declaration.generate
        first = request.number * self.variants
        voices = [declared.voices[(first + i) % len(declared.voices)] for i in range(self.variants)]
        schema = self.template.schema(seed.answer, self.variants, seed.slots)
        body: dict[str, Any] = {
            "model": self.served.model,
            "messages": self.template.prompt(seed.instruction, seed.answer, voices, seed.slots),
            "temperature": declared.sampling.temperature,
            "top_p": declared.sampling.top_p,
            "max_tokens": longest(schema),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "variants", "strict": True, "schema": schema},
            },
            **self.served.sampling,
        }
        return {name: value for name, value in body.items() if value is not None}

    async def _server(self) -> "Client":
        async with self._finding:
            if self._client is None:
                if self.connect is None:
                    raise NoReply("there is no server")
                connect, self.connect = self.connect, None  # once: where it fails, the whole run ends
                self._client = await self._open.enter_async_context(connect())
        return self._client

    async def ask(self, request: Request, key: str, body: dict[str, Any], client: "Client") -> Kept:
        """One reply from the server, kept before anything else is sent in its place."""

        def kept(answer: "Answer") -> Kept:
            return Kept(
                key, self.template.expert, request.seed.id, self.name, answer.text, answer.finish_reason,
                answer.prompt_tokens, answer.completion_tokens,
            )  # fmt: skip

        answer = await client.ask(body, lambda answer: self.cache.put([kept(answer)]))
        self.tokens += answer.prompt_tokens + answer.completion_tokens
        return kept(answer)

    def key(self, request: Request, body: dict[str, Any]) -> str:
        """The cache's key of one request: the model's revision, the request's number, and its body."""
        return key_of([self.served.revision, request.number, body])

    def _tidy(self, request: Request, variant: Variant) -> Variant:
        if variant.failure:
            return variant
        texts = {n: self.template.tidy(n, text, request.seed.answer) for n, text in variant.slots.items()}
        return Variant(" ".join(variant.instruction.split()), texts | request.seed.slots)


def own_words(request: Request, variants: list[Variant]) -> Variant:
    """The seed as it stands, with the slots of the first good variant: a row that costs nothing."""
    good = next((variant for variant in variants if not variant.failure), None)
    if good is None:
        return replace(variants[0], instruction=request.seed.instruction)
    return replace(good, instruction=request.seed.instruction)


def remember(candidates: Path, cache: Cache) -> None:
    """Puts the replies of a candidates file into the cache: a clone that has pulled it need not ask again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [
        "request",
        "expert",
        "seed_id",
        "teacher",
        "reply",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
    ]
    if not candidates.exists():
        return
    told = ""
    try:
        with pq.ParquetFile(candidates) as file:
            if not set(columns) <= set(file.schema_arrow.names):
                return  # of an older form: it is about to be made anew
            for batch in file.iter_batches(4096, columns=columns):
                rows = []
                for row in batch.to_pylist():
                    if row["request"] != told and row["teacher"] != "phrases":
                        rows.append(Kept(*row.values()))
                    told = row["request"]
                cache.put(rows)
    except (pa.ArrowException, OSError):
        return  # damaged: it is about to be made anew


def longest(schema: dict[str, Any]) -> int:
    """`max_tokens` for a reply of `schema`: room for the longest, at two characters a token."""
    many = schema["properties"]["variants"]
    one = many["items"]["properties"]
    size = sum(len(name) + 8 + _longest(rule) for name, rule in one.items())
    return int(64 + many["maxItems"] * size / 2)


def _longest(rule: dict[str, Any]) -> int:
    return int(rule["maxLength"]) if "maxLength" in rule else max(map(len, rule["enum"]))


def read_variants(kept: Kept, schema: dict[str, Any], wanted: int) -> list[Variant]:
    """`wanted` variants of one kept reply: those that fit `schema`, and for each other one its failure.

    Of a reply that was cut off, the variants before the cut are as good as any.
    """
    cut = kept.finish_reason == "length"
    if kept.finish_reason in ("too_large", "declined"):
        return [Variant(failure=kept.finish_reason, detail="the whole reply")] * wanted
    if not kept.text.strip():
        return [Variant(failure="empty", detail="the whole reply")] * wanted
    try:
        found = from_json(kept.text, allow_partial=cut)
        items = found["variants"][:wanted]
    except (ValueError, KeyError, TypeError) as error:
        detail = "not JSON" if isinstance(error, ValueError) else "no list of variants"
        if 2 * sum(map(str.isspace, kept.text)) > len(kept.text):
            detail = "lost in white space; see docs/operating.md, The teacher"
        return [Variant(failure="truncated" if cut else "schema", detail=detail)] * wanted
    properties = schema["properties"]["variants"]["items"]["properties"]
    made = [_variant(item, properties, cut) for item in items]
    missing = Variant(failure="truncated" if cut else "schema", detail=f"{len(made)} variants of {wanted}")
    return made + [missing] * (wanted - len(made))


def _variant(item: Any, properties: dict[str, Any], cut: bool) -> Variant:
    if detail := _misfit(item, properties):
        return Variant(failure="truncated", detail="cut off") if cut else Variant(failure="schema", detail=detail)
    return Variant(item["instruction"], {name: item[name] for name in properties if name != "instruction"})


def _misfit(item: Any, properties: dict[str, Any]) -> str:
    """What of `item` the schema does not allow; "" where it fits."""
    if not isinstance(item, dict) or set(item) != set(properties):
        return f"not an object of {', '.join(properties)}"
    for name, rule in properties.items():
        text = item[name]
        if not isinstance(text, str):
            return f"{name}: no text"
        if "enum" in rule and text not in rule["enum"]:
            return f"{name}: none of the allowed texts"
        if "maxLength" in rule and not rule["minLength"] <= len(text.strip()) <= rule["maxLength"]:
            return f"{name}: {len(text)} characters"
    return ""
