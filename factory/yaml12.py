"""YAML 1.2 with the place of every key and item. libyaml reads what is plain; ruamel.yaml, which DVC reads with
too, judges all else and words what is wrong. It is thirty times slower, and alone would make `dmoe lint` wait.

Anchors, aliases and tags are refused: a template says everything where it is read, and no text can unfold without end.
"""

import re
from typing import Any

from yaml import YAMLError
from yaml._yaml import CParser
from yaml.events import (
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from factory.errors import Problem, Problems, shown

Place = tuple[int, int]  # line and column, from 1
DEEPEST = 40  # levels of nesting; a template has six


class Map(dict[str, Any]):
    """A mapping that knows where its keys stand."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}


class Items(list[Any]):
    """A list that knows where its items stand."""

    def __init__(self) -> None:
        self.places: list[Place] = []


def place_of(raw: Any, key: tuple[str | int, ...]) -> Place:
    """The place of the deepest part of `key` that is there; (1, 0) if there is none."""
    place, node = (1, 0), raw
    for part in key:
        try:
            place, node = node.places[part], node[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return place


def parse_yaml(text: str, file: str) -> Any:
    """The value of YAML 1.2 text: Map, Items, text, numbers, true or false, None.

    Raises:
        Problems: it is not YAML, with the place in `file` where it goes wrong.
    """
    try:
        return _plain(text)
    except (NotPlain, YAMLError):
        return _judged(text, file)


# -- what is plain ------------------------------------------------------------------------------


class NotPlain(Exception):
    """Something that libyaml (YAML 1.1) might read otherwise than ruamel.yaml."""


RISKY = re.compile(
    "[|>][-+0-9]*#|[^\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
PERHAPS = re.compile(
    r"[-+.=<~0-9][-+.:_ \t0-9a-fA-FxXoOtTzZiInN]*|[-+.=<~]\S*|[tT]rue|TRUE|[fF]alse|FALSE|[nN]ull|NULL|"
)
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?")
CONSTANTS = {"true": True, "false": False, "null": None, "": None}


def _plain(text: str) -> Any:
    if RISKY.search(text):
        raise NotPlain
    parser = CParser(text)
    parser.get_event()
    start = parser.get_event()
    if not isinstance(start, DocumentStartEvent) or start.version or start.tags:
        raise NotPlain
    value = _value(parser, parser.get_event(), 0)
    parser.get_event()
    if not isinstance(parser.get_event(), StreamEndEvent):
        raise NotPlain
    return value


def _value(parser: CParser, event: Any, depth: int) -> Any:
    if depth > DEEPEST or event.anchor or getattr(event, "tag", None):  # an alias has an anchor
        raise NotPlain
    if isinstance(event, ScalarEvent):
        if event.style in ("|", ">"):  # comments beside a block are read in two ways
            raise NotPlain
        return event.value if event.style else _scalar(event.value)
    if isinstance(event, SequenceStartEvent):
        return _items(parser, depth + 1)
    if isinstance(event, MappingStartEvent):
        return _map(parser, depth + 1)
    raise NotPlain


def _items(parser: CParser, depth: int) -> Items:
    made = Items()
    while not isinstance(event := parser.get_event(), SequenceEndEvent):
        made.places.append((event.start_mark.line + 1, event.start_mark.column + 1))
        made.append(_value(parser, event, depth))
    return made


def _map(parser: CParser, depth: int) -> Map:
    made = Map()
    while not isinstance(event := parser.get_event(), MappingEndEvent):
        key = _value(parser, event, depth)
        if not isinstance(key, str) or key in made:
            raise NotPlain
        made.places[key] = event.start_mark.line + 1, event.start_mark.column + 1
        made[key] = _value(parser, parser.get_event(), depth)
    return made


def _scalar(text: str) -> Any:
    """What stands without quotes: text, a plain number or constant; whatever else is left to ruamel.yaml."""
    if not PERHAPS.fullmatch(text):
        return text
    if text in CONSTANTS:
        return CONSTANTS[text]
    if number := NUMBER.fullmatch(text):
        return float(text) if number[1] else int(text)
    raise NotPlain


# -- what is not, and what is wrong -------------------------------------------------------------


def _judged(text: str, file: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.composer import Composer, ComposerError
    from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor
    from ruamel.yaml.error import MarkedYAMLError
    from ruamel.yaml.reader import ReaderError

    class Flat(Composer):  # type: ignore[misc]
        """Refuses what repeats, renames or retypes other text."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.parser.peek_event()
            if event.anchor or getattr(event, "ctag", None):
                raise ComposerError(problem=SPECIAL, problem_mark=event.start_mark)
            return super().compose_node(parent, index)

    class Placed(RoundTripConstructor):  # type: ignore[misc]
        """Tells where a value stands that looks like a date or a number and is none (2026-02-30)."""

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, KeyError, AttributeError) as error:
                raise ConstructorError(problem=f"{error}; put text in quotes", problem_mark=node.start_mark) from None

    yaml = YAML(typ="rt", pure=True)
    yaml.Composer, yaml.Constructor = Flat, Placed
    try:
        return _converted(yaml.load(text), file)
    except MarkedYAMLError as error:
        raise Problems([_marked(error, file)]) from None
    except ReaderError as error:
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        what = f"not YAML: the character {chr(error.character)!r} may not stand in it; remove it"
        raise Problems([Problem(file, line, "", what, column)]) from None
    except Problems:
        raise
    except RecursionError:
        raise Problems([Problem(file, 1, "", "not YAML that can be read: nested too deeply")]) from None
    except Exception as error:  # it raises whatever its parts do, and asserts
        raise Problems([Problem(file, 0, "", f"not YAML: {error or type(error).__name__}")]) from None


SPECIAL = "text that begins with &, * or ! has a meaning of its own in YAML, which is not used here; put it in quotes"
CURES = {
    "duplicate key": "remove one",
    "another document": "remove the line ---",
    "mapping values are not allowed": "put the text in quotes if it holds ': ', or mend the spaces before the key",
    r"character '\\t'": "indent with spaces, not with tabs",
    "unknown escape": r"in double quotes write \\ for a backslash, or use single quotes",
    "character ": "put the text in quotes",
    "expected <block end>": "the line stands too far left or right, or a quote or dash is missing; compare it with the "
    "lines above",
    "expected ',' or ": "put a comma between two items, close the bracket, and put text with marks in it in quotes",
    "could not find expected ':'": "write a key as `key: value`, and close the quotes above it",
    "end of stream": "a quote that is opened here is never closed; close it",
}


def _marked(error: Any, file: str) -> Problem:
    what = re.sub('(duplicate key "[^"]*").*', r"\1 here", " ".join(str(error.problem).split()))
    cure = next((cure for words, cure in CURES.items() if re.search(words, what)), "")
    mark = error.context_mark if "end of stream" in what and error.context_mark else error.problem_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    return Problem(file, line, "", f"not YAML: {what}" + (f"; {cure}" if cure else ""), column)


def _converted(value: Any, file: str, place: Place = (1, 0), depth: int = 0) -> Any:
    """ruamel.yaml's round-trip values as Map, Items and plain scalars."""
    if depth > DEEPEST:
        raise Problems([Problem(file, place[0], "", f"nested more than {DEEPEST} deep; flatten it", place[1])])
    where: Any = getattr(value, "lc", None)
    if isinstance(value, dict):
        made = Map()
        for key in value:
            line, column = (n + 1 for n in where.key(key))
            if not isinstance(key, str):
                raise Problems([Problem(file, line, "", f"the key {shown(key)} is no text; put it in quotes", column)])
            made.places[str(key)] = line, column
            made[str(key)] = _converted(value[key], file, (line, column), depth + 1)
        return made
    if isinstance(value, list):
        items = Items()
        for i, item in enumerate(value):
            line, column = (n + 1 for n in where.item(i))
            items.places.append((line, column))
            items.append(_converted(item, file, (line, column), depth + 1))
        return items
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise Problems([Problem(file, place[0], "", "a number too large; put it in quotes if it is text", place[1])])
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), value)
