"""Files: whole or not at all, equal input to equal bytes, and errors that say what to do."""

import errno
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory import schema
from factory.errors import Problems, UserError
from factory.schema import ROWS, VERDICTS, read_rows, write_rows, writing
from factory.store import once, read_json, read_parquet, read_text, sha256, whole, write_json, write_parquet, write_text

KILLED_FILE = """
import os, signal, sys
from pathlib import Path
from factory.store import whole
with whole(Path(sys.argv[1])) as temporary:
    temporary.write_text("half of the new te")
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_FOLDER = """
import os, signal, sys
from pathlib import Path
from factory.store import whole
with whole(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "first").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
NO_ROOM = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from factory.errors import UserError
from factory.store import write_parquet
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_parquet(Path(sys.argv[1]), pa.table({"n": [i * 7919 % 10007 for i in range(10000)]}))
except UserError as error:
    sys.exit(str(error))
"""


def _folder(path, text):
    path.mkdir()
    (path / "first").write_text(text)


def _verdict(row_id="r1", **changes):
    row = {"row_id": row_id, "verdict": "keep", "reasons": [], "detail": "", "like": "", "score": 0.0, "tokens": 30}
    return row | changes


def _kill(code, path):
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


# -- whole --------------------------------------------------------------------------------------


def test_a_block_that_ends_well_takes_the_place_of_the_old_file(tmp_path):
    path = tmp_path / "made" / "a.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_block_that_ends_well_takes_the_place_of_the_old_folder(tmp_path):
    path = tmp_path / "a"
    _folder(path, "old")
    (path / "second").write_text("of the old one alone")
    with whole(path) as temporary:
        _folder(temporary, "new")
    assert [(p.name, p.read_text()) for p in path.iterdir()] == [("first", "new")]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_old_file_stays_when_the_block_raises(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_old_folder_stays_when_the_block_raises(tmp_path):
    path = tmp_path / "a"
    _folder(path, "old")
    with pytest.raises(ZeroDivisionError), whole(path) as temporary:
        _folder(temporary, "half")
        raise ZeroDivisionError
    assert (path / "first").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_block_that_makes_nothing_is_an_error_and_the_old_folder_stays(tmp_path, existing):
    path = tmp_path / "a"
    if existing:
        _folder(path, "old")
    with pytest.raises(UserError, match="a: cannot be written"), whole(path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a"] * existing
    assert not existing or (path / "first").read_text() == "old"


@pytest.mark.parametrize("name", ["old", "old-folder"])
def test_an_artefact_may_have_any_name(tmp_path, name):
    for text in ("first", "second"):
        with whole(tmp_path / name) as temporary:
            _folder(temporary, text)
    assert (tmp_path / name / "first").read_text() == "second"


def test_a_kill_in_the_middle_leaves_the_old_file_and_the_next_writer_clears_up(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    _kill(KILLED_FILE, path)
    assert path.read_text() == "old"
    assert list(tmp_path.glob(".tmp-a.txt-*"))
    write_text(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_kill_in_the_middle_leaves_the_old_folder_and_the_next_writer_clears_up(tmp_path):
    path = tmp_path / "a"
    _folder(path, "old")
    _kill(KILLED_FOLDER, path)
    assert (path / "first").read_text() == "old"
    assert list(tmp_path.glob(".tmp-a-*"))
    with whole(path) as temporary:
        _folder(temporary, "new")
    assert (path / "first").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_kill_leaves_no_file_where_there_was_none(tmp_path):
    _kill(KILLED_FILE, tmp_path / "a.txt")
    assert not (tmp_path / "a.txt").exists()


def test_a_kill_between_the_two_renames_loses_no_old_folder(tmp_path):
    stale = tmp_path / ".tmp-a-xyz"
    stale.mkdir()
    _folder(stale / "old-a", "old")
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "a"):
        raise ZeroDivisionError
    assert (tmp_path / "a" / "first").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_stale_temporaries_of_another_artefact_are_left_alone(tmp_path):
    (tmp_path / ".tmp-b.txt-xyz").mkdir()
    (tmp_path / ".tmp-a.txt-file").write_text("stale")
    write_text(tmp_path / "a.txt", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-b.txt-xyz", "a.txt"]


def test_a_full_disk_is_one_clear_line_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UserError) as told, whole(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(told.value) == f"{path}: cannot be written: No space left on device"
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_truly_full_disk_is_one_clear_line(tmp_path):
    told = r"a\.txt: cannot be written: No space left on device$"
    with pytest.raises(UserError, match=told), whole(tmp_path / "a.txt"), open("/dev/full", "w") as full:
        full.write("anything")
    assert list(tmp_path.iterdir()) == []


def test_a_parquet_that_no_longer_fits_is_one_clear_line_and_the_old_one_stays(tmp_path):
    path = tmp_path / "a.parquet"
    write_rows(path, VERDICTS, [_verdict()])
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", NO_ROOM, str(path)], capture_output=True, text=True)
    assert done.stderr.startswith(f"{path}: cannot be written: ") and done.stderr.count("\n") == 1
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"a\.txt: cannot be written: "):
        write_text(tmp_path / "file" / "a.txt", "text")


def test_once_makes_a_thing_once(tmp_path):
    made = []
    for text in ("first", "second"):
        once(tmp_path / "a.txt", lambda path, text=text: made.append(path.write_text(text)))
    assert (tmp_path / "a.txt").read_text() == "first" and len(made) == 1


# -- text and JSON ------------------------------------------------------------------------------


def test_text_that_is_not_utf_8_names_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nth\xffree\n")
    with pytest.raises(Problems, match=r"a\.txt:3: not UTF-8 at byte 10; save it as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.txt: there is no such file"):
        read_text(tmp_path / "a.txt")


def test_damaged_json_names_its_line(tmp_path):
    write_text(tmp_path / "a.json", '{"a": 1,\n oops}')
    with pytest.raises(UserError, match=r"a\.json:2: not JSON: "):
        read_json(tmp_path / "a.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(JSON)
def test_what_is_written_as_json_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.json"
    write_json(path, value)
    assert read_json(path) == value


def test_a_folder_s_hash_knows_names_and_contents(tmp_path):
    hashes = set()
    for name, files in {"a": {"x": "1"}, "b": {"x": "2"}, "c": {"y": "1"}, "d": {"x": "1", "y": ""}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        hashes.add(sha256(tmp_path / name))
    assert len(hashes) == 4
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "x").write_text("1")
    assert sha256(tmp_path / "e") == sha256(tmp_path / "a")


# -- parquet ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.integers(-(2**31), 2**31 - 1)), max_size=50))
def test_equal_tables_give_equal_bytes(tmp_path_factory, pairs):
    folder = tmp_path_factory.getbasetemp()
    for name in ("one", "two"):
        write_parquet(folder / name, pa.table({"text": [t for t, _ in pairs], "n": [n for _, n in pairs]}))
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()


def test_a_missing_parquet_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"a\.parquet: there is no such file\n  then run: dmoe generate medical"):
        read_parquet(tmp_path / "a.parquet", "dmoe generate medical")


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"x" * len(b)])
def test_a_damaged_parquet_names_the_command_that_makes_it(tmp_path, damage):
    path = tmp_path / "a.parquet"
    write_rows(path, VERDICTS, [_verdict()])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet: damaged parquet \((.|\n)*\)\n  then run: dmoe build medical"):
        read_rows(path, VERDICTS, "dmoe build medical")


def test_a_parquet_of_another_table_names_the_command_that_makes_it(tmp_path):
    write_rows(tmp_path / "a.parquet", VERDICTS, [_verdict()])
    with pytest.raises(UserError, match=r"a\.parquet: is not a table of rows\n  then run: dmoe build medical"):
        read_rows(tmp_path / "a.parquet", ROWS, "dmoe build medical")


def test_rows_that_keep_the_rules_are_read_back(tmp_path):
    rows = [_verdict("r1"), _verdict("r2", verdict="drop", reasons=["form", "echo"], like="r1", score=91.5)]
    write_rows(tmp_path / "a.parquet", VERDICTS, rows)
    assert read_rows(tmp_path / "a.parquet", VERDICTS, "") == rows


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (_verdict(verdict="perhaps"), "verdict = 'perhaps'"),
        (_verdict(reasons=["boredom"]), "reasons = .*boredom"),
        (_verdict(tokens=-1), "tokens = -1"),
        (_verdict("r0"), "row_id = 'r0'"),
        (_verdict(detail=None), "detail"),
        (_verdict(tokens="many"), "not of its column's kind in verdicts"),
    ],
    ids=["a value not among the known", "an unknown reason", "too small", "an id twice", "missing", "of another kind"],
)
def test_a_row_that_breaks_a_rule_is_an_error_and_nothing_is_written(tmp_path, broken, told):
    path = tmp_path / "a.parquet"
    with pytest.raises(UserError, match=rf"a\.parquet: (.|\n)*{told}"):
        write_rows(path, VERDICTS, [_verdict("r0"), broken])
    assert list(tmp_path.iterdir()) == []


def _written(path, portions):
    with writing(path, VERDICTS) as write:
        for portion in portions:
            write(portion)
    return path.read_bytes()


def test_rows_written_portion_by_portion_are_checked_and_the_portions_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "ROW_GROUP", 4)
    rows = [_verdict(row_id=f"{i:04}") for i in range(10)]
    whole_ = _written(tmp_path / "a.parquet", [rows])
    assert whole_ == _written(tmp_path / "b.parquet", [rows[:3], [], rows[3:4], rows[4:]])
    assert read_rows(tmp_path / "b.parquet", VERDICTS, "") == rows


def test_no_row_at_all_is_a_file_too(tmp_path):
    _written(tmp_path / "a.parquet", [])
    assert read_rows(tmp_path / "a.parquet", VERDICTS, "") == []


def test_a_row_that_is_there_twice_is_found_across_row_groups_and_the_old_file_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "ROW_GROUP", 4)
    rows = [_verdict(row_id=f"{i:04}") for i in range(10)]
    before = _written(tmp_path / "a.parquet", [rows])
    with pytest.raises(UserError, match=r"a\.parquet: row_id '0001' is there twice"):
        _written(tmp_path / "a.parquet", [rows, [rows[1]]])
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "a.parquet", VERDICTS) as write:
        write(rows[:6])
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"] and (tmp_path / "a.parquet").read_bytes() == before
