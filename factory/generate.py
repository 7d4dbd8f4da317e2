"""Stage generate: seeds x template -> candidates. The only stage that may ask a teacher.

Reads seeds/<expert>.jsonl and the template; writes datasets/<expert>/candidates.parquet.
Run: dmoe generate <expert>

A seed is asked about until enough of its rows are acceptable or its budget is spent. What is acceptable
is judged within the seed alone, so that an edited seed asks for nothing but its own variants, and without
`output.never` and `dedup`, so that a reviewer may edit those freely: build has the last word.

With --recorded nobody is asked. A seed whose replies are all kept gets them; any other is given to the embedded
teacher. Each row says in `teacher` whose it is.
"""

import asyncio
import hashlib
import json
import math
from collections import Counter as Tally
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rapidfuzz.utils import default_process

from factory.checks import Counter, drift, faults
from factory.checks import Reply as Checked
from factory.dedup import Item, copies
from factory.errors import UserError
from factory.paths import Home, Launched, Params, Phrases, Profile, Served
from factory.progress import Meter
from factory.schema import CANDIDATES, writing
from factory.seeds import Seed, held_out, read_seeds
from factory.teacher import NoReply, Reply, Request, Teacher, Variant
from factory.teacher.cache import Cache
from factory.teacher.phrases import PhrasesTeacher, slots_without_phrases
from factory.template import Template, read_template
from factory.tokens import counter

if TYPE_CHECKING:
    from factory.teacher.chat import Connect
    from factory.teacher.client import Client
    from factory.teacher.launch import Standing

ALIKE = 90  # token-sort ratio at which two questions of one seed count as one here, whatever `dedup` says
ACTIVE = 512  # seeds that may have requests waiting or in flight
WINDOW = 2048  # seeds under way or waiting for an earlier one to be written

Row = dict[str, Any]


@dataclass
class Rule:
    """What one reason has cost: rows it hit, rows that nothing else hit, and one of them."""

    hit: int = 0
    alone: int = 0
    example: str = ""


@dataclass
class Made:
    """What a run of generate has made, for the table at its end."""

    candidates: int = 0
    wanted: int = 0  # accepted rows, over all seeds
    accepted: int = 0  # of them, what is there
    acceptable: int = 0  # candidates without a fault
    rules: dict[str, Rule] = field(default_factory=dict)
    short: dict[str, int] = field(default_factory=dict)  # seed id -> accepted rows, where fewer than wanted
    lost: dict[str, str] = field(default_factory=dict)  # seed id -> why its requests brought nothing
    teachers: Tally[str] = field(default_factory=Tally)  # whose the candidates are
    status: str = ""


@dataclass(frozen=True)
class SeedMade:
    """All rows of one seed, and what is wrong with each."""

    seed: Seed
    rows: list[Row]
    wrong: list[list[str]]
    lost: str = ""

    @property
    def acceptable(self) -> int:
        return sum(not reasons for reasons in self.wrong)


def generate(
    home: Home,
    expert: str,
    params: Params,
    profile: Profile,
    recorded: bool = False,
    standing: "Standing | None" = None,
) -> Made:
    """Asks the teacher until every seed has its rows or its budget is spent, and writes the candidates.

    `recorded`: asks no server, see above; seeds that even the embedded teacher cannot serve are `lost`. `standing`: the
    vLLM that several experts share.

    Raises:
        UserError: a request brought nothing (`recorded`: no seed has a row). All other replies are kept, and no file
            is written.
    """
    template = read_template(home.template(expert))
    seeds = sorted(read_seeds(home.seeds(expert), template), key=lambda seed: seed.id)
    try:
        return asyncio.run(_generate(home, template, seeds, params, counter(home, profile), recorded, standing))
    except BaseExceptionGroup as group:
        while isinstance(group, BaseExceptionGroup):
            group = group.exceptions[0]
        raise group from None


async def _generate(
    home: Home, template: Template, seeds: list[Seed], params: Params, count: Counter, recorded: bool,
    standing: "Standing | None",
) -> Made:  # fmt: skip
    path = home.dataset(template.expert, "candidates.parquet")
    outside = held_out(seeds)
    made = Made(wanted=len(seeds) * template.declaration.generate.per_seed)
    window: deque[asyncio.Task[SeedMade]] = deque()
    places = asyncio.Semaphore(ACTIVE)
    async with teacher_of(home, template, params, recorded, standing) as teacher:
        teachers = [teacher, *(stand_in(template) if recorded else [])]
        with Meter(template.expert, made.wanted) as meter, writing(path, CANDIDATES) as write:

            async def one(seed: Seed) -> SeedMade:
                async with places:
                    for writer in teachers:
                        done = await of_seed(template, seed, writer, count, seed.id in outside)
                        if not done.lost:
                            break
                _tell(made, done, template.declaration.generate.per_seed)
                meter.show(made.accepted, _line(made, teacher))
                return done

            def take(done: SeedMade) -> None:
                if recorded or not made.lost:
                    write(done.rows)

            async with asyncio.TaskGroup() as group:
                for seed in seeds:
                    window.append(group.create_task(one(seed)))
                    if len(window) == WINDOW:
                        take(await window.popleft())
                while window:
                    take(await window.popleft())
            if made.lost and recorded and not made.candidates:
                raise UserError(_nothing(template))
            if made.lost and not recorded:
                raise UserError(_lost(template.expert, made.lost))
        made.status = teacher.status()
    return made


@asynccontextmanager
async def teacher_of(
    home: Home, template: Template, params: Params, recorded: bool = False, standing: "Standing | None" = None
) -> AsyncIterator[Teacher]:
    """The teacher of params.yaml for one expert; `recorded`: it gives what is kept, and asks no server."""
    if isinstance(params.teacher, Phrases):
        yield PhrasesTeacher(template)
        return
    from factory.teacher.chat import ChatTeacher, remember

    with Cache(home.replies) as cache:
        remember(home.dataset(template.expert, "candidates.parquet"), cache)
        connect = None if recorded else server_of(home, params.teacher, standing)
        async with ChatTeacher(template, params.teacher, cache, connect) as teacher:
            yield teacher


def stand_in(template: Template) -> list[Teacher]:
    """The embedded teacher, where the template has phrases for every slot."""
    return [] if slots_without_phrases(template) else [PhrasesTeacher(template)]


def server_of(home: Home, served: Served, standing: "Standing | None" = None) -> "Connect":
    """How to reach the teacher's server, once it is needed: at its address, or by starting a vLLM."""
    if standing:
        return standing.connect

    def connect() -> "AbstractAsyncContextManager[Client]":
        from factory.teacher.client import address, connected

        if isinstance(served, Launched):
            from factory.teacher.launch import launched

            return launched(served, home)
        return connected(address())

    return connect


async def of_seed(template: Template, seed: Seed, teacher: Teacher, count: Counter, outside: bool) -> SeedMade:
    """Asks for one seed, round by round, until enough rows are acceptable or the budget is spent."""
    wanted = template.declaration.generate.per_seed
    first = math.ceil(wanted * teacher.spare / teacher.variants)
    replies: list[Reply] = []
    known: dict[str, list[str]] = {}
    done = SeedMade(seed, [], [])
    more = first
    while more > 0:
        numbers = range(len(replies), len(replies) + more)
        found = await asyncio.gather(*(_reply(teacher, Request(seed, n)) for n in numbers))
        if lost := [str(reply) for reply in found if isinstance(reply, NoReply)]:
            return SeedMade(seed, [], [], "; ".join(dict.fromkeys(lost)))
        replies += [reply for reply in found if isinstance(reply, Reply)]
        rows = candidates(template, seed, teacher.name, replies, outside)
        done = SeedMade(seed, rows, judge(rows, template, seed, count, known))
        missing = math.ceil(max(0, wanted - done.acceptable) / teacher.variants)
        more = min(missing, first * teacher.budget - len(replies))
    return done


async def _reply(teacher: Teacher, request: Request) -> Reply | NoReply:
    try:
        return await teacher.reply(request)
    except NoReply as nothing:
        return nothing


def candidates(template: Template, seed: Seed, teacher: str, replies: list[Reply], outside: bool) -> list[Row]:
    """The rows of one seed's replies, in order; the first row of a reply carries its text and its tokens."""
    rows: list[Row] = []
    for reply in replies:
        for place, variant in enumerate(reply.variants):
            row = _candidate(template, seed, len(rows), variant)
            first = place == 0
            rows.append(row | {
                "split": "holdout" if outside else "train", "teacher": teacher, "request": reply.key,
                "reply": reply.text if first else "",
                "finish_reason": reply.finish_reason, "prompt_tokens": reply.prompt_tokens if first else 0,
                "completion_tokens": reply.completion_tokens if first else 0,
            })  # fmt: skip
    return rows


def _candidate(template: Template, seed: Seed, sample: int, variant: Variant) -> Row:
    """One variant as a row: the code picks the form, by the row's own hash, and renders it."""
    identity = [template.expert, seed.id, variant.instruction, template.fixed(seed.answer), variant.slots, sample]
    row_id = hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
    form = int(row_id, 16) % len(template.output.forms)
    output = "" if variant.failure else template.render(form, seed.answer, variant.slots)
    return {
        "row_id": row_id, "expert": template.expert, "seed_id": seed.id, "sample": sample, "answer": seed.answer,
        "instruction": variant.instruction, "output": output,
        "slots": [{"name": k, "value": v} for k, v in sorted(variant.slots.items())], "form": form,
        "failure": variant.failure, "failure_detail": variant.detail,
    }  # fmt: skip


def judge(
    rows: list[Row], template: Template, seed: Seed, count: Counter, known: dict[str, list[str]]
) -> list[list[str]]:
    """What is wrong with each row of one seed, as far as the seed alone can tell. `known`: of earlier rounds."""
    for row in rows:
        if row["row_id"] not in known:
            known[row["row_id"]] = _wrong(row, template, seed, count)
    wrong = [known[row["row_id"]] for row in rows]
    items = [
        Item(row["row_id"], seed.answer, row["instruction"], False)
        for row, reasons in zip(rows, wrong, strict=True)
        if not reasons
    ]
    fallen = copies(items, ALIKE) if len(items) > 1 else {}
    return [
        reasons or ([fallen[row["row_id"]].reason] if row["row_id"] in fallen else [])
        for row, reasons in zip(rows, wrong, strict=True)
    ]


def _wrong(row: Row, template: Template, seed: Seed, count: Counter) -> list[str]:
    if row["failure"]:
        return [row["failure"]]
    found = faults(Checked(row["instruction"], seed.answer, row["output"]), template, count)
    if row["sample"]:
        own = {seed.answer: [default_process(seed.instruction)]}
        fault = drift(row["instruction"], seed.instruction, seed.answer, template, own)
        found += [fault] if fault else []
    return [fault.reason for fault in found if fault.reason != "hedge"]


def _tell(made: Made, done: SeedMade, wanted: int) -> None:
    if done.lost:
        made.lost[done.seed.id] = done.lost
        return
    made.candidates += len(done.rows)
    made.teachers.update(row["teacher"] for row in done.rows)
    made.acceptable += done.acceptable
    made.accepted += min(wanted, done.acceptable)
    if done.acceptable < wanted:
        made.short[done.seed.id] = done.acceptable
    for row, reasons in zip(done.rows, done.wrong, strict=True):
        for reason in reasons:
            rule = made.rules.setdefault(reason, Rule())
            rule.hit += 1
            rule.alone += len(reasons) == 1
            rule.example = rule.example or _example(row, reason)


def _example(row: Row, reason: str) -> str:
    if row["failure"]:
        return str(row["failure_detail"])
    alike = reason in ("exact_copy", "near_copy", "drift")
    return str(row["instruction"]) if alike else f"{row['instruction']} -> {row['output']}"


def _line(made: Made, teacher: Teacher) -> str:
    """What the line of progress says beside its bar."""
    rate = made.acceptable / made.candidates if made.candidates else 0.0
    worst = Tally({reason: rule.hit for reason, rule in made.rules.items()}).most_common(3)
    lost = f"{len(made.lost)} seeds without a reply" if made.lost else ""
    parts = [f"{rate:.0%} of {made.candidates:,} accepted", lost, *(f"{reason} {n}" for reason, n in worst)]
    return ", ".join(part for part in [*parts, teacher.status()] if part)


def _lost(expert: str, lost: dict[str, str]) -> str:
    causes = Tally(lost.values()).most_common()
    lines = [f"{expert}: {len(lost)} seeds got no reply, so no candidates were written; all other replies are kept"]
    for cause, n in causes[:5]:
        named = [seed for seed, why in lost.items() if why == cause]
        lines.append(f"  {n} times: {cause} ({', '.join(named[:3])}{', ...' if n > 3 else ''})")
    return "\n".join([*lines, f"  then run again, and only these are asked: dmoe generate {expert}"])


def _nothing(template: Template) -> str:
    slots = ", ".join(slots_without_phrases(template))
    return (
        f"{template.expert}: no seed has all its replies kept, and the embedded teacher cannot fill {slots} "
        f"(no phrases): no candidates were written\n  then ask the teacher: dmoe generate {template.expert}"
    )
