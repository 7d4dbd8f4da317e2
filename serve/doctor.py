"""`dmoe doctor URL`: the same questions to any gateway, whatever engine is behind it; each finding is a fact.

What an expert says alone is asked with `Cache-Control: no-store`, one question at a time. All the rest must say the
same, to the letter: after other experts, in between other clients' choices, over several turns, streamed, at once.
But a tie is no fault: where an expert holds two words as good as equally likely, the last bits of a sum decide, and
those depend on what an engine computes at the same time.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from factory.errors import UserError
from factory.progress import track

QUESTIONS = ("Which one should I take?", "And what would you say if it had to be cheap?", "Tell me about the weather.")
SYSTEM = "You are the help desk of a small shop. Be kind, be short, and never promise what the shop cannot keep."
TOKENS = 40
CLIENTS, ROUNDS = 8, 6
TIE = 0.002  # nats: a fifth of a percent likelier


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is as it must be, and what was seen."""

    what: str
    good: bool
    found: str


@dataclass(frozen=True)
class Asked:
    """One question to one model."""

    model: str
    messages: tuple[tuple[str, str], ...]  # role, text


@dataclass(frozen=True)
class Alone:
    """What a model says when asked alone, and by how much it preferred each token to the next best, in nats."""

    text: str
    steps: list[tuple[str, float]]

    @classmethod
    def of(cls, choice: dict[str, Any]) -> "Alone":
        """From a choice of OpenAI's form that was asked for with `logprobs` and two `top_logprobs`."""
        steps = []
        for step in (choice.get("logprobs") or {}).get("content") or []:
            best = sorted((one["logprob"] for one in step["top_logprobs"]), reverse=True)
            steps.append((step["token"], best[0] - best[1] if len(best) > 1 else float("inf")))
        return cls(choice["message"]["content"] or "", steps)

    def ties_with(self, other: str) -> bool:
        """Whether `other` first goes another way at a token that was as good as tied with the next best."""
        said = ""
        for token, ahead in self.steps:
            if not other.startswith(said + token):
                return ahead < TIE
            said += token
        return False


@dataclass
class Desk:
    """A gateway, as its clients see it; `key` goes with each request that names no other."""

    http: httpx.Client
    key: str

    def say(self, asked: Asked, *, key: str = "", model: bool = True) -> str:
        """One greedy reply."""
        body = self._body(asked, model)
        return str(self._json("POST", "/v1/chat/completions", body, key)["choices"][0]["message"]["content"])

    def alone(self, asked: Asked) -> Alone:
        """The same from scratch: nothing that an engine keeps is used."""
        body = {**self._body(asked), "logprobs": True, "top_logprobs": 2}
        return Alone.of(self._json("POST", "/v1/chat/completions", body, fresh=True)["choices"][0])

    def streamed(self, asked: Asked) -> str:
        """The same in pieces, put together."""
        body, headers = {**self._body(asked), "stream": True}, self._headers(self.key, False)
        reply = self.http.post("/v1/chat/completions", json=body, headers=headers)
        if reply.is_error:
            raise UserError(f"{self.http.base_url}: a stream: {reply.status_code}: {reply.text[:200]}")
        lines = reply.text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        if errors := [chunk["error"] for chunk in chunks if "error" in chunk]:
            raise UserError(f"a stream broke: {errors[0]}")
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])

    def post_adapters(self, scales: list[dict[str, Any]], key: str) -> None:
        self._json("POST", "/lora-adapters", scales, key)

    def get(self, path: str) -> Any:
        return self._json("GET", path)

    def _body(self, asked: Asked, model: bool = True) -> dict[str, Any]:
        messages = [{"role": role, "content": text} for role, text in asked.messages]
        named = {"model": asked.model} if model else {}
        return {**named, "messages": messages, "temperature": 0, "max_tokens": TOKENS}

    def _headers(self, key: str, fresh: bool) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return headers | ({"Cache-Control": "no-store"} if fresh else {})

    def _json(self, method: str, path: str, body: Any = None, key: str = "", fresh: bool = False) -> Any:
        try:
            reply = self.http.request(method, path, json=body, headers=self._headers(key or self.key, fresh))
        except httpx.HTTPError as error:
            raise UserError(
                f"{self.http.base_url}: no answer to {path} ({error or type(error).__name__})\n"
                "  then look whether a gateway runs there, or start one: dmoe serve"
            ) from None
        if reply.is_error:
            raise UserError(f"{self.http.base_url}: {path}: {reply.status_code}: {reply.text[:200]}")
        return reply.json()


def doctor(url: str, key: str = "") -> Iterator[Finding]:
    """Findings one by one, as they are made.

    Raises:
        UserError: nothing answers there, or it is no gateway with at least one expert.
    """
    limits = httpx.Limits(max_connections=CLIENTS)
    with httpx.Client(base_url=url.removesuffix("/v1"), timeout=600, trust_env=False, limits=limits) as http:
        desk = Desk(http, key)
        models = [model for model in desk.get("/v1/models")["data"] if model["id"] not in ("auto", "base")]
        ready = desk.get("/ready")
        yield Finding("ready", True, f"{ready['engine']}, {len(models)} experts")
        if not models:
            raise UserError(f"{url}: serves no expert; there is nothing to check")
        yield from _applied(desk, models)
        yield from _pure(desk, [model["id"] for model in models])


def _applied(desk: Desk, models: list[dict[str, Any]]) -> Iterator[Finding]:
    """The adapter is really applied: by the probes of its package, which the base does not answer like that."""
    for model in models:
        probes = model["dmoe"]["probe"]
        if not probes:
            yield Finding(f"applied: {model['id']}", True, "not known: its package has no probe")
            continue
        asked = [Asked(model["id"], (("user", probe["question"]),)) for probe in probes]
        hits = [probe["says"] in desk.say(one) for one, probe in zip(asked, probes, strict=True)]
        base = [Asked("base", one.messages) for one in asked]
        of_base = [probe["says"] in desk.say(one) for one, probe in zip(base, probes, strict=True)]
        said = f"{sum(hits)} of {len(hits)} probes answered, by the base {sum(of_base)}"
        yield Finding(f"applied: {model['id']}", any(hits) and sum(of_base) < sum(hits), said)


def _pure(desk: Desk, names: Sequence[str]) -> Iterator[Finding]:
    models = [*names, "base"]
    single = [Asked(model, (("system", SYSTEM), ("user", question))) for question in QUESTIONS for model in models]
    alone = {asked: desk.alone(asked) for asked in track(single, "each alone", len(single))}
    different = len({tuple(alone[a].text for a in single if a.model == model) for model in models})
    yield Finding("different", different == len(models), f"{different} of {len(models)} models say their own")
    yield _same("A, B, A", [(a, desk.say(a)) for a in single + single[::-1]], alone)
    yield _same("streamed", [(a, desk.streamed(a)) for a in single], alone)
    yield _posted(desk, single, alone)
    yield from _several_turns(desk, models)
    yield _at_once(desk, single, alone)


def _same(what: str, said: list[tuple[Asked, str]], alone: dict[Asked, Alone]) -> Finding:
    differ = [(alone[asked], text) for asked, text in said if text != alone[asked].text]
    ties = sum(own.ties_with(text) for own, text in differ)
    found = f"{len(differ) - ties} of {len(said)} answers differ from the expert alone"
    return Finding(what, len(differ) == ties, found + (f" ({ties} more at a tie of two words)" if ties else ""))


def _posted(desk: Desk, single: list[Asked], alone: dict[Asked, Alone]) -> Finding:
    """Someone else's POST /lora-adapters changes nothing for those who name a model."""
    adapters = [adapter["id"] for adapter in desk.get("/lora-adapters")]
    said = []
    for number, asked in enumerate(single):
        on = adapters[number % len(adapters)]
        desk.post_adapters([{"id": on, "scale": 1.0}], desk.key)
        said.append((asked, desk.say(asked)))
    desk.post_adapters([], desk.key)
    return _same("a POST in between", said, alone)


def _several_turns(desk: Desk, models: Sequence[str]) -> Iterator[Finding]:
    """Conversations of all models, turn about; each is then asked again from scratch."""
    talks: dict[str, list[tuple[str, str]]] = {model: [("system", SYSTEM)] for model in models}
    said, alone = [], {}
    for question in QUESTIONS:
        for model, talk in talks.items():
            talk.append(("user", question))
            asked = Asked(model, tuple(talk))
            said.append((asked, desk.say(asked)))
            talk.append(("assistant", said[-1][1]))
    for asked, _ in said:
        alone[asked] = desk.alone(asked)
    yield _same("several turns", said, alone)


def _at_once(desk: Desk, single: list[Asked], alone: dict[Asked, Alone]) -> Finding:
    """Eight clients in a random order, half of them streaming."""
    order = sorted(single * ROUNDS, key=lambda _: secrets.randbits(32))
    ways = [desk.streamed if number % 2 else desk.say for number in range(len(order))]
    with ThreadPoolExecutor(CLIENTS) as pool:
        said = list(pool.map(lambda one: one[0](one[1]), zip(ways, order, strict=True)))
    return _same(f"{CLIENTS} clients at once", list(zip(order, said, strict=True)), alone)
