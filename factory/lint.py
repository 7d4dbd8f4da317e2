"""`dmoe lint`: everything that can be known to be wrong before a teacher or a GPU is touched.

Reads params.yaml, every template, every seeds file and the base's tokenizer; reports all problems
of all files at once, each with its line and its cure, and runs the templates' own tests.
"""

from collections.abc import Iterator
from pathlib import Path

from factory.checks import Counter, Reply, faults
from factory.errors import Problem, Problems, UserError, relative
from factory.paths import Home, Params, read_params, read_profile
from factory.seeds import OPTIONAL, parse_seeds, read_seeds
from factory.teacher.phrases import slots_without_phrases
from factory.template import Template, parse_template, read_template
from factory.tokens import counter


def lint(home: Home, only: str | None = None) -> dict[str, int]:
    """Checks everything, or one expert; returns counts of what was found sound.

    Raises:
        Problems: all that is wrong.
    """
    params = read_params(home)
    found = list(_missing_files(home, params))
    experts = [only] if only else params.experts
    templates = {}
    counts = {"templates": 0, "seeds": 0, "tests": 0}
    for expert in experts:
        if home.template(expert).exists():
            try:
                templates[expert] = read_template(home.template(expert))
            except Problems as error:
                found += error.problems
    counts["templates"] = len(templates)
    for expert in experts:
        if home.seeds(expert).exists():
            counts["seeds"] += _read_or_note(home.seeds(expert), templates.get(expert), found)
    counts["general"] = _read_or_note(home.general, None, found)
    try:
        count = counter(home, read_profile(home, params.profile))
    except UserError as error:  # nothing can be counted; all else is told with it
        raise UserError("\n".join([*map(str, sorted(set(found))), str(error)])) from None
    for expert, template in templates.items():
        found += _contents(home.template(expert), template, params, count)
        counts["tests"] += len(template.declaration.tests)
    if found:
        raise Problems(found)
    return counts


def check_texts(home: Home, params: Params, count: Counter, expert: str, template: str, seeds: str) -> list[Problem]:
    """What is wrong with an expert's two files if they held `template` and `seeds`; touches neither."""
    found: list[Problem] = []
    compiled = None
    try:
        compiled = parse_template(template, home.template(expert))
        found += _contents(home.template(expert), compiled, params, count)
    except Problems as error:
        found += error.problems
    try:
        parse_seeds(seeds, home.seeds(expert), compiled)
    except Problems as error:
        found += [p for p in error.problems if compiled or p.key.split(".")[0] not in OPTIONAL]
    return sorted(set(found))


def _contents(path: Path, template: Template, params: Params, count: Counter) -> Iterator[Problem]:
    """What a template that can be compiled says wrong."""
    yield from _unfilled(path, template, params)
    yield from _lengths(path, template, count)
    yield from _cases(path, template, count)


def _read_or_note(path: Path, template: Template | None, found: list[Problem]) -> int:
    """How many seeds were read; problems go to `found`.

    Without its template a seeds file is read as far as can be: its answers and slots are not judged.
    """
    try:
        return len(read_seeds(path, template))
    except Problems as error:
        known = template or path.name == "general.jsonl"
        found += [problem for problem in error.problems if known or problem.key.split(".")[0] not in OPTIONAL]
        return 0


def _missing_files(home: Home, params: Params) -> Iterator[Problem]:
    file = relative(home.params)
    for name in params.experts:
        for path in (home.template(name), home.seeds(name)):
            if not path.exists():
                yield Problem(file, 0, "experts", f"{name!r} has no {relative(path)}; write it, or remove the name")
        for other in params.experts:
            if other != name and other.startswith(name):
                yield Problem(
                    file, 0, "experts", f"{name!r} begins {other!r}, which breaks PEFT's hot swap; rename one"
                )
    if len(set(params.experts)) < len(params.experts):
        yield Problem(file, 0, "experts", "a name is there twice; remove one")
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
            yield Problem(relative(path), template.line("output", "slots", name), f"output.slots.{name}", text)


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
            yield Problem(relative(path), template.line("output", "forms", i), f"output.forms.{i}", text)
            break


def _cases(path: Path, template: Template, count: Counter) -> Iterator[Problem]:
    for i, case in enumerate(template.declaration.tests):
        answer = case.given.answer or next(iter(template.answers))
        seen = [f.reason for f in faults(Reply(case.given.instruction, answer, case.given.output), template, count)]
        ok = case.expect.reason in seen if case.expect.reason else not seen
        if not ok:
            wanted = f"a drop for {case.expect.reason}" if case.expect.reason else "to be kept"
            text = f"{case.name!r} expects {wanted}, but it is {'dropped for ' + ', '.join(seen) if seen else 'kept'}"
            yield Problem(relative(path), template.line("tests", i), f"tests.{i}", text)
