"""The cache of the teacher's replies."""

import pytest

from factory.errors import UserError
from factory.teacher.cache import Cache, Kept, key_of


def kept(key="a", text="hello", expert="product"):
    return Kept(key, expert, f"{expert}-0001", "big", text, "stop", 20, 30)


def test_a_reply_is_there_for_the_next_process(tmp_path):
    with Cache(tmp_path / "c" / "replies.sqlite") as cache:
        cache.put([kept()])
    with Cache(tmp_path / "c" / "replies.sqlite") as cache:
        assert cache.get("a") == kept()
        assert cache.get("b") is None


def test_the_first_reply_to_a_request_stays(tmp_path):
    with Cache(tmp_path / "replies.sqlite") as cache:
        cache.put([kept(text="first")])
        cache.put([kept(text="second")])
        assert cache.get("a").text == "first"


def test_two_connections_write_to_one_file(tmp_path):
    path = tmp_path / "replies.sqlite"
    with Cache(path) as one, Cache(path) as two:
        for i in range(50):
            one.put([kept(f"one{i}")])
            two.put([kept(f"two{i}")])
        assert one.summary() == two.summary() == [("product", "big", 100, 0, 2000, 3000, 500)]


def test_what_is_removed_is_gone_and_hits_are_counted(tmp_path):
    with Cache(tmp_path / "replies.sqlite") as cache:
        cache.put([kept("a"), kept("b", expert="legal")])
        cache.hit(["a", "a"])
        assert [row[:4] for row in cache.summary()] == [("legal", "big", 1, 0), ("product", "big", 1, 2)]
        assert cache.keys() == {"a": 50, "b": 50}
        cache.remove(["b", "unknown"])
        assert [row[0] for row in cache.summary()] == ["product"]


def test_a_damaged_file_is_one_clear_error_and_is_left_as_it_is(tmp_path):
    path = tmp_path / "replies.sqlite"
    path.write_bytes(b"no database at all, but something that somebody wrote here" * 100)
    with pytest.raises(UserError, match="cannot be used as a cache"):
        Cache(path)
    assert path.read_bytes().startswith(b"no database")


def test_the_key_follows_content_alone():
    assert key_of({"a": 1, "b": "é"}) == key_of({"b": "é", "a": 1}) != key_of({"a": 2, "b": "é"})
