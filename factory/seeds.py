"""Seeds: the hand-written questions of an expert, read strictly and split before anything is made of them."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from factory.errors import Problem, Problems, meant, relative, shown
from factory.store import read_text
from factory.template import Template

REQUIRED = ("id", "instruction", "source", "licence")
OPTIONAL = ("answer", "slots")
FEWEST = 4  # seeds of one answer: three are held out, one at least is trained on


@dataclass(frozen=True)
class Seed:
    """One question as a person would ask it, and the answer it must get."""

    id: str
    instruction: str
    source: str
    licence: str
    answer: str = ""
    slots: dict[str, str] = field(default_factory=dict)
    line: int = field(default=0, compare=False, repr=False)  # in its file, from 1


def read_seeds(path: Path, template: Template | None) -> list[Seed]:
    """All seeds of one file; see parse_seeds."""
    return parse_seeds(read_text(path), path, template)


def parse_seeds(content: str, path: Path, template: Template | None) -> list[Seed]:
    """The seeds in `content`, the text of `path`, in its order; `template` None is for seeds/general.jsonl.

    Raises:
        Problems: everything that is wrong with it, each with its line.
    """
    file, found, seeds = relative(path), [], []
    lines: dict[str, int] = {}
    for number, line in enumerate(content.split("\n"), 1):  # splitlines would cut inside a JSON text
        if not line.strip():
            continue
        entry = _entry(line)
        if isinstance(entry, Problem):
            found.append(replace(entry, file=file, line=number))
            continue
        faults = _faults(entry, template)
        found += [Problem(file, number, key, text, column_of(line, key)) for key, text in faults]
        if not faults:
            seed = _seed(entry, template, number)
            if seed.id in lines:
                text = f"{seed.id!r} is on line {lines[seed.id]} too; give it an id of its own"
                found.append(Problem(file, number, "id", text, column_of(line, "id")))
            lines.setdefault(seed.id, number)
            seeds.append(seed)
    found += list(_repeats(file, content, seeds))
    if template and not found:
        found += [Problem(file, 1, "answer", text) for text in _too_few(seeds, template)]
    if found:
        raise Problems(found)
    return seeds


def column_of(line: str, key: str) -> int:
    """The column (from 1) in a line of JSON of the value of `key`, dotted; else of as much of it as is there."""
    at = 0
    for part in key.split(".") if key else []:
        if not (
            found := re.compile(r"\s*:\s*".join((re.escape(json.dumps(part, ensure_ascii=False)), ""))).search(line, at)
        ):
            break
        at = found.end()
    return at + 1


JSON_CURES = {
    "Expecting ',' delimiter": "put a comma between two parts, and \\ before a double quote inside a text",
    "Expecting property name": "keys and texts stand in straight double quotes, and no comma before }",
    "Illegal trailing comma": "remove the comma before }",
    "Expecting value": "a seed begins with { and its texts stand in straight double quotes",
    "Expecting ':'": 'write a seed as "key": "text"',
    "Extra data": "one line holds one seed and nothing else; put the next on a line of its own",
    "Unterminated string": "close the text with a double quote, on the same line",
    "Invalid control character": "write a space, not a tab, inside a text",
    "Invalid \\escape": "write \\\\ for a backslash",
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice; remove one")
    return made


def _entry(line: str) -> dict[str, Any] | Problem:
    try:
        entry = json.loads(line, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        cure = next((cure for words, cure in JSON_CURES.items() if words in error.msg), "")
        text = f"not JSON at column {error.colno}: {error.msg}" + (f"; {cure}" if cure else "")
        return Problem("", 0, "", text, error.colno)
    except ValueError as error:  # a key twice; a number of thousands of digits
        text = str(error) if "twice" in str(error) else "a number of thousands of digits; text stands in quotes"
        return Problem("", 0, "", text, 1)
    except RecursionError:
        return Problem("", 0, "", "nested too deeply; a seed is one flat object", 1)
    return entry if isinstance(entry, dict) else Problem("", 0, "", f"must be a JSON object, not {shown(entry)}", 1)


def _is_text(value: object) -> bool:
    """Whether `value` is text with something in it, and no half of a character ("\\ud800"), which no file can hold."""
    if not isinstance(value, str) or not value.strip():
        return False
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


Fault = tuple[str, str]  # key, what and cure


def _faults(entry: dict[str, Any], template: Template | None) -> list[Fault]:
    allowed = REQUIRED + (OPTIONAL if template else ())
    found = [(k, f"unknown key; known are {', '.join(allowed)}{meant(k, allowed)}") for k in entry if k not in allowed]
    for key in (*REQUIRED, "answer"):
        if key in entry and not _is_text(entry[key]):
            found.append((key, f"must be a text, not {shown(entry[key])}"))
        elif key not in entry and key != "answer":
            found.append((key, f"is missing; every seed says its {key}"))
    if template and not found:
        found += _answer_faults(entry, template)
    return found


def _answer_faults(entry: dict[str, Any], template: Template) -> list[Fault]:
    answer = entry.get("answer") or (next(iter(template.answers)) if len(template.answers) == 1 else "")
    known = ", ".join(template.answers)
    if not answer:
        return [("answer", f"is missing; one of {known}")]
    if answer not in template.answers:
        text = f"{answer!r} is no answer of templates/{template.expert}.yaml; one of {known}"
        return [("answer", text + meant(answer, template.answers))]
    slots = entry.get("slots", {})
    if not isinstance(slots, dict):
        return [("slots", f"must be a mapping, not {shown(slots)}")]
    return [fault for name, value in slots.items() for fault in _slot_faults(name, value, answer, template)]


def _slot_faults(name: str, value: object, answer: str, template: Template) -> list[Fault]:
    key, slots = f"slots.{name}", template.output.slots
    if name not in slots:
        return [(key, f"unknown slot; known are {', '.join(slots)}{meant(name, slots)}")]
    if not _is_text(value):
        return [(key, f"must be a text, not {shown(value)}")]
    phrases = template.phrases(name, answer)
    if phrases and value not in phrases:
        text = f"{shown(value)} is none of the slot's phrases; add it there or choose another"
        return [(key, text + meant(str(value), phrases))]
    return []


def _seed(entry: dict[str, Any], template: Template | None, line: int) -> Seed:
    answer = entry.get("answer") or (next(iter(template.answers)) if template else "")
    plain = {key: " ".join(entry[key].split()) for key in REQUIRED}
    return Seed(**plain, answer=answer, slots=dict(entry.get("slots", {})), line=line)


def _repeats(file: str, content: str, seeds: list[Seed]) -> Iterator[Problem]:
    first: dict[str, Seed] = {}
    for seed in seeds:
        other = first.setdefault(seed.instruction.casefold(), seed)
        if other is not seed and other.id != seed.id:
            same = other.answer == seed.answer
            cure = "remove one" if same else f"it has answers {other.answer} and {seed.answer}; choose one"
            column = column_of(content.split("\n")[seed.line - 1], "instruction")
            text = f"the same question is on line {other.line}; {cure}"
            yield Problem(file, seed.line, "instruction", text, column)


def _too_few(seeds: list[Seed], template: Template) -> list[str]:
    count = {key: sum(seed.answer == key for seed in seeds) for key in template.answers}
    return [f"{key} has {n} seeds; write {FEWEST} at least" for key, n in count.items() if n < FEWEST]


def held_out(seeds: list[Seed]) -> set[str]:
    """Ids of the seeds never trained on: per answer the quarter, three at least, with the lowest hash of id."""
    by_answer: dict[str, list[str]] = defaultdict(list)
    for seed in seeds:
        by_answer[seed.answer].append(seed.id)
    chosen: set[str] = set()
    for ids in by_answer.values():
        ordered = sorted(ids, key=lambda i: hashlib.sha256(i.encode()).hexdigest())
        chosen.update(ordered[: max(3, len(ids) // 4)])
    return chosen
