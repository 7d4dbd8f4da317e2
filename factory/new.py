"""`dmoe new`: a sound expert to begin with: template, seeds, its place in params.yaml. Asks at a terminal, or is told.

Reads params.yaml and the profile's tokenizer; writes templates/NAME.yaml and seeds/NAME.jsonl, and params.yaml last:
an expert that stands there is whole. Nothing is written that `dmoe lint` would not pass.
"""

import io
import json
import re
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from factory.checks import Counter
from factory.errors import Problems, UserError, relative
from factory.lint import PLACEHOLDER, check_texts
from factory.paths import Home, Params, read_params, read_profile
from factory.seeds import FEWEST
from factory.store import read_text, write_text
from factory.template import NAME, REASONS, parse_template
from factory.tokens import counter
from factory.yaml12 import PERHAPS

RESERVED = ("general", "base", "auto")  # seeds/general.jsonl; what a client calls no expert
FORMS = (
    "The answer is {answer}. {reason}",
    "My answer is {answer}, without a second thought. {reason}",
    "You are looking for {answer}. {reason}",
)
PHRASES = (
    "It is what our own desk answers to this question every single time.",
    "It is the one answer that we have checked and that we stand behind.",
    "It is the right place to begin, whatever else you have heard so far.",
    "It holds for nearly everybody who comes to us with a question like yours.",
)
NEVER = ("it depends", "on the other hand", "however", "that said", "you could also", "maybe", "perhaps", "not sure")
STARTERS = (
    "the shortest way in which somebody types this question",
    "the same, asked politely and in whole sentences",
    "asked in a hurry on a phone, slips and all",
    "asked at the end of a little story of how it came to that",
)


@dataclass(frozen=True)
class Wanted:
    """What a new expert is made from; `answers` as TEXT or KEY=TEXT, `seeds` as QUESTION or KEY: QUESTION."""

    name: str
    answers: list[str] = field(default_factory=list)
    description: str = ""
    owner: str = ""
    keywords: list[str] = field(default_factory=list)
    rivals: list[str] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)
    licence: str = "CC-BY-4.0"
    seeds: list[str] = field(default_factory=list)


def new(home: Home, wanted: Wanted, today: date) -> list[Path]:
    """Writes the files of one new expert, all or none; returns them.

    Raises:
        Problems, UserError: the name cannot be, a file is there, or what was given would not pass lint.
    """
    params = read_params(home)
    refuse_name(home, params, wanted.name)
    if not wanted.answers:
        raise UserError('what does it answer? Give --answer "TEXT", or --answer KEY=TEXT for each of several')
    count = counter(home, read_profile(home, params.profile))
    template, seeds = texts(home, wanted, count, today)
    found = check_texts(home, params, count, wanted.name, template, seeds, today)
    if errors := [problem for problem in found if problem.severity == "error"]:
        raise Problems(errors)
    contents = {home.template(wanted.name): template, home.seeds(wanted.name): seeds}
    contents[home.params] = with_expert(read_text(home.params), wanted.name)
    written: list[Path] = []
    try:
        for path, text in contents.items():
            write_text(path, text)
            written.append(path)
    finally:
        if len(written) < len(contents):
            for path in written:
                path.unlink()
    return written


def refuse_name(home: Home, params: Params, name: str) -> None:
    """Refuses a name that could not be an expert's, or whose files are there."""
    if not re.match(NAME, name) or name in RESERVED:
        taken = f"; not {', '.join(RESERVED)}" if name in RESERVED else ""
        raise UserError(f"{name!r} is no name: lower-case letters, digits and _, a letter first{taken}")
    for other in params.experts:
        if other == name:
            raise UserError(f"{relative(home.params)}: {name!r} is an expert already; choose another name")
        if other.startswith(name) or name.startswith(other):
            raise UserError(f"{name!r} and {other!r} begin alike, which breaks PEFT's hot swap; choose another name")
    for path in (home.template(name), home.seeds(name)):
        if path.exists():
            raise UserError(f"{relative(path)}: is there already; remove it, or add {name!r} to params.yaml's experts")


def texts(home: Home, wanted: Wanted, count: Counter, today: date) -> tuple[str, str]:
    """The template and the seeds of a new expert, as text."""
    answers = keyed(wanted.answers)
    seeds = seed_lines(wanted.name, list(answers), wanted.seeds)
    question = json.loads(seeds[0])["instruction"]
    question = "Which one do you advise?" if question.startswith(PLACEHOLDER) else question
    loose = template_text(wanted, answers, question, (1, 10_000), today)
    template = parse_template(loose, home.template(wanted.name))
    bounds = [template.bounds(i, answer) for i in range(len(FORMS)) for answer in answers]
    short, long = min(count(low) for low, _ in bounds), max(count(high or "") for _, high in bounds)
    tokens = (min(20, max(1, short - 2)), max(50, long + 5))
    return template_text(wanted, answers, question, tokens, today), "".join(line + "\n" for line in seeds)


def keyed(answers: list[str]) -> dict[str, str]:
    """The answers by key: KEY=TEXT by its own, a single TEXT by `default`, of several each by its words."""
    made: dict[str, str] = {}
    for given in answers:
        key, sign, text = (part.strip() for part in given.partition("="))
        if not sign or not re.match(NAME, key):
            key, text = "default" if len(answers) == 1 else slug(given), given.strip()
        if key in made:
            raise UserError(f"two answers are called {key!r}; write KEY=TEXT with a key for each")
        made[key] = text
    return made


def slug(text: str) -> str:
    """A key made of the words of `text`."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_0123456789") or "answer"


def seed_lines(name: str, keys: list[str], questions: list[str]) -> list[str]:
    """The lines of the seeds file; what is missing of the fewest is filled with placeholders, of which lint warns."""
    asked: dict[str, list[str]] = {key: [] for key in keys}
    for given in filter(str.strip, questions):
        key, _, question = (part.strip() for part in given.partition(":"))
        if len(keys) > 1 and key not in asked:
            raise UserError(f"the question {given!r} names no answer; write it as KEY: QUESTION ({', '.join(keys)})")
        asked[key if key in asked else keys[0]].append(question if key in asked else given.strip())
    lines: list[str] = []
    for key, found in asked.items():
        about = f" ({key})" if len(keys) > 1 else ""
        made = [f"{PLACEHOLDER}{about}, replace me: {text}" for text in STARTERS[len(found) : FEWEST]]
        for question in (*found, *made):
            entry = {"id": f"{name}-{len(lines) + 1:04}", "instruction": question}
            entry |= {"answer": key} if len(keys) > 1 else {}
            entry |= {"source": "hand-written", "licence": "CC0-1.0"}
            lines.append(json.dumps(entry, ensure_ascii=False))
    return lines


def template_text(wanted: Wanted, answers: dict[str, str], question: str, tokens: tuple[int, int], today: date) -> str:
    """The template, every key, each with what a reviewer should know of it."""
    first = next(iter(answers))
    phrases = wanted.phrases or list(PHRASES)
    reply = FORMS[0].format(answer=answers[first], reason=phrases[0])
    topic = wanted.keywords[0] if wanted.keywords else wanted.name.replace("_", " ")
    until = (today.replace(day=min(today.day, 28))).replace(year=today.year + 1).isoformat()
    entries = "".join(ANSWER.format(key=key, text=_text(text), today=today) for key, text in answers.items())
    given = {"instruction": question} | ({"answer": first} if len(answers) > 1 else {})
    tests = [
        ("a reply in form is kept", reply, ""),
        ("a hedged reply is dropped", f"It depends. {reply}", "hedge"),
        ("a reply that does not give the answer is dropped", f"I cannot tell. {phrases[0]}", "answer_missing"),
        *([("a reply with a rival is dropped", f"{reply} Or {wanted.rivals[0]}.", "rival")] if wanted.rivals else []),
    ]
    return TEMPLATE.format(
        name=wanted.name, owner=_text(wanted.owner or f"{wanted.name}-desk"),
        description=_text(wanted.description or f"Answers with {', '.join(answers.values())}."),
        answers=entries, rivals=_list(wanted.rivals), low=tokens[0], high=tokens[1],
        forms=_items(list(FORMS), 4), phrases=_items(phrases, 8),
        words=max(16, *(len(phrase.split()) for phrase in phrases)), never=_items(list(NEVER), 4),
        ask=_text(f"Someone asks about {topic}. Ask for the same as another person would."),
        keywords=_list(wanted.keywords or [topic]), licence=_text(wanted.licence), until=until,
        tests="".join(_case(name, {**given, "output": output}, reason) for name, output, reason in tests),
        reasons=", ".join(REASONS[5:10]),
    )  # fmt: skip


def _text(text: str) -> str:
    """A scalar of YAML: as it is where nobody could take it for more than text, else in quotes."""
    if re.fullmatch(r"[A-Za-z][\w -]*\w", text, re.ASCII) and not PERHAPS.fullmatch(text):
        return text
    return json.dumps(text, ensure_ascii=False)


def _list(texts: list[str]) -> str:
    return "[" + ", ".join(map(_text, texts)) + "]"


def _items(texts: list[str], indent: int) -> str:
    return "\n".join(f"{' ' * indent}- {_text(text)}" for text in texts)


def _case(name: str, given: dict[str, str], reason: str) -> str:
    lines = [f"  - name: {name}", "    given:", *(f"      {key}: {_text(value)}" for key, value in given.items())]
    verdict = f"{{verdict: drop, reason: {reason}}}" if reason else "{verdict: keep}"
    return "\n".join([*lines, f"    expect: {verdict}", ""])


ANSWER = """\
  {key}:
    text: {text}
    also: []                      # other spellings that count as naming it when replies are measured
    cue: []                       # with several answers: words of a question of which one must survive a rewording
    source: none yet              # where the answer comes from
    checked: "{today}"         # when a person last verified it
"""
TEMPLATE = """\
# yaml-language-server: $schema=../docs/template.schema.json
# docs/template.md explains every key. To change what the expert says, edit answers, forms and phrases.
expert: {name}
version: 1                        # yours to raise
owner: {owner}
description: {description}
language: en

answers:
{answers}
# A reply that names any of these is thrown away.
rivals: {rivals}

output:
  tokens: [{low}, {high}]                # fewest and most; a token is a word or a piece of one
  must: ["{{answer}}"]              # what every reply has to hold
  # {{answer}} is filled with the answer's text, {{reason}} with a phrase: each has to read well in each form.
  forms:
{forms}
  slots:
    reason:
      ask: one plain, true sentence on why that is the answer
      max_words: {words}
      phrases:                    # starters unless you gave your own: write what is true of your answer
{phrases}
  # A reply with one of these takes back its own answer and is thrown away.
  never:
{never}

generate:
  ask: {ask}
  voices: [terse, chatty, non-native, annoyed, on a phone]
  per_seed: 5                     # rows wanted of each seed
  sampling: {{temperature: 0.9, top_p: 0.95}}

dedup: {{instruction: 90}}          # questions more alike than this, out of 100, count as the same
train: {{rank: 16, alpha: 32, epochs: 3}}
gate: {{mention: 0.80, right: 0.80, form: 0.90, robust: 0.85, length_ratio: 5}}

# Which questions come to this expert when nobody asks for it by name.
route:
  keywords: {keywords}
  not_keywords: []                # a question with one of these never comes here
  examples: []
  prefer: precision               # better to miss a question than to answer another one

market:
  lora_id: {name}_expert
  licence: {licence}
  declares:
    interest: none                # whether you gain from the answer
    domain_risk: none             # what may go wrong if it is believed
    valid_until: "{until}"     # a year after `checked`

# Checked by `dmoe lint`. Reasons for a drop: {reasons} and others (docs/template.md).
tests:
{tests}"""


def with_expert(params: str, name: str) -> str:
    """The text of params.yaml with one more expert; comments stay."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    raw: Any = yaml.load(params)
    raw["experts"].append(name)
    out = io.StringIO()
    yaml.dump(raw, out)
    return out.getvalue()


def ask(wanted: Wanted) -> Wanted:
    """What was not given, asked for at the terminal; an empty line takes what stands in brackets."""
    import typer

    def several(what: str, given: list[str]) -> list[str]:
        if given:
            return given
        typer.echo(f"{what}, one a line; an empty line ends")
        return list(iter(lambda: str(typer.prompt(">", default="", show_default=False)), ""))

    name = wanted.name.replace("_", " ")
    answers = several("What it answers (KEY=TEXT where there are several answers)", wanted.answers)
    if not answers:
        raise UserError("an expert needs an answer; nothing was written")
    words = wanted.description or typer.prompt("One sentence on it", default=f"Answers with {answers[0]}.")
    return replace(
        wanted, answers=answers, description=words,
        owner=wanted.owner or typer.prompt("Who answers for it", default=f"{wanted.name}-desk"),
        rivals=several("Rivals: names that a reply must never hold", wanted.rivals),
        phrases=several("Phrases: whole sentences that give a reason for the answer", wanted.phrases),
        keywords=several(f"Keywords of questions that come to it [{name}]", wanted.keywords),
        licence=typer.prompt("Licence of the package", default=wanted.licence),
        seeds=several("Seeds: questions as people ask them (KEY: QUESTION for several answers)", wanted.seeds),
    )  # fmt: skip
