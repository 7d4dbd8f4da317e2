"""Command `dmoe cross`: every expert asked every expert's held-out questions, and everyday ones.

It needs all experts at once, so it is no stage. Reads holdout.parquet and adapter.gguf of each, the base's GGUF and
seeds/general.jsonl; writes experts/cross.json. Run: dmoe cross
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from factory.llama import Turns, many_asked
from factory.paths import Home
from factory.progress import track
from factory.schema import ROWS, read_rows
from factory.store import need, read_json, sha256, write_json
from factory.template import Template, read_template
from train.figures import interval
from train.panel import plain, spread
from train.score import AT_ONCE, general_questions

QUESTIONS = 40  # of each kind: one a seed
MOST_TOKENS = 128  # an expert ends long before; what the base says after that is not looked at
Row = dict[str, Any]


def cross(home: Home, experts: list[str], base: Path) -> Row:
    """For each kind of question and each adapter that is on: how often the adapter's expert gave an answer of its own,
    and how often one of those of the expert that the question belongs to.

    A cell is {n, own, asked}: two rates with 95 % intervals; `asked` is None for everyday questions. The column "base"
    has no adapter on; the others are on at their recommended scale. An adapter overrides whatever it is asked, so `own`
    is high everywhere: keeping foreign questions away is the router's work. `asked` off the diagonal should be what the
    base does by itself, or less.
    """
    templates = {expert: read_template(home.template(expert)) for expert in experts}
    asked = {
        e: spread(read_rows(home.dataset(e, "holdout.parquet"), ROWS, f"dmoe build {e}"), QUESTIONS) for e in experts
    }
    kinds = {**asked, "general": general_questions(home)[:QUESTIONS]}
    adapters = [need(home.expert(expert, "adapter.gguf"), f"dmoe export {expert}") for expert in experts]
    on_scale = {
        e: read_json(need(home.expert(e, "eval.json"), f"dmoe score {e}"))["recommended_scale"] for e in experts
    }
    cases = [(kind, on, q) for kind, rows in kinds.items() for on in [*experts, "base"] for q in rows]
    log = home.work / "logs" / "cross.log"
    asked_at = many_asked(base, adapters, at_once=AT_ONCE, context=1024, log=log)
    with asked_at as servers, ThreadPoolExecutor(AT_ONCE) as pool:
        replies = pool.map(lambda case: _reply(servers, on_scale, case[1], case[2]["instruction"]), cases)
        said = list(zip(cases, track(replies, "cross", len(cases)), strict=True))
    cells: Row = {kind: {} for kind in kinds}
    for kind, of_kind in cells.items():
        for on in [*experts, "base"]:
            pairs = [(q["seed_id"], reply) for (k, o, q), reply in said if (k, o) == (kind, on)]
            of_kind[on] = _cell(pairs, templates.get(on), templates.get(kind))
    hashes = {expert: sha256(path) for expert, path in zip(experts, adapters, strict=True)}
    found = {"experts": experts, "adapters": hashes, "cells": cells}
    write_json(home.root / "experts" / "cross.json", found)
    return found


def _reply(servers: Turns, on_scale: dict[str, float], on: str, question: str) -> str:
    scales = [scale if expert == on else 0.0 for expert, scale in on_scale.items()]
    with servers.turn() as llama:
        reply = llama.chat(plain(question), scales, temperature=0.0, max_tokens=MOST_TOKENS)
    return str(reply["choices"][0]["message"]["content"])


def _cell(pairs: list[tuple[str, str]], on: Template | None, asked: Template | None) -> Row:
    def rate(template: Template | None) -> dict[str, float] | None:
        if not template:
            return None
        return interval([(seed, any(template.gives(reply, a) for a in template.answers)) for seed, reply in pairs])

    return {"n": len(pairs), "own": rate(on), "asked": rate(asked)}
