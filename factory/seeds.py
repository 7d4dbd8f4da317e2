"""Seeds: the hand-written questions of an expert, read strictly and split before anything is made of them."""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from factory.errors import Problem, Problems, relative, shown
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
        faults = [entry] if isinstance(entry, str) else list(_faults(entry, template))
        found += [Problem(file, number, *_split(fault)) for fault in faults]
        if isinstance(entry, dict) and not faults:
            seed = _seed(entry, template)
            if seed.id in lines:
                found.append(
                    Problem(
                        file, number, "id", f"{seed.id!r} is on line {lines[seed.id]} too; give it an id of its own"
                    )
                )
            lines.setdefault(seed.id, number)
            seeds.append(seed)
    found += [Problem(file, line, "instruction", text) for line, text in _repeats(seeds, lines)]
    if template and not found:
        found += [Problem(file, 1, "answer", text) for text in _too_few(seeds, template)]
    if found:
        raise Problems(found)
    return seeds


def _entry(line: str) -> dict[str, Any] | str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        return f": not JSON at column {error.colno}: {error.msg}"
    return entry if isinstance(entry, dict) else f": must be a JSON object, not {shown(entry)}"


def _split(fault: str) -> tuple[str, str]:
    key, _, message = fault.partition(": ")
    return key, message


def _is_text(value: object) -> bool:
    """Whether `value` is text with something in it, and no half of a character ("\\ud800"), which no file can hold."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _faults(entry: dict[str, Any], template: Template | None) -> list[str]:
    allowed = REQUIRED + (OPTIONAL if template else ())
    found = [f"{key}: unknown key; known are {', '.join(allowed)}" for key in entry if key not in allowed]
    for key in (*REQUIRED, "answer"):
        if key in entry and not _is_text(entry[key]):
            found.append(f"{key}: must be a text, not {shown(entry[key])}")
        elif key not in entry and key != "answer":
            found.append(f"{key}: is missing; every seed says its {key}")
    if template and not found:
        found += _answer_faults(entry, template)
    return found


def _answer_faults(entry: dict[str, Any], template: Template) -> list[str]:
    answer = entry.get("answer") or (next(iter(template.answers)) if len(template.answers) == 1 else "")
    if not answer:
        return [f"answer: is missing; one of {', '.join(template.answers)}"]
    if answer not in template.answers:
        return [
            f"answer: {answer!r} is no answer of templates/{template.expert}.yaml; one of {', '.join(template.answers)}"
        ]
    slots = entry.get("slots", {})
    if not isinstance(slots, dict):
        return [f"slots: must be a mapping, not {shown(slots)}"]
    found = []
    for name, value in slots.items():
        if name not in template.output.slots:
            found.append(f"slots.{name}: unknown slot; known are {', '.join(template.output.slots)}")
        elif not _is_text(value):
            found.append(f"slots.{name}: must be a text, not {shown(value)}")
        elif template.phrases(name, answer) and value not in template.phrases(name, answer):
            found.append(f"slots.{name}: {shown(value)} is none of the slot's phrases; add it there or choose another")
    return found


def _seed(entry: dict[str, Any], template: Template | None) -> Seed:
    answer = entry.get("answer") or (next(iter(template.answers)) if template else "")
    plain = {key: " ".join(entry[key].split()) for key in REQUIRED}
    return Seed(**plain, answer=answer, slots=dict(entry.get("slots", {})))


def _repeats(seeds: list[Seed], lines: dict[str, int]) -> list[tuple[int, str]]:
    first: dict[str, Seed] = {}
    found = []
    for seed in seeds:
        other = first.setdefault(seed.instruction.casefold(), seed)
        if other is not seed and other.id != seed.id:
            cure = (
                "remove one"
                if other.answer == seed.answer
                else f"it has answers {other.answer} and {seed.answer}; choose one"
            )
            found.append((lines[seed.id], f"the same question is on line {lines[other.id]}; {cure}"))
    return found


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
