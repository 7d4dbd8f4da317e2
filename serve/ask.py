"""`dmoe ask`: a few questions to a short-lived engine, the base's reply beside the expert's where that is wanted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from factory.embed import Encoder
from serve.engine import ask, started
from serve.market import Installed
from serve.router import Route, make_router, route

MOST_TOKENS = 512


@dataclass(frozen=True)
class Answer:
    """One reply: who gave it, why they were asked, what they said and at what length in tokens."""

    who: str
    reason: str
    text: str
    tokens: int


def answers(
    base: Path,
    experts: Sequence[Installed],
    questions: Sequence[tuple[str, str]],
    beside: bool,
    log: Path,
    encoder: Encoder | None = None,
) -> Iterator[tuple[str, list[Answer]]]:
    """For each (question, model) the replies, greedy; model is auto (routed), base, or an expert's name."""
    router = make_router(experts, encoder)
    with started(base, experts, slots=1, log=log) as engine:
        for question, model in questions:
            named = Route(None if model == "base" else model, "asked for by name")
            chosen = route(router, question) if model == "auto" else named
            routes = [chosen]
            if beside and chosen.expert:
                routes.insert(0, Route(None, "beside"))
            replies = []
            for one in routes:
                options = {"temperature": 0.0, "max_tokens": MOST_TOKENS}
                reply = ask(engine, [{"role": "user", "content": question}], one.expert, **options)
                text, tokens = reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]
                replies.append(Answer(one.expert or "base", one.reason, text, tokens))
            yield question, replies
