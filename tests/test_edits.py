"""Edits of a template's text: what was meant changes, every other byte stays."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.edits import append, remove
from factory.errors import UserError
from factory.yaml12 import parse_yaml

ROOT = Path(__file__).parents[1]
EXPERTS = ["product", "medical", "legal"]
CASE = {"name": "a", "given": {"instruction": "b: #c", "output": '"q" \\ {x}'}, "expect": {"verdict": "drop"}}
TEXTS = {name: (ROOT / "templates" / f"{name}.yaml").read_text() for name in EXPERTS}


def value(text):
    return parse_yaml(text, "t")


def lists(node, path=()):
    """The path of every list of texts or of mappings."""
    if isinstance(node, list):
        yield path
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from lists(child, (*path, key))


def at(node, path):
    for part in path:
        node = node[part]
    return node


def inside_only(before, after):
    """Whether one is the other with one stretch put in: nothing else was touched."""
    short, long = sorted((before, after), key=len)
    start = next((i for i, c in enumerate(short) if c != long[i]), len(short))
    return long.startswith(short[:start]) and long.endswith(short[start:])


PLACES = [(name, path) for name in EXPERTS for path in lists(value(TEXTS[name]))]
printable = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(PLACES), printable, st.booleans())
def test_a_text_is_added_at_the_end_of_any_list_and_nothing_else_changes(place, new, windows):
    name, path = place
    text = TEXTS[name].replace("\n", "\r\n") if windows else TEXTS[name]
    edited = append(text, path, new)
    wanted = value(text)
    at(wanted, path).append(new)
    assert value(edited) == wanted and inside_only(text, edited)
    assert not windows or not re.search(r"(?<!\r)\n", edited)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(PLACES), st.data())
def test_an_item_is_removed_from_any_list_and_nothing_else_changes(place, data):
    name, path = place
    text, items = TEXTS[name], at(value(TEXTS[name]), path)
    number = data.draw(st.integers(0, max(0, len(items) - 1)))
    wanted = value(text)
    if len(items) < 2:
        with pytest.raises(UserError, match="by hand"):
            remove(text, (*path, number))
        return
    edited = remove(text, (*path, number))
    del at(wanted, path)[number]
    assert value(edited) == wanted and inside_only(text, edited)


@pytest.mark.parametrize(
    "text",
    [
        "tests: []  # none yet\n",
        "tests:\n- name: x  # why\n  given: {instruction: a,\n     output: b}\n# after\nlast: 1\n",
        "tests:\n    - name: |\n        a block\n\n# after\nlast: 1\n",
        "tests:\n  - name: no line feed at the end",
        'tests: [{name: "in brackets"},\n]\n',
    ],
)
def test_a_case_is_written_into_every_shape_of_list(text):
    edited = append(text, ("tests",), CASE)
    assert value(edited)["tests"] == [*value(text)["tests"], CASE] and inside_only(text, edited)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [b]\nnever: *x\n",
        "never: text\n",
        "never: {a: b}\n",
        "other: [a]\n",
        "never:\n",
        "[a, b]\n",
        "never: [a\n",
    ],
)
def test_what_cannot_be_edited_by_itself_is_left_alone_and_said(text):
    with pytest.raises(UserError):
        append(text, ("never",), "new")
