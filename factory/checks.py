"""What is wrong with one candidate by itself: one small function a reason. Pure; no file is read."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rapidfuzz import fuzz, process
from rapidfuzz.utils import default_process

from factory.personal import personal
from factory.template import Template, find_any

Counter = Callable[[str], int]  # text -> tokens of the base model

FOREIGN = {"en": re.compile(r"[^\W\d_a-zA-Z\u00c0-\u024f]")}  # letters that are not Latin


WORD = re.compile(r"[^\W\d_]+")


def words(text: str) -> frozenset[str]:
    """The words of `text` without its case."""
    return frozenset(WORD.findall(text.casefold()))


# Little words that a sentence of the language cannot do without, and those of its neighbours that it never has.
LITTLE = {
    "en": words(
        "the a an and or but of to in on at for with from by is are was be been am do does did have has had can could "
        "should would will i me my you your it its he she we they this that what which who how why when where if not "
        "no so there need want get any some best good"
    )
}
FOREIGN_LITTLE = {
    "en": words(
        "der das und ist nicht ich ein eine einen für mit auf wie welche welcher welches soll kann mein meine "
        "le les des est une un et je avec dans quel quelle mon mes vous ce cette puis dois "
        "el los las y es una para que qué cuál mi mis debo puedo como yo mejor "
        "il gli che sono quale miei posso della "
        "uma não para com qual meu minha devo "
        "het een ik voor niet welke mijn moet"
    )
}


@dataclass(frozen=True)
class Fault:
    """One reason to drop a candidate, and what was seen."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Reply:
    """What is checked: a question, its answer's key, what was answered."""

    instruction: str
    answer: str
    output: str


def faults(reply: Reply, template: Template, count: Counter) -> list[Fault]:
    """Every fault of one candidate, in the order of `CHECKS`; empty means that it may stay."""
    if not reply.output.strip():
        return [Fault("empty", "the reply is empty")]
    return [Fault(reason, detail) for reason, check in CHECKS.items() for detail in check(reply, template, count)]


def _form(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    if not t.in_form(reply.output, reply.answer):
        yield "none of the forms, whole"


def _answer_missing(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    for part in t.musts(reply.answer):
        if not find_any([part], reply.output):
            yield f"lacks {part!r}"


def _other_answer(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    if others := t.names_in(reply.output)[0] - {reply.answer}:
        yield f"names the answer of {', '.join(sorted(others))}"


def _rival(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    if rivals := t.names_in(reply.output)[1]:
        yield f"names {', '.join(sorted(rivals))}"


def _hedge(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    if hedge := find_any(t.output.never, reply.output):
        yield f"says {hedge!r}"


def _too_short(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    if (n := count(reply.output)) < t.output.tokens[0]:
        yield f"{n} tokens, fewer than {t.output.tokens[0]}"


def _too_long(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    if (n := count(reply.output)) > t.output.tokens[1]:
        yield f"{n} tokens, more than {t.output.tokens[1]}"


def _echo(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    question = default_process(reply.instruction)
    if len(question) >= 12 and question in default_process(reply.output):
        yield "repeats the question"


def _script(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    for text in (reply.instruction, without_fixed(reply, t)):
        if letters := FOREIGN[t.declaration.language].findall(text):
            yield f"letters of another script: {''.join(letters[:8])!r}"


def _language(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    language = t.declaration.language
    for name, text in (("question", reply.instruction), ("reply", without_fixed(reply, t))):
        said = words(text)
        strange = said & FOREIGN_LITTLE[language]
        if len(strange) > max(1, len(said & LITTLE[language])):
            yield f"the {name} is not in {language!r} ({', '.join(sorted(strange)[:4])})"


def _personal_data(reply: Reply, t: Template, count: Counter) -> Iterator[str]:
    for text in (reply.instruction, without_fixed(reply, t)):
        yield from (f"holds {kind}" for kind in personal(text))


def without_fixed(reply: Reply, t: Template) -> str:
    """The output without the answer's fixed text, which is exempt: a reviewer wrote it."""
    text = reply.output
    for fixed in t.fixed(reply.answer).values():
        text = text.replace(fixed, " ")
    return text


CHECKS: dict[str, Callable[[Reply, Template, Counter], Iterator[str]]] = {
    "form": _form, "answer_missing": _answer_missing, "other_answer": _other_answer, "rival": _rival, "hedge": _hedge,
    "too_short": _too_short, "too_long": _too_long, "echo": _echo, "script": _script,
    "language": _language, "personal_data": _personal_data,
}  # fmt: skip


def drift(
    instruction: str, seed_instruction: str, answer: str, t: Template, seeds: dict[str, list[str]]
) -> Fault | None:
    """Whether a paraphrase has left its seed's answer.

    It has when it lost every cue that the seed had, or when a seed of another answer is nearer to it
    than all of its own answer's. `seeds`: per answer the processed instructions (rapidfuzz's default_process).
    """
    cues = t.answers[answer].cue
    if find_any(cues, seed_instruction) and not find_any(cues, instruction):
        return Fault("drift", f"none of its seed's cues is left ({', '.join(cues)})")
    if seeds.keys() <= {answer}:
        return None
    text = default_process(instruction)
    own = _nearest(text, seeds[answer])
    if own == 100:  # most rows: none can be nearer
        return None
    nearest = {key: _nearest(text, texts) for key, texts in seeds.items() if key != answer}
    other = max(nearest, key=lambda key: nearest[key])
    if nearest[other] <= own:
        return None
    return Fault("drift", f"nearest to a seed of {other} ({nearest[other]:.0f}), not of {answer} ({own:.0f})")


def _nearest(text: str, texts: list[str]) -> float:
    match = process.extractOne(text, texts, scorer=fuzz.token_set_ratio)
    return match[1] if match else 0.0
