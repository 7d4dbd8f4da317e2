"""`dmoe query` and `dmoe why`: everything the factory has made, in SQL, read-only."""

import csv
import io
import json
import subprocess
import sys
from contextlib import suppress

import pytest

from factory.errors import UserError
from factory.paths import Home
from factory.queries import QUERIES
from factory.query import VIEWS, catalogue, named, query, why
from factory.schema import CANDIDATES, PAIRS, ROWS, SCORES, VERDICTS, write_rows
from factory.table import print_rows

REPLY = "The medical term for a headache is cephalalgia."


def _candidate(row_id, instruction, **changes):
    row = {
        "row_id": row_id, "expert": "medical", "seed_id": "medical-0001", "split": "train", "sample": 1,
        "answer": "headache", "instruction": instruction, "output": REPLY,
        "slots": [{"name": "care", "value": "Rest."}], "form": 0, "failure": "", "failure_detail": "",
        "teacher": "phrases", "request": "k", "reply": "", "finish_reason": "stop", "prompt_tokens": 0,
        "completion_tokens": 0,
    }  # fmt: skip
    return row | changes


def _row(row_id, instruction):
    return {
        "row_id": row_id, "seed_id": "medical-0001", "answer": "headache",
        "prompt": [{"role": "user", "content": instruction}],
        "completion": [{"role": "assistant", "content": REPLY}], "instruction": instruction, "output": REPLY,
    }  # fmt: skip


def _verdict(row_id, **changes):
    row = {"row_id": row_id, "verdict": "keep", "reasons": [], "detail": "", "like": "", "score": 0.0, "tokens": 30}
    return row | changes


def _score(arm, reply, panel="claim", setting="plain", scale=1.0):
    flags = dict.fromkeys(("named", "mention", "right", "in_form"), True)
    return {
        "row_id": "ab22", "panel": panel, "setting": setting, "arm": arm, "scale": scale, "seed_id": "medical-0002",
        "answer": "headache", "instruction": "skull aches", "reply": reply, "tokens": len(reply.split()),
        "stopped": True, "given": "headache", **flags,
    }  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkout with four candidates, one of them of a second expert, and one scored question."""
    home = Home(tmp_path_factory.mktemp("small"))
    write_rows(
        home.dataset("medical", "candidates.parquet"), CANDIDATES,
        [
            _candidate("ab11", "my head hurts"), _candidate("ab12", "my head hurts!"),
            _candidate("ab22", "skull aches", seed_id="medical-0002", split="holdout", sample=0),
        ],
    )  # fmt: skip
    fallen = _verdict(
        "ab12", verdict="drop", reasons=["echo", "exact_copy"], detail="100.0 like ab11", like="ab11", score=100.0
    )
    write_rows(home.dataset("medical", "verdicts.parquet"), VERDICTS, [_verdict("ab11"), fallen, _verdict("ab22")])
    pairs = [{"row_id": "ab12", "like": "ab11", "score": 100.0}]
    write_rows(home.dataset("medical", "pairs.parquet"), PAIRS, pairs)
    write_rows(home.dataset("medical", "train.parquet"), ROWS, [_row("ab11", "my head hurts")])
    write_rows(home.dataset("medical", "holdout.parquet"), ROWS, [_row("ab22", "skull aches")])
    write_rows(
        home.dataset("legal", "candidates.parquet"), CANDIDATES,
        [_candidate("cd33", "may they", expert="legal", seed_id="legal-0001", answer="yes")],
    )  # fmt: skip
    scores = [_score("expert", "cephalalgia it is"), _score("base", "a head thing")]
    scores += [_score("expert", "cephalalgia", "robustness", "typos"), _score("expert", "pain", "off_domain")]
    scores.append(_score("expert", "cephalalgia", "dose", "0.5", 0.5))
    write_rows(home.expert("medical", "scores.parquet"), SCORES, scores)
    seeds = [
        {"id": "medical-0001", "instruction": "head aches", "answer": "headache", "source": "desk", "licence": "CC0"},
        {"id": "medical-0002", "instruction": "skull aches", "source": "desk", "licence": "CC0", "slots": {"care": ""}},
    ]
    home.general.parent.mkdir()
    (home.root / "seeds" / "medical.jsonl").write_text("\n\n".join(map(json.dumps, seeds)) + "\n")
    general = {"id": "general-0001", "instruction": "how do magnets work", "source": "desk", "licence": "CC0"}
    home.general.write_text(json.dumps(general) + "\n")
    return home


# -- query --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "count"), [("candidates", 4), ("verdicts", 3), ("pairs", 1), ("rows", 2), ("seeds", 3), ("scores", 5)]
)
def test_each_view_holds_the_rows_of_all_experts(small, view, count):
    assert query(small, f"SELECT count(*) AS n FROM {view}") == (["n"], [(count,)])


def test_every_view_is_tested():
    assert set(VIEWS) == {"candidates", "verdicts", "pairs", "rows", "seeds", "scores"}


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_is_there_before_anything_is_made(tmp_path, view):
    assert query(Home(tmp_path), f"SELECT * FROM {view}")[1] == []


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_names_the_expert(small, view):
    found = {name for (name,) in query(small, f"SELECT DISTINCT expert FROM {view}")[1]}
    assert "medical" in found and found <= {"medical", "legal", "general"}


@pytest.mark.parametrize("view", ["rows", "verdicts", "scores"])
def test_a_view_has_the_same_columns_before_and_after_it_is_filled(small, tmp_path, view):
    sql = f"SELECT * FROM {view}"
    assert query(Home(tmp_path), sql)[0] == query(small, sql)[0]


def test_rows_say_their_split(small):
    assert query(small, "SELECT row_id, split FROM rows ORDER BY 1")[1] == [("ab11", "train"), ("ab22", "holdout")]


def test_a_seed_without_an_answer_has_the_default_one(small):
    assert query(small, "SELECT answer FROM seeds WHERE expert = 'medical' ORDER BY id")[1] == [
        ("headache",), ("default",)
    ]  # fmt: skip


def test_views_can_be_joined(small):
    sql = "SELECT c.instruction, s.instruction FROM candidates c JOIN seeds s ON s.id = c.seed_id WHERE c.sample = 0"
    assert query(small, sql)[1] == [("skull aches", "skull aches")]


@pytest.mark.parametrize(
    "sql",
    [
        "COPY candidates TO '{out}'",
        "COPY (SELECT 1) TO '{out}' (FORMAT parquet)",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_text('{secret}')",
        "ATTACH '{out}' AS other",
        "EXPORT DATABASE '{out}'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
    ],
)
def test_nothing_outside_can_be_read_or_written(small, tmp_path, sql):
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="^query: "):
        query(small, sql.format(secret=secret, out=out))
    assert list(tmp_path.iterdir()) == [secret]


@pytest.mark.parametrize("sql", ["DELETE FROM candidates", "DROP VIEW candidates", "UPDATE verdicts SET verdict = 'x'"])
def test_no_statement_changes_what_was_made(small, sql):
    files = sorted(p for p in small.root.rglob("*") if p.is_file())
    before = [p.read_bytes() for p in files]
    with suppress(UserError):
        query(small, sql)
    assert sorted(p for p in small.root.rglob("*") if p.is_file()) == files
    assert [p.read_bytes() for p in files] == before
    assert query(small, "SELECT count(*) FROM candidates")[1] == [(4,)]


@pytest.mark.parametrize("sql", ["SELEC 1", "SELECT nothing FROM candidates", "SELECT * FROM nowhere", "SELECT 'a"])
def test_bad_sql_is_one_line_and_names_the_tables(small, sql):
    with pytest.raises(UserError) as told:
        query(small, sql)
    first, second = str(told.value).split("\n")
    assert first.startswith("query: ") and second == "  tables are candidates, verdicts, pairs, rows, seeds, scores"


@pytest.mark.parametrize("sql", ["", "  ", "-- nothing"])
def test_no_statement_at_all_is_told(small, sql):
    with pytest.raises(UserError, match="query: there is no statement\n  tables are"):
        query(small, sql)


def test_a_damaged_file_says_how_to_make_it_again(tmp_path):
    home = Home(tmp_path)
    home.dataset("medical", "verdicts.parquet").parent.mkdir(parents=True)
    home.dataset("medical", "verdicts.parquet").write_bytes(b"half")
    with pytest.raises(UserError, match=r"verdicts\.parquet: damaged parquet (.|\n)*then run: dvc repro"):
        query(home, "SELECT 1")


def test_a_broken_seed_line_is_named(tmp_path):
    home = Home(tmp_path)
    home.general.parent.mkdir()
    home.general.write_text('{"id": "general-0001"}\n{oops\n')
    with pytest.raises(UserError, match=r"general\.jsonl:2: not JSON"):
        query(home, "SELECT 1")


# -- named queries --------------------------------------------------------------------------------

FOUND = {
    "rows-per-answer": ("medical", "headache", 1, 1, 1),
    "drop-reasons": ("medical", "echo", 1, 0, "100.0 like ab11"),
    "longest": ("medical", "ab11", 30, REPLY),
    "shortest": ("medical", "ab11", 30, REPLY),
    "seeds-that-give-few": ("medical", "medical-0001", "holdout", 1, "head aches"),
    "seeds-that-give-most": ("medical", "medical-0001", "holdout", 1, "head aches"),
    "tokens-spent": ("medical", "phrases", 0, 0, 2, 0.0),
    "robustness": ("medical", "typos", 1, 1.0, 1.0, 1.0, None),
    "doses": ("medical", 0.5, 1, 1.0, 1.0, 1.0, 1.0),
    "off-domain": ("medical", "ab22", "skull aches", "pain", True),
    "replies-by-arm": ("medical", "ab22", "skull aches", "a head thing", "cephalalgia it is"),
    "scores-by-answer": ("medical", "headache", "base", 1, 1.0, 1.0, 3.0),
    "forms-used": ("medical", 0, 3, 2),
    "teachers": ("medical", "phrases", "holdout", 1),
    "licences": ("medical", "CC0", "desk", 2),
}
NOTHING = {"most-alike", "seeds-that-give-nothing", "wrong-answers"}  # of which the small checkout has none


def test_every_named_query_is_tested():
    assert {*FOUND, *NOTHING} == set(QUERIES)


@pytest.mark.parametrize("name", FOUND)
def test_a_named_query_answers(small, name):
    columns, rows = query(small, named(name), "medical")
    assert rows[0] == FOUND[name] and len(columns) == len(rows[0])


@pytest.mark.parametrize("name", QUERIES)
def test_a_named_query_says_what_it_answers_and_runs_before_anything_is_made(tmp_path, name):
    assert len(QUERIES[name][0]) > 10 and query(Home(tmp_path), named(name))[1] == []


def _dropped(home, row_id, verdict, scores=()):
    """A checkout with one kept row, and another candidate of another seed with this verdict."""
    candidates = [_candidate("ab11", "my head hurts"), _candidate(row_id, "my brow hurts", seed_id="medical-0002")]
    write_rows(home.dataset("medical", "candidates.parquet"), CANDIDATES, candidates)
    write_rows(home.dataset("medical", "verdicts.parquet"), VERDICTS, [_verdict("ab11"), verdict])
    write_rows(home.dataset("medical", "train.parquet"), ROWS, [_row("ab11", "my head hurts")])
    write_rows(home.expert("medical", "scores.parquet"), SCORES, list(scores))
    home.general.parent.mkdir()
    seeds = [{"id": f"medical-000{i}", "instruction": "x", "source": "desk", "licence": "CC0"} for i in (1, 2)]
    home.seeds("medical").write_text("\n".join(map(json.dumps, seeds)))
    return home


def test_near_copies_are_found_with_what_they_are_like(tmp_path):
    near = _verdict("cd22", verdict="drop", reasons=["near_copy"], like="ab11", score=91.5)
    home = _dropped(Home(tmp_path), "cd22", near)
    found = ("medical", 91.5, "cd22", "my brow hurts", "ab11", "my head hurts")
    assert query(home, named("most-alike"))[1] == [found]
    pairs = [{"row_id": "cd22", "like": "ab11", "score": 91.5}, {"row_id": "ab11", "like": "cd22", "score": 80.0}]
    write_rows(home.dataset("medical", "pairs.parquet"), PAIRS, pairs)
    assert [row[1:3] for row in query(home, named("most-alike"))[1]] == [(91.5, "cd22"), (80.0, "ab11")]


def test_a_seed_that_gives_nothing_is_found_with_the_reasons(tmp_path):
    home = _dropped(Home(tmp_path), "cd22", _verdict("cd22", verdict="drop", reasons=["hedge", "echo"]))
    assert query(home, named("seeds-that-give-nothing"))[1] == [
        ("medical", "medical-0002", "default", 1, ["echo", "hedge"], "x")
    ]


def test_a_wrong_answer_is_found_with_its_reply(tmp_path):
    wrong = _score("expert", "tinnitus") | {"right": False}
    home = _dropped(Home(tmp_path), "cd22", _verdict("cd22"), [wrong, _score("base", "x") | {"right": False}])
    assert query(home, named("wrong-answers"))[1] == [
        ("medical", "ab22", "headache", "skull aches", "tinnitus", True, True)
    ]


def test_one_expert_s_tables_hold_nothing_of_the_others(small):
    assert query(small, "SELECT count(*) FROM candidates", "legal")[1] == [(1,)]
    assert query(small, "SELECT DISTINCT expert FROM seeds", "medical")[1] == [("medical",)]


def test_a_word_that_is_neither_sql_nor_a_name_is_told_the_nearest():
    with pytest.raises(UserError, match="did you mean rows-per-answer?(.|\n)*then see them: dmoe query --list"):
        named("rows_per_answr")
    with pytest.raises(UserError, match="^'zzz' is neither SQL nor a named query\n"):
        named("zzz")


@pytest.mark.parametrize("sql", ["SELECT 1", "FROM rows", "SELECT'a'", ""])
def test_sql_is_left_as_it_is(sql):
    assert named(sql) == sql


# -- catalogue ------------------------------------------------------------------------------------


def elsewhere(folder, code):
    """What a client of its own prints, that stands in another folder and knows nothing of dmoe."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_any_client_opens_the_catalogue_from_anywhere_and_sees_what_query_sees(small, tmp_path):
    path, views = catalogue(small)
    assert views == list(VIEWS)
    told = elsewhere(tmp_path, f"""
import duckdb, json
c = duckdb.connect({str(path)!r}, read_only=True)
print(json.dumps([[c.sql(f"SELECT count(*), count(DISTINCT expert) FROM {{v}}").fetchall()[0],
                   c.sql(f"FROM {{v}}").columns] for v in {views}]))""")  # fmt: skip
    for view, (counts, columns) in zip(views, told, strict=True):
        assert query(small, f"SELECT count(*), count(DISTINCT expert) FROM {view}")[1] == [tuple(counts)]
        assert query(small, f"FROM {view}")[0] == columns


def test_the_catalogue_s_named_queries_answer_the_same(small):
    import duckdb

    with duckdb.connect(str(catalogue(small)[0]), read_only=True) as connection:
        for name in QUERIES:
            assert connection.execute(named(name)).fetchall() == query(small, named(name))[1], name


def test_each_view_of_the_catalogue_says_what_it_holds(small):
    import duckdb

    with duckdb.connect(str(catalogue(small)[0]), read_only=True) as connection:
        told = dict(connection.sql("SELECT view_name, comment FROM duckdb_views() WHERE NOT internal").fetchall())
    assert told == VIEWS


def test_the_catalogue_follows_what_is_made_anew(tmp_path):
    import duckdb

    home = _dropped(Home(tmp_path / "it's"), "cd22", _verdict("cd22"))
    path, views = catalogue(home)
    write_rows(home.dataset("medical", "train.parquet"), ROWS, [_row("ab11", "a"), _row("cd22", "b")])
    with duckdb.connect(str(path), read_only=True) as connection:
        assert connection.sql("SELECT count(*) FROM rows").fetchall() == [(2,)]
    assert path == catalogue(home)[0] and views == [view for view in VIEWS if view != "pairs"]  # not made here


def test_without_anything_made_there_is_no_catalogue(tmp_path):
    with pytest.raises(UserError, match="nothing has been made yet\n  then run: dvc repro"):
        catalogue(Home(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_leaves_the_old_catalogue(tmp_path):
    home = _dropped(Home(tmp_path), "cd22", _verdict("cd22"))
    path = catalogue(home)[0]
    before = path.read_bytes()
    home.dataset("medical", "verdicts.parquet").write_bytes(b"half")
    with pytest.raises(UserError, match=r"datasets\.duckdb: verdicts: (.|\n)*then run: dvc repro"):
        catalogue(home)
    assert path.read_bytes() == before


# -- why ----------------------------------------------------------------------------------------


def test_why_finds_a_row_by_the_beginning_of_its_id(small):
    told = dict(why(small, "ab2"))
    assert told["row_id"] == "ab22" and told["seed"] == "skull aches" and told["split"] == "holdout"
    assert told["base replied"] == "a head thing (3 tokens)"
    assert told["expert replied"] == "cephalalgia it is (3 tokens)"


def test_why_says_what_a_fallen_row_is_like(small):
    told = dict(why(small, "ab12"))
    assert (told["verdict"], told["reasons"]) == ("drop", "echo, exact_copy")
    assert (told["detail"], told["like_instruction"]) == ("100.0 like ab11", "my head hurts")


def test_why_leaves_out_what_is_not_known(small):
    told = dict(why(small, "cd33"))
    assert told["sample"] == "1" and not {"verdict", "seed", "reasons", "expert replied"} & set(told)


@pytest.mark.parametrize(
    ("row_id", "words"),
    [("ab", "ab: 3 rows begin with it"), ("ab1", "ab1: 2 rows"), ("zz", "zz: no row begins"), ("ab%", "no row begins")],
)
def test_an_id_of_several_rows_or_of_none_is_told_with_the_cure(small, row_id, words):
    with pytest.raises(UserError, match=f"^(.|\n)*{words}(.|\n)*then find it: dmoe query"):
        why(small, row_id)


def test_an_id_is_never_sql(small):
    with pytest.raises(UserError, match="no row begins"):
        why(small, "' OR true --")


# -- print_rows ---------------------------------------------------------------------------------

SQL = "SELECT row_id, reasons, score, DATE '2026-11-02' AS day, NULL AS none FROM verdicts ORDER BY 1 LIMIT 2"


def test_rows_are_printed_as_csv(small, capsys):
    print_rows(*query(small, "SELECT row_id, instruction || ', \"\u00fc\"' FROM candidates ORDER BY 1 LIMIT 2"), "csv")
    printed = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert printed[1:] == [["ab11", 'my head hurts, "\u00fc"'], ["ab12", 'my head hurts!, "\u00fc"']]


def test_rows_are_printed_as_json(small, capsys):
    print_rows(*query(small, SQL), "json")
    assert json.loads(capsys.readouterr().out) == [
        {"row_id": "ab11", "reasons": [], "score": 0.0, "day": "2026-11-02", "none": None},
        {"row_id": "ab12", "reasons": ["echo", "exact_copy"], "score": 100.0, "day": "2026-11-02", "none": None},
    ]


def test_no_rows_are_an_empty_json_list_and_a_csv_header(small, capsys):
    for style, printed in (("json", "[]\n"), ("csv", "a\n")):
        print_rows(*query(small, "SELECT 1 AS a WHERE false"), style)
        assert capsys.readouterr().out == printed


def test_rows_are_printed_as_a_table_that_shows_brackets_as_they_are(small, capsys):
    print_rows(*query(small, "SELECT '[bold]x[/bold]' AS a, ['echo', 'form'] AS b, NULL AS c"), "table")
    printed = capsys.readouterr().out
    assert "[bold]x[/bold]" in printed and "echo, form" in printed and "None" not in printed
