"""`dmoe lint`: everything that can be known to be wrong before a teacher or a GPU is touched.

Reads params.yaml, every template, every seeds file and the base's tokenizer; reports all problems
of all files at once, each with its line and its cure, and runs the templates' own tests.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process

from factory.checks import Counter, Reply, faults
from factory.errors import Problem, Problems, UserError, relative, shown
from factory.paths import Home, Params, Phrases, read_params, read_profile
from factory.personal import personal
from factory.seeds import OPTIONAL, Seed, column_of, held_out, parse_seeds, read_seeds
from factory.store import read_text, read_yaml
from factory.teacher.phrases import slots_without_phrases
from factory.template import Template, parse_template, problem_at, read_template
from factory.tokens import counter

T = TypeVar("T")
YEAR, SOON = 366, 30  # days
LONGEST = 120  # words of a question
CURLY = tuple("\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb")
PLACEHOLDER = "PLACEHOLDER"  # how the questions that `dmoe new` makes up begin


def lint(home: Home, only: str | None = None, today: date | None = None) -> dict[str, int]:
    """As check, but what fails is raised.

    Raises:
        Problems: all that is wrong.
    """
    counts, found = check(home, only, today)
    if errors := [problem for problem in found if problem.severity == "error"]:
        raise Problems(errors)
    return counts


def check(home: Home, only: str | None = None, today: date | None = None) -> tuple[dict[str, int], list[Problem]]:
    """Checks everything, or one expert: counts of what was read, and all that is wrong or to be warned of."""
    found: list[Problem] = []
    params = _noted(found, read_params, home) or _guessed(home)
    if only and only not in params.experts:
        raise UserError(f"{only!r} is no expert of params.yaml; there are {', '.join(params.experts)}")
    found += _missing_files(home, params)
    count = _noted(found, _counter, home, params) if params.profile else None
    counts = {"templates": 0, "seeds": 0, "tests": 0}
    for expert in dict.fromkeys([only] if only else params.experts):
        template = None
        if home.template(expert).exists():
            template = _noted(found, read_template, home.template(expert))
        if home.seeds(expert).exists():
            text = _noted(found, read_text, home.seeds(expert))
            counts["seeds"] += _seeds(home.seeds(expert), text, template, found) if text is not None else 0
        if template:
            found += _contents(home.template(expert), template, params, count, today or date.today())
            counts["templates"] += 1
            counts["tests"] += len(template.declaration.tests)
    counts["general"] = len(_noted(found, read_seeds, home.general, None) or [])
    return counts, sorted(set(found))


def as_date(text: str | None) -> date | None:
    """A day as the command line gives it.

    Raises:
        UserError: it is no date.
    """
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise UserError(f"--today: {text!r} is no date; write it as 2026-11-02") from None


def check_texts(
    home: Home, params: Params, count: Counter, expert: str, template: str, seeds: str, today: date | None = None
) -> list[Problem]:
    """What is wrong with an expert's two files if they held `template` and `seeds`; touches neither."""
    found: list[Problem] = []
    compiled = _noted(found, parse_template, template, home.template(expert))
    if compiled:
        found += _contents(home.template(expert), compiled, params, count, today or date.today())
    _seeds(home.seeds(expert), seeds, compiled, found)
    return sorted(set(found))


def _noted(found: list[Problem], read: Callable[..., T], *given: Any) -> T | None:
    """What `read` returns, or None where it has problems, which go to `found`."""
    try:
        return read(*given)
    except Problems as error:
        found += error.problems
        return None


def _guessed(home: Home) -> Params:
    """In place of a broken params.yaml: all experts that have a template; what else it says is not judged."""
    experts = [path.stem for path in sorted(home.template("x").parent.glob("*.yaml"))]
    return Params(experts, "", Phrases(kind="phrases"))


def _counter(home: Home, params: Params) -> Counter:
    return counter(home, read_profile(home, params.profile))


def _seeds(path: Path, text: str, template: Template | None, found: list[Problem]) -> int:
    """How many seeds `text` holds; problems go to `found`.

    Without its template a seeds file is read as far as can be: its answers and slots are not judged.
    """
    try:
        seeds = parse_seeds(text, path, template)
    except Problems as error:
        found += [problem for problem in error.problems if template or problem.key.split(".")[0] not in OPTIONAL]
        return 0
    if template:
        lines = text.split("\n")
        for seed, message, severity in seed_faults(seeds, template):
            column = column_of(lines[seed.line - 1], "instruction")
            found.append(Problem(relative(path), seed.line, "instruction", message, column, severity))
    return len(seeds)


def seed_faults(seeds: list[Seed], template: Template) -> Iterator[tuple[Seed, str, str]]:
    """What a careful reader says of questions that can be read: (seed, what and cure, severity)."""
    for seed in seeds:
        words = len(seed.instruction.split())
        if seed.instruction.startswith(PLACEHOLDER):
            yield seed, "placeholder: replace me with a question as a person would ask it", "warning"
        for name in personal(seed.instruction):
            yield seed, f"holds {name}; every row of it would be dropped: write it out of the question", "error"
        if words < 2 or words > LONGEST:
            size = "one word is" if words < 2 else f"{words} words are"
            yield seed, f"{size} hardly a question as people ask it; a few words to {LONGEST} are usual", "warning"
    yield from _near_copies(seeds, template)


def _near_copies(seeds: list[Seed], template: Template) -> Iterator[tuple[Seed, str, str]]:
    """Seeds of one answer that build would take for copies of one another."""
    outside, threshold = held_out(seeds), template.declaration.dedup.instruction
    for answer in template.answers:
        group = [seed for seed in seeds if seed.answer == answer and not seed.instruction.startswith(PLACEHOLDER)]
        group.sort(key=lambda seed: seed.id not in outside)  # as build does: a training row falls to a held-out one
        texts = [" ".join(sorted(default_process(seed.instruction).split())) for seed in group]
        for i, text in enumerate(texts):
            likes = process.extract(text, texts[:i], scorer=fuzz.ratio, score_cutoff=threshold, limit=1)
            for _, score, j in likes:
                other, seed = group[j], group[i]
                across = other.id in outside and seed.id not in outside
                of = "the held-out question" if across else "the question"
                cure = "its rows would be dropped: reword or remove one"
                yield seed, f"is a near copy ({score:.0f} of 100) of {of} on line {other.line}; {cure}", "warning"


def _contents(path: Path, template: Template, params: Params, count: Counter | None, today: date) -> Iterator[Problem]:
    """What a template that can be compiled says wrong; without `count` what needs no lengths."""
    yield from _unfilled(path, template, params)
    yield from _dates(path, template, today)
    yield from _curly(path, template)
    if count:
        yield from _lengths(path, template, count)
        yield from _cases(path, template, count)


def _dates(path: Path, template: Template, today: date) -> Iterator[Problem]:
    """Answers that nobody has checked for over a year; a declaration that ends soon, or has ended."""
    file = relative(path)
    for key, answer in template.answers.items():
        if (today - date.fromisoformat(answer.checked)).days > YEAR:
            text = f'not checked since "{answer.checked}", over a year ago; verify the answer, then write today\'s date'
            yield problem_at(file, template.raw, ("answers", key, "checked"), text, "warning")
    until = template.declaration.market.declares.valid_until
    if (left := (date.fromisoformat(until) - today).days) < SOON:
        text = f'"{until}" is {f"in {left} days" if left >= 0 else "over"}; verify the answers, then write a later date'
        yield problem_at(file, template.raw, ("market", "declares", "valid_until"), text, "warning")


def _curly(path: Path, template: Template) -> Iterator[Problem]:
    """Texts that begin or end with a word processor's quotes, which became part of the text."""
    for key, text in _texts(template.raw, ()):
        if text.startswith(CURLY) or text.endswith(CURLY):
            what = f"the curly quotes of {shown(text)} are part of the text; use straight ones or none"
            yield problem_at(relative(path), template.raw, key, what, "warning")


def _texts(value: Any, key: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for part, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, (*key, part))


def _missing_files(home: Home, params: Params) -> Iterator[Problem]:
    raw = read_yaml(home.params) if params.profile else {}

    def of(i: int, text: str) -> Problem:
        return replace(problem_at(relative(home.params), raw, ("experts", i), text), key="experts")

    for i, name in enumerate(params.experts):
        for path in (home.template(name), home.seeds(name)):
            if not path.exists():
                yield of(i, f"{name!r} has no {relative(path)}; write it, or remove the name")
        for other in params.experts:
            if other != name and other.startswith(name):
                yield of(i, f"{name!r} begins {other!r}, which breaks PEFT's hot swap; rename one")
        if name in params.experts[:i]:
            yield of(i, "a name is there twice; remove one")
    for path in sorted(home.template("x").parent.glob("*.yaml")):
        if path.stem not in params.experts:
            yield Problem(
                relative(path),
                1,
                "",
                f"{path.stem!r} is not in params.yaml's experts; add it there, or remove the file",
            )
    for path in sorted(home.seeds("x").parent.glob("*.jsonl")):
        if path.stem not in params.experts and path != home.general:
            yield Problem(
                relative(path),
                1,
                "",
                f"{path.stem!r} is not in params.yaml's experts; add it there, or remove the file",
            )


def _unfilled(path: Path, template: Template, params: Params) -> Iterator[Problem]:
    """Slots that the teacher of params.yaml cannot fill."""
    if params.teacher.kind == "phrases":
        for name in slots_without_phrases(template):
            text = "has no phrases, and the embedded teacher (params.yaml: teacher) cannot write; add phrases"
            yield problem_at(relative(path), template.raw, ("output", "slots", name), text)


def _lengths(path: Path, template: Template, count: Counter) -> Iterator[Problem]:
    """Forms that can never be as long, or as short, as output.tokens wants."""
    low, high = template.output.tokens
    for i in range(len(template.output.forms)):
        for answer in template.answers:
            short, long = template.bounds(i, answer)
            if count(short) > high:
                text = (
                    f"has {count(short)} tokens at least with answer {answer}, never within {low} to {high}; shorten it"
                )
            elif long is not None and count(long) < low:
                text = (
                    f"has {count(long)} tokens at most with answer {answer}, never within {low} to {high}; lengthen it"
                )
            else:
                continue
            yield problem_at(relative(path), template.raw, ("output", "forms", i), text)
            break


def _cases(path: Path, template: Template, count: Counter) -> Iterator[Problem]:
    for i, case in enumerate(template.declaration.tests):
        answer = case.given.answer or next(iter(template.answers))
        seen = [f.reason for f in faults(Reply(case.given.instruction, answer, case.given.output), template, count)]
        ok = case.expect.reason in seen if case.expect.reason else not seen
        if not ok:
            wanted = f"a drop for {case.expect.reason}" if case.expect.reason else "to be kept"
            text = f"{case.name!r} expects {wanted}, but it is {'dropped for ' + ', '.join(seen) if seen else 'kept'}"
            yield problem_at(relative(path), template.raw, ("tests", i), text)
