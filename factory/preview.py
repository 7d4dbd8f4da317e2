"""`dmoe preview`: what a template and its seeds would become, judged as build would, before anything is written.

Some rows come first, of a few seeds, compared with every seed's own words: they are on the screen within a second.
The rows of all seeds follow, and with them what only they can tell: totals, copies across seeds.
"""

import asyncio
import hashlib
import math
import time
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from factory.build import judge
from factory.checks import Counter
from factory.diff import one_line
from factory.errors import Problems, UserError
from factory.generate import candidates, of_seed, teacher_of
from factory.paths import Home, Params, Profile
from factory.seeds import Seed, held_out, parse_seeds
from factory.store import read_text
from factory.teacher import Reply, Request, Teacher, Variant
from factory.teacher.phrases import PhrasesTeacher, slots_without_phrases
from factory.template import Template, parse_template
from factory.tokens import counter

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]  # a candidate's columns and its verdict's
SEEDS, EXAMPLES, BINS, BAR = 6, 5, 10, 40
POLL = 0.1  # seconds between two looks at the files
STYLES = {"keep": ("kept", "green"), "drop": ("dropped", "red"), "fail": ("failed", "magenta")}


def preview(
    template: Template, seeds: list[Seed], count: Counter, teacher: Teacher | None = None, only: set[str] | None = None
) -> list[Row]:
    """The candidates of `seeds` (of the ids in `only`, if given), each with its verdict; nothing is read or written.

    `teacher` None is the embedded one. Rows are judged beside the own words of the seeds that are left out.
    """
    return asyncio.run(_preview(template, seeds, count, teacher or PhrasesTeacher(template), only))


def live(
    home: Home, template: Template, seeds: list[Seed], count: Counter, params: Params, only: set[str]
) -> list[Row]:
    """The same by the teacher of params.yaml, for the seeds in `only`; its replies are kept.

    Raises:
        UserError: the teacher is the embedded one, or its server brings nothing.
    """
    if params.teacher.kind == "phrases":
        raise UserError(
            "params.yaml: teacher: is the embedded one, which --live has nobody to ask for\n"
            "  then name a server there (kind: openai, docs/operating.md), or leave out --live"
        )

    async def asked() -> list[Row]:
        async with teacher_of(home, template, params) as teacher:
            return await _preview(template, seeds, count, teacher, only)

    return asyncio.run(asked())


async def _preview(
    template: Template, seeds: list[Seed], count: Counter, teacher: Teacher, only: set[str] | None
) -> list[Row]:
    outside = held_out(seeds)
    asked = {seed.id for seed in seeds if only is None or seed.id in only}

    async def rows(seed: Seed) -> list[Row]:
        if seed.id not in asked:
            return await _own_words(template, seed, seed.id in outside)
        if isinstance(teacher, PhrasesTeacher):
            return await _phrased(template, seed, teacher, seed.id in outside)
        done = await of_seed(template, seed, teacher, count, seed.id in outside)
        if done.lost:
            raise UserError(f"{seed.id}: no reply: {done.lost}")
        return done.rows

    found = await asyncio.gather(*map(rows, sorted(seeds, key=lambda seed: seed.id)))
    made = [row for of_one in found for row in of_one]
    verdicts = judge(made, template, count)
    return [{**c, **v} for c, v in zip(made, verdicts, strict=True) if c["seed_id"] in asked]


async def _phrased(template: Template, seed: Seed, teacher: PhrasesTeacher, outside: bool) -> list[Row]:
    """What generate would make with the embedded teacher, which is asked once, however its rows are judged."""
    wanted = math.ceil(template.declaration.generate.per_seed * teacher.spare / teacher.variants)
    replies = [await teacher.reply(Request(seed, number)) for number in range(wanted)]
    return candidates(template, seed, teacher.name, replies, outside)


async def _own_words(template: Template, seed: Seed, outside: bool) -> list[Row]:
    """The row of a seed as it stands; one without a reply where its slots cannot be filled."""
    if slots_without_phrases(template):
        reply = Reply([Variant(seed.instruction, failure="empty")], "", "", "stop")
    else:
        reply = await PhrasesTeacher(template).reply(Request(seed, 0))
    return candidates(template, seed, PhrasesTeacher.name, [reply], outside)


def some(seeds: list[Seed], number: int) -> list[Seed]:
    """`number` seeds, one of each answer in turn; the same ones for the same ids."""
    turn: Tally[str] = Tally()
    placed = []
    # another hash than held_out's: both splits are seen
    for seed in sorted(seeds, key=lambda seed: hashlib.sha256(f"preview {seed.id}".encode()).digest()):
        placed.append((turn[seed.answer], seed))
        turn[seed.answer] += 1
    return [seed for _, seed in sorted(placed, key=lambda pair: pair[0])[:number]]


def spread(rows: list[Row], number: int, voices: list[str]) -> list[Row]:
    """`number` of `rows`, spread over seeds, forms, voices and verdicts, in their order."""
    seen: Tally[tuple[str, object]] = Tally()
    left, taken = list(range(len(rows))), list[int]()
    while left and len(taken) < number:
        traits = {i: _traits(rows[i], voices) for i in left}
        best = min(left, key=lambda i: (sum(seen[trait] for trait in traits[i]), i))
        seen.update(traits[best])
        taken.append(best)
        left.remove(best)
    return [rows[i] for i in sorted(taken)]


def _traits(row: Row, voices: list[str]) -> list[tuple[str, object]]:
    what = tuple(row["reasons"][:1])
    return [("seed", row["seed_id"]), ("form", row["form"]), ("voice", voice(row, voices)), ("reasons", what)]


def voice(row: Row, voices: list[str]) -> str:
    """As whom the teacher was asked to write the row's question."""
    return voices[(row["sample"] - 1) % len(voices)] if row["sample"] else "own words"


# -- on the screen ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What is looked at: the options of the command."""

    rows: int = 12
    seed: str | None = None
    live: bool = False


Verdicts = dict[tuple[str, int], Row]  # (seed id, sample) -> row


def show(home: Home, expert: str, params: Params, profile: Profile, wanted: Wanted) -> None:
    """Prints the prompt, some rows and the totals of one expert.

    Raises:
        Problems: template or seeds cannot be read.
    """
    _show(_console(), home, expert, params, counter(home, profile), wanted, None)


def watch(home: Home, expert: str, params: Params, profile: Profile, wanted: Wanted) -> None:
    """Prints it again at every save of template or seeds, with what has changed; Ctrl-C ends it."""
    console, count = _console(), counter(home, profile)
    files = (home.template(expert), home.seeds(expert))
    before: Verdicts | None = None
    try:
        while True:
            state = [_state(path) for path in files]
            console.clear()
            try:
                before = _show(console, home, expert, params, count, wanted, before)
            except UserError as error:
                _say(console, str(error), "red")
            _say(console, f"\nwatching {files[0].name} and {files[1].name}; Ctrl-C ends it", "dim")
            while [_state(path) for path in files] == state:
                time.sleep(POLL)
    except KeyboardInterrupt:
        return


def _state(path: Any) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None where it is not there, as between two renames."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _console() -> "Console":
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=False)


def _say(console: "Console", text: str, style: str = "") -> None:
    from rich.text import Text

    console.print(Text("\n".join(one_line(line, 4000) for line in text.split("\n")), style=style))


def _show(
    console: "Console", home: Home, expert: str, params: Params, count: Counter, wanted: Wanted, before: Verdicts | None
) -> Verdicts:
    template, seeds = _read(home, expert, params, count)
    chosen = some(seeds, SEEDS)
    if wanted.seed is not None:
        chosen = [seed for seed in seeds if seed.id == wanted.seed]
        if not chosen:
            raise UserError(f"seeds/{expert}.jsonl: there is no seed {wanted.seed!r}; it begins with {seeds[0].id!r}")
    only = {seed.id for seed in chosen}
    voices = template.declaration.generate.voices
    if wanted.live:
        rows = live(home, template, seeds, count, params, only)
    else:
        rows = preview(template, seeds, count, only=only)
    _prompt(console, template, chosen[0])
    by = rows[0]["teacher"] if wanted.live else "the embedded teacher, which recombines what is there"
    _say(console, f"\n{expert}: some rows, by {by}", "bold")
    shown = spread(rows, wanted.rows, voices)
    for row in shown:
        _row(console, row, voices)
    if wanted.live:
        _totals(console, template, rows)
        return {}
    everything = {(row["seed_id"], row["sample"]): row for row in preview(template, seeds, count)}
    _corrected(console, shown, everything)
    _totals(console, template, list(everything.values()))
    if before:
        _flipped(console, before, everything)
    _lint(console, home, expert, params, count)
    return everything


def _read(home: Home, expert: str, params: Params, count: Counter) -> tuple[Template, list[Seed]]:
    """Template and seeds, or all that lint says is wrong with them."""
    try:
        template = parse_template(read_text(home.template(expert)), home.template(expert))
        return template, parse_seeds(read_text(home.seeds(expert)), home.seeds(expert), template)
    except Problems as problems:
        for path in (home.template(expert), home.seeds(expert)):
            if not path.exists():
                raise
        raise Problems(_problems(home, expert, params, count) or problems.problems) from None


def _problems(home: Home, expert: str, params: Params, count: Counter) -> list[Any]:
    from factory.lint import check_texts

    return check_texts(home, params, count, expert, read_text(home.template(expert)), read_text(home.seeds(expert)))


def _lint(console: "Console", home: Home, expert: str, params: Params, count: Counter) -> None:
    for problem in _problems(home, expert, params, count):
        _say(console, f"lint: {problem}", "red")


def _prompt(console: "Console", template: Template, seed: Seed) -> None:
    from rich.padding import Padding
    from rich.text import Text

    voices = template.declaration.generate.voices
    _say(console, f"What a teacher on a server is asked for {seed.id}", "bold")
    for message in template.prompt(seed.instruction, seed.answer, voices, seed.slots):
        _say(console, f"  {message['role']}:", "dim")
        console.print(
            Padding(Text("\n".join(one_line(line, 4000) for line in message["content"].split("\n"))), (0, 0, 0, 4))
        )


def _row(console: "Console", row: Row, voices: list[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    word, style = STYLES[row["verdict"]]
    head = Text(f"{word:<8}", style=f"bold {style}")
    head.append(f"{row['seed_id']}/{row['sample']}, {voice(row, voices)}, form {row['form'] + 1}, ", "dim")
    head.append(f"{row['tokens']} tokens" + (", held out" if row["split"] == "holdout" else ""), "dim")
    console.print(head)
    if row["reasons"]:
        console.print(Padding(Text(one_line(_why(row)), style=style), (0, 0, 0, 8)))
    console.print(Padding(Text(one_line(row["instruction"]), style="italic"), (0, 0, 0, 8)))
    console.print(Padding(Text(one_line(f"-> {row['output']}")), (0, 0, 0, 8)))


def _why(row: Row) -> str:
    return f"{', '.join(row['reasons'])}: {row['detail']}"


def _corrected(console: "Console", shown: list[Row], everything: Verdicts) -> None:
    """The rows above that another seed's rows judge otherwise."""
    for row in shown:
        now = everything[row["seed_id"], row["sample"]]
        if _state_of(now) != _state_of(row):
            word, style = STYLES[now["verdict"]]
            why = f" ({_why(now)})" if now["reasons"] else ""
            _say(console, f"among the rows of all seeds, {row['seed_id']}/{row['sample']} is {word}{why}", style)


def _state_of(row: Row) -> tuple[str, list[str]]:
    return row["verdict"], row["reasons"]


def _totals(console: "Console", template: Template, rows: list[Row]) -> None:
    verdict = Tally(row["verdict"] for row in rows)
    kept = Tally(row["seed_id"] for row in rows if row["verdict"] == "keep")
    _say(console, f"\nTokens of {len(rows):,} replies; {template.output.tokens} are wanted", "bold")
    for label, number, bar in histogram([row["tokens"] for row in rows], template.output.tokens):
        style = "red" if label[0] in "<>" else "cyan"
        _say(console, f"{label:>9}  {bar:<{BAR}}  {number}", style if number else "dim")
    failed = f", {verdict['fail']:,} failed" if verdict["fail"] else ""
    _say(
        console,
        f"\nOf {len(rows):,} candidates {verdict['keep']:,} kept, {verdict['drop']:,} dropped{failed}",
        "bold",
    )
    reasons = Tally(reason for row in rows for reason in row["reasons"])
    for reason, number in reasons.most_common():
        row = next(row for row in rows if reason in row["reasons"])
        _say(console, f"{number:>7,}  {reason:<15} {row['seed_id']}/{row['sample']}: {row['detail']}"[: console.width])
    wanted = template.declaration.generate.per_seed
    short = {seed: kept[seed] for seed in sorted({row["seed_id"] for row in rows}) if kept[seed] < wanted}
    if short:
        named = ", ".join(f"{seed} ({n})" for seed, n in list(short.items())[:10]) + (
            ", ..." if len(short) > 10 else ""
        )
        _say(console, f"{len(short)} seeds fall short of their {wanted} rows: {named}", "yellow")


def histogram(lengths: Sequence[int], bounds: list[int]) -> list[tuple[str, int, str]]:
    """(label, count, bar) of lengths between `bounds`, and of what lies under ("<") and over (">") them."""
    low, high = bounds
    width = max(1, math.ceil((high - low + 1) / BINS))
    edges = list(range(low, high + 1, width))
    counts: Tally[int | str] = Tally("<" if n < low else ">" if n > high else (n - low) // width for n in lengths)
    most = max(counts.values(), default=1)
    names: list[tuple[int | str, str]] = [("<", f"< {low}")]
    names += [(i, f"{edge}-{min(high, edge + width - 1)}" if width > 1 else f"{edge}") for i, edge in enumerate(edges)]
    names.append((">", f"> {high}"))
    return [(label, counts[key], "#" * math.ceil(BAR * counts[key] / most)) for key, label in names]


def _flipped(console: "Console", before: Verdicts, now: Verdicts) -> None:
    """What the last save has changed."""
    flips = [key for key in now if key in before and _state_of(before[key]) != _state_of(now[key])]
    other = sum(before[k]["output"] != now[k]["output"] for k in now if k in before)
    added, removed = len(now.keys() - before.keys()), len(before.keys() - now.keys())
    _say(
        console,
        f"\nSince the last save: {added} rows more, {removed} gone, {other} answered in other words, "
        f"{len(flips)} judged otherwise",
        "bold",
    )
    for key in flips[:EXAMPLES]:
        was, (word, style) = STYLES[before[key]["verdict"]][0], STYLES[now[key]["verdict"]]
        why = f" ({_why(now[key])})" if now[key]["reasons"] else ""
        _say(console, f"  {key[0]}/{key[1]}: {was} -> {word}{why}: {now[key]['instruction']}", style)
