"""Small edits of a template's text that leave every other byte as it was: comments, order, quotes, line ends.

ruamel.yaml would write the whole file anew; here it only tells where things stand. Each edit proves itself: what
is read afterwards must be what was read before with that one change, or else nothing is edited.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from factory.errors import Problems, UserError
from factory.yaml12 import parse_yaml

Path = tuple[str | int, ...]
WIDE = 110  # a list in brackets goes on in a new line after this column
PLAIN = re.compile(r"[^\W\d_](?:[\w ,.'()/-]*[\w.')])?")  # text that may stand without quotes in a block


def append(text: str, path: Path, value: str | dict[str, Any]) -> str:
    """`text` with `value` as the last item of the list at `path`.

    Raises:
        UserError: the list cannot be edited by itself (an alias, say, or there is none).
    """

    def edit(node: Any) -> str:
        last = _end(node.value[-1]) if node.value else 0
        if not node.flow_style:
            at, end, column = _next_line(text, last), _break(text), node.start_mark.column
            item = "".join(f"{' ' * column}{line}{end}" for line in _lines(value))
            return text[:at] + item + text[at:] if text[at - 1] == "\n" else text + end + item.removesuffix(end)
        if not node.value:
            return text[: node.start_mark.index + 1] + _quoted(value) + text[node.start_mark.index + 1 :]
        column = last - text.rfind("\n", 0, last)
        comma = "," + _break(text) + " " * node.value[0].start_mark.column if column > WIDE else ", "
        return text[:last] + comma + _quoted(value) + text[last:]

    return _proved(text, path, edit, lambda items: items.append(value))


def remove(text: str, path: Path) -> str:
    """`text` without the list item at `path`, whose last part is its number.

    Raises:
        UserError: the item cannot be removed by itself, or is the only one.
    """
    *where, number = path
    assert isinstance(number, int)

    def edit(node: Any) -> str:
        start, end = node.value[number].start_mark.index, _end(node.value[number])
        if not node.flow_style:
            return text[: text.rfind("\n", 0, start) + 1] + text[_next_line(text, end) :]
        if number + 1 < len(node.value):
            return text[:start] + text[node.value[number + 1].start_mark.index :]
        return text[: _end(node.value[number - 1])] + text[end:]

    return _proved(text, tuple(where), edit, lambda items: items.pop(number))


def _proved(text: str, path: Path, edit: Callable[[Any], str], change: Callable[[list[Any]], object]) -> str:
    wanted = parse_yaml(text, "the template")
    place = ".".join(map(str, path))
    try:
        items = wanted
        for part in path:
            items = items[part]
        change(items)
        edited = edit(_node(text, path))
        if items and parse_yaml(edited, "the template") == wanted:
            return edited
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, Problems):
        pass
    raise UserError(f"{place}: cannot be edited by itself, as it is written there; edit it by hand")


def _node(text: str, path: Path) -> Any:
    """The node at `path`, which knows where in `text` it stands."""
    from ruamel.yaml import YAML

    node = YAML(typ="rt", pure=True).compose(text)
    for part in path:
        if isinstance(part, int):
            node = node.value[part]
        else:
            node = next(value for key, value in node.value if key.value == part)
    return node


def _end(node: Any) -> int:
    """Where a node's own text ends; a block's mark stands behind the comments that follow it."""
    if isinstance(node.value, str) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)


def _next_line(text: str, at: int) -> int:
    """Where the line after that of `at` starts; a block scalar ends there already."""
    found = text.find("\n", at - 1)
    return found + 1 if found >= 0 else len(text)


def _break(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _lines(value: str | dict[str, Any]) -> list[str]:
    """A block item, line by line."""
    if isinstance(value, str):
        return [f"- {_scalar(value)}"]
    lines = []
    for key, entry in value.items():
        if isinstance(entry, dict):
            lines += [f"{key}:", *(f"  {name}: {_scalar(part)}" for name, part in entry.items())]
        else:
            lines.append(f"{key}: {_scalar(entry)}")
    return [f"{'  ' if i else '- '}{line}" for i, line in enumerate(lines)]


def _scalar(text: str) -> str:
    if PLAIN.fullmatch(text) and ": " not in text and parse_yaml(text, "") == text:
        return text
    return _quoted(text)


def _quoted(value: str | dict[str, Any]) -> str:
    """JSON is YAML, once what cannot be printed is escaped."""
    written = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in written)
