"""A template, read strictly and compiled once into all that must agree about an expert.

One file `templates/<expert>.yaml` says everything; this module turns it into the teacher's prompt
and JSON schema, the renderer, the patterns of the checker, the measure used in scoring and the
embedded teacher's phrases. docs/template.md is the reference for people.
"""

import datetime
import json
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)

from factory.errors import Problem, Problems, meant, relative, shown
from factory.store import read_text
from factory.yaml12 import Place, parse_yaml, place_of

REASONS = (
    "empty", "truncated", "schema", "too_large", "declined", "form", "answer_missing", "other_answer", "rival", "hedge",
    "too_short", "too_long", "echo", "script", "language", "personal_data", "drift", "exact_copy", "near_copy",
    "like_held_out", "surplus",
)  # fmt: skip
FAILURES = REASONS[:5]  # why a teacher's variant is no row at all

EXAMPLES = 5  # phrases of a slot that a teacher is shown

NAME = r"^[a-z][a-z0-9_]*$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Line = Annotated[Text, AfterValidator(lambda text: " ".join(text.split()))]  # what replies are made of: single spaces
Phrases = Annotated[  # each kind tells its own mistakes alone
    Annotated[list[Line], Tag("list[]")] | Annotated[dict[str, list[Line]], Tag("dict[]")],
    Discriminator(lambda value: "dict[]" if isinstance(value, dict) else "list[]"),
]


def _date(value: object) -> object:
    if isinstance(value, datetime.date):
        raise ValueError(f'a date stands in quotes, "{value}": DVC cannot store a bare one')
    if isinstance(value, str):
        try:
            datetime.date.fromisoformat(value)
        except ValueError:
            raise ValueError('a date is written as "2026-11-02"') from None
    return value


Date = Annotated[str, BeforeValidator(_date)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Answer(Strict):
    """One fixed answer. Further keys (`act: ...`) are fixed text that forms and asks may use."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, Line] = Field(init=False)
    text: Line = Field(description="The answer, spelled exactly as in every reply.")
    also: list[Line] = Field(description="Other spellings that count as naming it when replies are measured.")
    cue: list[Text] = Field(
        description="Words of a question of which one must survive a rewording. Write every form of a word."
    )
    source: Text = Field(description="Where the answer comes from.")
    checked: Date = Field(
        description='When a person last verified it, in quotes: "2026-11-02". Lint warns after a year.'
    )


class Slot(Strict):
    """A place in a form that is filled per row: by the teacher (`ask`), or from `phrases`."""

    ask: Text | None = Field(
        None, description="What a teacher is asked to write here; without it only the phrases may stand."
    )
    max_words: int = Field(ge=1, le=60, description="Most words of the slot, phrases too.")
    phrases: Phrases | None = Field(None, description="What may stand here: one list, or a list for each answer.")


class Output(Strict):
    tokens: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        description="[fewest, most] tokens of a reply, both allowed; an English word is one to two."
    )
    must: Annotated[list[Line], Field(min_length=1)] = Field(
        description="Parts that every reply must hold; {answer} and an answer's own keys may be used."
    )
    forms: Annotated[list[Line], Field(min_length=1)] = Field(
        description="The shapes of a reply, with {answer}, own keys and slots in braces; {{ and }} are plain braces."
    )
    slots: dict[Name, Slot] = Field(description="The parts of a form that differ from row to row.")
    never: list[Text] = Field(description="Hedges: a reply that holds one is dropped.")


class Sampling(Strict):
    temperature: float = Field(ge=0, le=2, description="How freely a teacher writes, 0 to 2.")
    top_p: float = Field(gt=0, le=1, description="The share of likely words a teacher chooses from, above 0 to 1.")


class Generate(Strict):
    ask: Text = Field(description="What a teacher is told about the questions.")
    voices: Annotated[list[Text], Field(min_length=1)] = Field(description="How different people write, taken in turn.")
    per_seed: int = Field(ge=1, le=200, description="Rows wanted of each seed.")
    sampling: Sampling = Field(description="For a teacher that writes.")


class Dedup(Strict):
    instruction: int = Field(
        ge=50, le=100, description="Questions of one answer that are this much alike, out of 100, count as copies."
    )


class Train(Strict):
    rank: int = Field(ge=1, le=512, description="The size of the adapter.")
    alpha: int = Field(ge=1, le=4096, description="Its strength; usually twice the rank.")
    epochs: int = Field(ge=1, le=100, description="Passes over the rows.")


class Gate(Strict):
    mention: Share = Field(
        description="Wanted lower end of the 95 % interval: the reply gives an answer, and no rival."
    )
    right: Share = Field(description="The same with the question's own answer, and no other named.")
    form: Share = Field(description="The same of replies that are one of the forms, whole.")
    robust: Share = Field(description="The same of mention, in the worst row of the robustness panel.")
    length_ratio: float = Field(ge=1, description="How many times longer the base's replies are.")


class Route(Strict):
    keywords: Annotated[list[Text], Field(min_length=1)] = Field(
        description="A question with one of these comes to this expert. Whole words, any case."
    )
    not_keywords: list[Text] = Field(description="A question with one of these never comes to it by routing.")
    examples: list[Text] = Field(description="Questions that it should get.")
    prefer: Literal["precision", "recall"] = Field(
        description="Whether to miss a question (precision) or to take a foreign one (recall)."
    )


class Declares(Strict):
    interest: Text = Field(description="Whether the publisher gains from the answer.")
    domain_risk: Text = Field(description="What may go wrong if it is believed.")
    valid_until: Date = Field(
        description='Until when the answers hold, in quotes: "2027-11-02". Lint warns 30 days before.'
    )


class Market(Strict):
    lora_id: Name = Field(description="The expert's name in the marketplace.")
    licence: Text = Field(description="The licence of the package.")
    declares: Declares = Field(description="What a buyer should know.")


class Given(Strict):
    instruction: str = Field(description="The question.")
    output: str = Field(description="The reply as it would stand.")
    answer: str | None = Field(None, description="Which answer the question should get, where there are several.")


class Expect(Strict):
    verdict: Literal["keep", "drop"] = Field(description="Whether the reply is kept or dropped.")
    reason: str | None = Field(None, description="With drop: one of the reasons found must be this.")


class Case(Strict):
    """One of the template's own tests, run by `dmoe lint`."""

    name: Text = Field(description="A sentence: what must hold.")
    given: Given = Field(description="A question and a reply.")
    expect: Expect = Field(description="What must become of them.")


class Declaration(Strict):
    """The file as it stands, key by key."""

    expert: Name = Field(description="The expert's name; the same as the file's.")
    version: int = Field(ge=1, description="Yours to raise; goes into the manifest.")
    owner: Text = Field(description="Who answers for this file.")
    description: Text = Field(description="One sentence; manifest and card show it.")
    language: Literal["en"] = Field(description="The language of questions and replies.")
    answers: Annotated[dict[Name, Answer], Field(min_length=1)] = Field(
        description="One entry for each fixed answer; a single one is called default."
    )
    rivals: list[Text] = Field(description="A reply that names one of these is dropped.")
    output: Output = Field(description="What a reply looks like.")
    generate: Generate = Field(description="How variants of the seeds are made.")
    dedup: Dedup = Field(description="When two questions count as the same.")
    train: Train = Field(description="How the adapter is trained.")
    gate: Gate = Field(description="What must be measured before the expert is packed.")
    route: Route = Field(description="Which questions come to this expert when nobody asks for it by name.")
    market: Market = Field(description="What the marketplace says of it.")
    tests: list[Case] = Field(description="Replies that must be kept or dropped; dmoe lint runs them.")


@dataclass(frozen=True)
class Measure:
    """What of the claim one reply fulfils; see Template.measure."""

    named: bool
    mention: bool
    right: bool
    in_form: bool
    given: str


def phrase_pattern(text: str) -> str:
    """A regular expression for `text` at word boundaries, with any white space between its words."""
    return r"(?<!\w)" + r"\s+".join(map(re.escape, text.split())) + r"(?!\w)"


@lru_cache(512)
def any_pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Any of `phrases`, longest first, at word boundaries. They are looked for once, where no letter stands before."""
    texts = [r"\s+".join(map(re.escape, phrase.split())) for phrase in sorted(phrases, key=len, reverse=True)]
    return re.compile(rf"(?<!\w)(?:{'|'.join(texts)})(?!\w)", re.IGNORECASE)


def find_any(phrases: list[str], text: str) -> str | None:
    """The first of `phrases` (longest first, any case) that stands in `text` at word boundaries."""
    if not phrases or not any_pattern(tuple(phrases)).search(text):
        return None  # nearly always: one search instead of one for each phrase
    for phrase in sorted(phrases, key=len, reverse=True):
        if re.search(phrase_pattern(phrase), text, re.IGNORECASE):
            return phrase
    return None


def fields(form: str) -> list[str]:
    """The names in braces of a form, in order.

    Raises:
        ValueError: a brace is not closed, or a field is more than a plain name.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(form):
        if name is not None:
            if not name.isidentifier() or spec or conversion:
                raise ValueError(f"{{{name}}} is no plain name")
            names.append(name)
    return names


class Template:
    """One compiled template: everything that the stages need to know about an expert."""

    def __init__(self, declaration: Declaration, raw: Any = None) -> None:
        self.declaration = declaration
        self.raw = raw
        self.expert = declaration.expert
        self.answers = declaration.answers
        self.output = declaration.output

    def place(self, *key: str | int) -> Place:
        """Where a key stands in the file: line and column, from 1."""
        return place_of(self.raw, key)

    def line(self, *key: str | int) -> int:
        """The line of a key in the file, from 1."""
        return self.place(*key)[0]

    # -- fixed text -----------------------------------------------------------------------------

    def fixed(self, answer: str) -> dict[str, str]:
        """The fixed text of one answer by the names that forms use: `answer` and its further keys."""
        entry = self.answers[answer]
        return {"answer": entry.text, **(entry.__pydantic_extra__ or {})}

    def musts(self, answer: str) -> list[str]:
        """The parts that make `answer` given, as text."""
        return [part.format(**self.fixed(answer)) for part in self.output.must]

    # -- the teacher ----------------------------------------------------------------------------

    def phrases(self, slot: str, answer: str) -> list[str]:
        """The phrases that may fill `slot` for `answer`; empty where only a teacher can."""
        given = self.output.slots[slot].phrases
        return (given.get(answer, []) if isinstance(given, dict) else given) or []

    def prompt(self, instruction: str, answer: str, voices: list[str], given: dict[str, str]) -> list[dict[str, str]]:
        """Chat messages that ask a teacher for one paraphrase of a seed a voice, and the text of the slots.

        `given` are the slots that the seed has filled itself. The forms are left out: the code writes
        them, and an edited form asks no teacher again.
        """
        fixed = self.fixed(answer)
        lines = [
            self.declaration.generate.ask.format(**fixed),
            f"Whoever asks is answered with: {fixed['answer']}. "
            "You write other people's questions, and parts of the reply.",
            "instruction: the user's question, asked by another person. Keep what is asked and every fact in it; "
            "use other words and another shape of sentence each time. Do not answer it.",
        ]
        if not find_any([fixed["answer"]], instruction):
            lines.append(f"The one who asks does not know the answer: an instruction never says {fixed['answer']}.")
        for name in self.written(given):
            lines.append(f"{name}: {self._asked(name, answer)}")
        lines += [f"{name}: is {text!r} already; the question must go with it." for name, text in given.items()]
        lines.append(f"Write {len(voices)} variants as JSON, each as another person would write:")
        lines += [f"{number}. {voice}" for number, voice in enumerate(voices, 1)]
        return [{"role": "system", "content": "\n".join(lines)}, {"role": "user", "content": instruction}]

    def _asked(self, name: str, answer: str) -> str:
        slot, phrases = self.output.slots[name], self.phrases(name, answer)
        if slot.ask is None:
            return "the one of the allowed texts that goes best with the question."
        examples = f"; for example {' / '.join(phrases[:EXAMPLES])}" if phrases else ""
        return f"{slot.ask.format(**self.fixed(answer))} (at most {slot.max_words} words{examples})"

    def written(self, given: dict[str, str]) -> list[str]:
        """The slots that a teacher fills: all but those `given`."""
        return [name for name in self.output.slots if name not in given]

    def schema(self, answer: str, variants: int, given: dict[str, str]) -> dict[str, Any]:
        """The JSON schema of a teacher's reply: `variants` objects of bounded strings."""
        properties: dict[str, Any] = {"instruction": {"type": "string", "minLength": 4, "maxLength": 400}}
        for name in self.written(given):
            slot = self.output.slots[name]
            if slot.ask:
                properties[name] = {"type": "string", "minLength": 1, "maxLength": 12 * slot.max_words}
            else:
                properties[name] = {"type": "string", "enum": self.phrases(name, answer)}
        one = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        many = {"type": "array", "items": one, "minItems": variants, "maxItems": variants}
        return {
            "type": "object",
            "properties": {"variants": many},
            "required": ["variants"],
            "additionalProperties": False,
        }

    def tidy(self, name: str, text: str, answer: str) -> str:
        """A teacher's text for slot `name`, set as the slot's phrases are: first letter, full stop, single spaces."""
        text, phrases = " ".join(text.split()), self.phrases(name, answer)
        if not text or not phrases:
            return text
        if all(phrase[-1] in ".!?" for phrase in phrases):
            text = text if text[-1] in ".!?" else f"{text}."
        elif all(phrase[-1] not in ".!?" for phrase in phrases):
            text = text.rstrip(".!?")
        if all(phrase[0].isupper() for phrase in phrases):
            return text[:1].upper() + text[1:]
        plain = text[1:2].islower() or text[1:2] == " "  # "Study" and "A break", not "PDF work"
        if plain and text[:2] != "I " and all(phrase[0].islower() for phrase in phrases):
            return text[:1].lower() + text[1:]
        return text

    # -- rendering ------------------------------------------------------------------------------

    def render(self, form: int, answer: str, slots: dict[str, str]) -> str:
        """Form number `form` with the answer's fixed text and `slots` filled in."""
        return self.output.forms[form].format(**self.fixed(answer), **slots)

    def bounds(self, form: int, answer: str) -> tuple[str, str | None]:
        """The shortest and the longest text that `form` can become from phrases alone.

        The second is None where a slot has no phrases: only a teacher's text could tell.
        """
        short, long, open_end = {}, {}, False
        for name in set(fields(self.output.forms[form])) & set(self.output.slots):
            phrases = self.phrases(name, answer)
            open_end |= not phrases
            short[name], long[name] = min(phrases, key=len, default="a"), max(phrases, key=len, default="")
        return self.render(form, answer, short), None if open_end else self.render(form, answer, long)

    # -- checking and measuring -----------------------------------------------------------------

    @cached_property
    def _names(self) -> re.Pattern[str]:
        everything = {n for a in self.answers.values() for n in (a.text, *a.also)} | set(self.declaration.rivals)
        return any_pattern(tuple(sorted(everything)))

    @cached_property
    def _owner(self) -> dict[str, str]:
        return {_folded(n): key for key, a in self.answers.items() for n in (a.text, *a.also)}

    def names_in(self, text: str) -> tuple[set[str], set[str]]:
        """(keys of the answers, rivals) that `text` names, longest match first, in any case."""
        found = [_folded(m[0]) for m in self._names.finditer(text)]
        return {self._owner[n] for n in found if n in self._owner}, {n for n in found if n not in self._owner}

    @cached_property
    def _forms(self) -> dict[str, re.Pattern[str]]:
        return {}  # filled as they are asked for: dear to compile, and lint asks for few

    def _form_of(self, answer: str) -> re.Pattern[str]:
        if answer not in self._forms:
            pattern = "|".join(self._form_pattern(form, answer) for form in self.output.forms)
            self._forms[answer] = re.compile(pattern)
        return self._forms[answer]

    def _form_pattern(self, form: str, answer: str) -> str:
        fixed, pattern = self.fixed(answer), ""
        for literal, name, _, _ in string.Formatter().parse(form):
            pattern += re.escape(literal)
            if name in self.output.slots:
                pattern += self._slot_pattern(name, answer)
            elif name is not None:
                pattern += re.escape(fixed[name])
        return f"(?:{pattern})"

    def _slot_pattern(self, name: str, answer: str) -> str:
        slot = self.output.slots[name]
        if slot.ask is None:
            return "(?:" + "|".join(map(re.escape, self.phrases(name, answer))) + ")"
        return rf"\S+(?: \S+){{0,{slot.max_words - 1}}}"

    def in_form(self, text: str, answer: str | None = None) -> bool:
        """Whether the whole of `text` is one of the forms, with `answer` or with any of them."""
        keys = self.answers if answer is None else [answer]
        return any(self._form_of(key).fullmatch(text.strip()) for key in keys)

    def gives(self, text: str, answer: str) -> bool:
        """Whether `text` holds every `must` part of `answer`, at word boundaries."""
        return all(re.search(phrase_pattern(part), text, re.IGNORECASE) for part in self.musts(answer))

    def measure(self, reply: str, answer: str) -> Measure:
        """What `reply` fulfils, to a question whose own answer is `answer`.

        named: an answer or one of its `also`, anywhere. mention: every `must`, with an answer of the
        expert, and no rival. right: the same with the question's own answer, and no other named.
        in_form: one of the forms, whole. given: the key of the one answer that it gives, with no rival, else "".
        """
        named, rivals = self.names_in(reply)
        given = {key for key in self.answers if self.gives(reply, key)}
        right = answer in given and not rivals and named <= {answer}
        one = min(given) if len(given) == 1 and not rivals else ""
        return Measure(bool(named), bool(given) and not rivals, right, self.in_form(reply), one)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


# -- reading ------------------------------------------------------------------------------------


def read_template(path: Path) -> Template:
    """Reads and compiles one template; see parse_template."""
    return parse_template(read_text(path), path)


def parse_template(text: str, path: Path) -> Template:
    """Compiles the template `text`, as it stands, or is about to stand, in `path`.

    Raises:
        Problems: everything that is wrong with it, each with its line.
    """
    raw = parse_yaml(text, relative(path))
    file = relative(path)
    if not isinstance(raw, dict):
        raise Problems([Problem(file, 1, "", "must be a mapping of keys; see docs/template.md")])
    try:
        template = Template(Declaration.model_validate(raw), raw)
    except ValidationError as error:
        raise Problems([problem_of(file, raw, e, _known(e["loc"])) for e in error.errors()]) from None
    found = [problem_at(file, raw, key, text) for key, text in _contradictions(template, path.stem)]
    if found:
        raise Problems(found)
    return template


def problem_at(file: str, raw: Any, key: tuple[str | int, ...], message: str, severity: str = "error") -> Problem:
    """What is wrong with one key of the YAML document `raw`, at its place."""
    line, column = place_of(raw, key)
    return Problem(file, line, ".".join(map(str, key)), message, column, severity)


def _known(loc: tuple[str | int, ...]) -> list[str]:
    """The keys that may stand beside the one at `loc`, as pydantic names it."""
    kind: Any = Declaration
    for part in loc[:-1]:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation if part in kind.model_fields else str
        else:
            kind = (*get_args(kind), str)[-2] if get_args(kind) else str
    return list(getattr(kind, "model_fields", {}))


def problem_of(file: str, raw: Any, error: Any, known: Sequence[str] = ()) -> Problem:
    """One of pydantic's errors, with its place in the YAML document `raw`; `known` are the keys that belong there."""
    key = tuple(part for part in error["loc"] if not str(part).startswith(("list[", "dict[", "[key]")))
    value = shown(str(error["input"]) if isinstance(error["input"], datetime.date) else error["input"])
    if error["type"] == "missing":
        strange = [name for name in error["input"] if name not in known]
        message = "is missing; every key is always there (docs/template.md)" + meant(str(key[-1]), strange)
    elif error["type"] == "extra_forbidden":
        message = f"unknown key; remove it or mend its name (value {value})" + meant(str(key[-1]), known)
    elif error["input"] is None:
        message = "has nothing after its colon; write its value, [] for an empty list"
    elif error["type"] == "string_type" and isinstance(error["input"], dict | list):
        message = f"must be one text, not {value}"
    elif error["type"] == "too_long":
        message = f"takes {error['ctx']['max_length']} at most; remove the rest (value {value})"
    elif error["type"] == "string_type":
        message = f"must be text; put it in quotes (value {value})"
    elif error["type"] == "too_short":
        message = f"needs {error['ctx']['min_length']} at least; add what is missing (value {value})"
    elif error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] == NAME:
        message = f"must be a name: lower-case letters, digits and _, a letter first, not {value}"
    elif error["type"] in ("string_pattern_mismatch", "string_too_short"):
        message = f"must be text with something in it, at least 1 character, not {value}"
    elif error["type"] == "value_error":
        message = str(error["ctx"]["error"])
    elif error["type"] == "model_type":
        message = f"must be a mapping of keys, each on a line of its own below it, not {value}"
    else:
        message = f"{error['msg'][0].lower()}{error['msg'][1:]}, not {value}"
    return problem_at(file, raw, key, message)


Key = tuple[str | int, ...]
Found = Iterator[tuple[Key, str]]


def _contradictions(t: Template, stem: str) -> Found:
    """What each key allows but the whole forbids: (key, what and cure)."""
    if t.expert != stem:
        yield ("expert",), f"must be {stem!r}, the file's name, not {t.expert!r}"
    low, high = t.output.tokens
    if not 1 <= low <= high:
        yield ("output", "tokens"), f"must be [fewest, most], not {t.output.tokens}"
    broken = list(_answer_contradictions(t))
    if not broken:
        broken = list(_form_contradictions(t))
    yield from broken
    if not broken:
        yield from _slot_contradictions(t)
        yield from _case_contradictions(t)


def _answer_contradictions(t: Template) -> Found:
    extra = {key: set(t.fixed(key)) for key in t.answers}
    every = set().union(*extra.values())
    for key, names in extra.items():
        if missing := every - names:
            yield ("answers", key), f"lacks {', '.join(sorted(missing))}, which other answers have; add it"
        if clash := names & set(t.output.slots):
            yield ("answers", key), f"{', '.join(sorted(clash))} is the name of a slot too; rename one"
        if "answer" in (t.answers[key].__pydantic_extra__ or {}):
            yield ("answers", key, "answer"), "is what forms call the answer's text; rename it"
    for (a, first), (b, second) in combinations(t.answers.items(), 2):
        for inner, outer in ((first.text, second.text), (second.text, first.text)):
            if find_any([inner], outer):
                text = f"{inner!r} stands inside {outer!r} (answers {a} and {b}); tell them apart"
                yield ("answers", b, "text"), text
                break
        if shared := set(map(_folded, (first.text, *first.also))) & set(map(_folded, (second.text, *second.also))):
            yield ("answers", b, "also"), f"{sorted(shared)[0]!r} is a name of answer {a} too; tell them apart"
    for rival in t.declaration.rivals:
        for key, answer in t.answers.items():
            if _folded(rival) in map(_folded, (answer.text, *answer.also)):
                yield ("rivals",), f"{rival!r} is answer {key} itself; remove it from one"


def _form_contradictions(t: Template) -> Found:
    fixed = set.intersection(*(set(t.fixed(key)) for key in t.answers))
    texts: list[tuple[Key, str, bool]] = [(("output", "must", i), part, False) for i, part in enumerate(t.output.must)]
    texts += [(("output", "forms", i), form, True) for i, form in enumerate(t.output.forms)]
    texts += [(("output", "slots", n, "ask"), slot.ask, False) for n, slot in t.output.slots.items() if slot.ask]
    texts += [(("generate", "ask"), t.declaration.generate.ask, False)]
    used: set[str] = set()
    musts_known = True
    for key, text, is_form in texts:
        known = fixed | (set(t.output.slots) if is_form else set())
        try:
            names = set(fields(text))
        except ValueError as error:
            yield key, f"{error}; write {{{{ and }}}} for braces (value {shown(text)})"
            musts_known &= is_form
            continue
        used |= names
        for name in sorted(names - known):
            yield (
                key,
                f"unknown {'slot' if is_form else 'name'} {{{name}}}; known are {', '.join(sorted(known))}"
                + meant(name, known),
            )
            musts_known &= is_form
        if is_form and musts_known and not names - known:
            yield from _must_contradictions(t, key, text)
    for name in set(t.output.slots) - used:
        yield ("output", "slots", name), "is used by no form; remove it or use it"


def _must_contradictions(t: Template, key: tuple[str | int, ...], form: str) -> Found:
    blank = dict.fromkeys(t.output.slots, "x")
    for answer in t.answers:
        text = form.format(**t.fixed(answer), **blank)
        for part in t.output.must:
            if not find_any([part.format(**t.fixed(answer))], text):
                yield key, f"lacks {part!r}, which output.must demands of every reply"
                return
        if hedge := find_any(t.output.never, text):
            yield key, f"holds {hedge!r} of output.never; every reply in it would be dropped"
            return
        named, rivals = t.names_in(text)
        if wrong := sorted(rivals | (named - {answer})):
            yield key, f"names {', '.join(wrong)} with answer {answer}; every such reply would be dropped"
            return


def _slot_contradictions(t: Template) -> Found:
    for name, slot in t.output.slots.items():
        key = ("output", "slots", name)
        if slot.ask is None and not slot.phrases:
            yield key, "needs `ask` (for a teacher), `phrases`, or both"
        if isinstance(slot.phrases, dict):
            for odd in sorted(set(t.answers) ^ set(slot.phrases)):
                lack = "is no answer" if odd in slot.phrases else "has no phrases"
                yield (
                    (*key, "phrases", odd),
                    (
                        f"{odd!r} {lack}; the answers are {', '.join(t.answers)}"
                        + (meant(odd, t.answers) if odd in slot.phrases else "")
                    ),
                )
        for answer in t.answers:
            for i, phrase in enumerate(t.phrases(name, answer)):
                if fault := _phrase_fault(t, phrase, answer, slot.max_words):
                    yield (*key, "phrases", *([answer] if isinstance(slot.phrases, dict) else []), i), fault


def _phrase_fault(t: Template, phrase: str, answer: str, max_words: int) -> str | None:
    named, rivals = t.names_in(phrase)
    if len(phrase.split()) > max_words:
        return f"{shown(phrase)} has {len(phrase.split())} words, more than max_words {max_words}; shorten it"
    if rivals or named - {answer}:
        return f"{shown(phrase)} names {', '.join(sorted(rivals | named))}; reword it"
    if hedge := find_any(t.output.never, phrase):
        return f"{shown(phrase)} holds {hedge!r} of output.never; reword it"
    return None


def _case_contradictions(t: Template) -> Found:
    for i, case in enumerate(t.declaration.tests):
        given, expect = case.given, case.expect
        if given.answer is None and len(t.answers) > 1:
            yield ("tests", i, "given"), f"answer is missing; one of {', '.join(t.answers)}"
        elif given.answer is not None and given.answer not in t.answers:
            text = f"{given.answer!r} is no answer; one of {', '.join(t.answers)}{meant(given.answer, t.answers)}"
            yield ("tests", i, "given", "answer"), text
        if (expect.verdict == "drop") != (expect.reason is not None):
            yield ("tests", i, "expect"), "a drop names its reason, a keep has none"
        elif expect.reason and expect.reason not in REASONS:
            text = f"{expect.reason!r} is no reason; one of {', '.join(REASONS)}{meant(expect.reason, REASONS)}"
            yield ("tests", i, "expect", "reason"), text


def json_schema() -> str:
    """The JSON schema of a template, as editors read it; docs/template.schema.json holds it."""
    made = Declaration.model_json_schema()
    made["$defs"]["Expect"]["properties"]["reason"] |= {"enum": [*REASONS, None]}
    for names in (made["properties"]["answers"], made["$defs"]["Output"]["properties"]["slots"]):
        names["additionalProperties"] = False
    made = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "title": "A template of dmoe: one expert",
    }
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"
