"""`dmoe query`, `dmoe why` and `dmoe catalogue`: DuckDB over everything the factory has made, read-only."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import Problem, Problems, UserError, relative
from factory.paths import Home
from factory.queries import QUERIES
from factory.schema import CANDIDATES, PAIRS, ROWS, SCORES, VERDICTS
from factory.store import read_text, whole

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

VIEWS = {  # name -> what it holds
    "candidates": "one reply of a teacher, or what failed",
    "verdicts": "what was decided on each candidate, and all reasons",
    "pairs": "questions of one answer that are alike, and how much",
    "rows": "what was kept: the dataset, with its split",
    "seeds": "the hand-written questions, with those of general.jsonl",
    "scores": "a reply to a held-out question, by the base or the expert, measured",
}


def connect(home: Home, expert: str | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory database with one view a table, of all experts or one, that can neither write nor read a file."""
    import duckdb
    import pyarrow.compute as pc

    connection = duckdb.connect(":memory:")
    for name, table in _tables(home).items():
        connection.register(name, table.filter(pc.field("expert") == expert) if expert else table)
    connection.execute("SET enable_external_access = false; SET lock_configuration = true")
    return connection


def _tables(home: Home) -> dict[str, pa.Table]:
    import pyarrow as pa

    def parquet(schema: pa.Schema, *patterns: str, split: bool = False) -> pa.Table:
        files = sorted(path for pattern in patterns for path in home.root.glob(pattern))
        parts = [_with_names(path, _read(path), split) for path in files]
        parts = parts or [_with_names(home.root, schema.empty_table(), split)]
        return pa.concat_tables(parts, promote_options="default")

    return {
        "candidates": parquet(CANDIDATES.arrow(), "datasets/*/candidates.parquet"),
        "verdicts": parquet(VERDICTS.arrow(), "datasets/*/verdicts.parquet"),
        "pairs": parquet(PAIRS.arrow(), "datasets/*/pairs.parquet"),
        "rows": parquet(ROWS.arrow(), "datasets/*/train.parquet", "datasets/*/holdout.parquet", split=True),
        "scores": parquet(SCORES.arrow(), "experts/*/scores.parquet"),
        "seeds": _seeds(home),
    }


def _read(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{relative(path)}: damaged parquet ({error})\n  then run: dvc repro") from None


def _with_names(path: Path, table: pa.Table, split: bool) -> pa.Table:
    """One file's rows, with the expert (its folder) and, for dataset rows, the split (its name) in front."""
    import pyarrow as pa

    if split:
        table = table.add_column(0, "split", pa.array([path.stem] * len(table), pa.string()))
    if "expert" not in table.schema.names:
        table = table.add_column(0, "expert", pa.array([path.parent.name] * len(table), pa.string()))
    return table


SEED_COLUMNS = ("expert", "id", "instruction", "answer", "source", "licence")


def _seeds(home: Home) -> pa.Table:
    import pyarrow as pa

    rows = []
    for path in sorted(home.general.parent.glob("*.jsonl")):
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                rows.append({"answer": "default", **_seed(path, number, line), "expert": path.stem})
    return pa.Table.from_pylist(
        [{c: row.get(c) for c in SEED_COLUMNS} for row in rows], pa.schema([(c, pa.string()) for c in SEED_COLUMNS])
    )


def _seed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        seed: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise Problems([Problem(relative(path), number, "", f"not JSON: {error.msg}")]) from None
    return seed


def named(text: str) -> str:
    """The SQL of a named query; any other text as it is.

    Raises:
        UserError: one word that is neither; it names the nearest.
    """
    if text in QUERIES:
        return QUERIES[text][1]
    if re.fullmatch(r"[\w-]+", text.strip()):
        near = difflib.get_close_matches(text.strip().replace("_", "-"), QUERIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{text.strip()!r} is neither SQL nor a named query{hint}\n  then see them: dmoe query --list")
    return text


def query(home: Home, sql: str, expert: str | None = None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(column names, rows) of one SQL statement, over all experts or one.

    Raises:
        UserError: DuckDB's own first line about what is wrong with it.
    """
    import duckdb

    try:
        result = connect(home, expert).execute(sql)
        if result is None:  # what DuckDB returns for no statement at all
            raise UserError(f"query: there is no statement\n  tables are {', '.join(VIEWS)}")
        return [column[0] for column in result.description or []], result.fetchall()
    except duckdb.Error as error:
        first = str(error).split("\n\n")[0].strip().replace("\n", " ")
        raise UserError(f"query: {first}\n  tables are {', '.join(VIEWS)}") from None


def catalogue(home: Home) -> tuple[Path, list[str]]:
    """Writes datasets.duckdb: the same views over the files themselves; returns its path and the views.

    A view's path is resolved from where the client stands, so paths are absolute: the catalogue opens from any
    folder, and is made again when the checkout moves. A table of which no file is there has no view yet.

    Raises:
        UserError: nothing has been made.
    """
    import duckdb

    found = {name: sql for name, sql in _views(home).items() if sql}
    if not found.keys() - {"seeds"}:
        raise UserError("datasets: nothing has been made yet\n  then run: dvc repro")
    path = home.root / "datasets.duckdb"
    with whole(path) as temporary, duckdb.connect(str(temporary)) as connection:
        for name, sql in found.items():
            try:
                connection.execute(f"CREATE VIEW {name} AS {sql}")
            except duckdb.Error as error:
                first = str(error).split("\n")[0]
                raise UserError(f"datasets.duckdb: {name}: {first}\n  then run: dvc repro") from None
            connection.execute(f"COMMENT ON VIEW {name} IS '{VIEWS[name]}'")
    return path, list(found)


def _views(home: Home) -> dict[str, str]:
    """Name -> the SELECT of its view; empty where no file is there."""
    folder, stem = "split_part(filename, '/', -2) AS expert", "parse_filename(filename, true)"
    plain = "* EXCLUDE (filename)"

    def parquet(columns: str, *patterns: str) -> str:
        files = _files(home, *patterns)
        return f"SELECT {columns} FROM read_parquet([{files}], filename = true)" if files else ""

    kinds = ", ".join(f"{name}: 'VARCHAR'" for name in SEED_COLUMNS[1:])
    seeds = _files(home, "seeds/*.jsonl")
    return {
        "candidates": parquet(plain, "datasets/*/candidates.parquet"),
        "verdicts": parquet(f"{folder}, {plain}", "datasets/*/verdicts.parquet"),
        "pairs": parquet(f"{folder}, {plain}", "datasets/*/pairs.parquet"),
        "rows": parquet(
            f"{folder}, {stem} AS split, {plain}", "datasets/*/train.parquet", "datasets/*/holdout.parquet"
        ),
        "seeds": f"SELECT {stem} AS expert, id, instruction, coalesce(answer, 'default') AS answer, source, licence "
        f"FROM read_json([{seeds}], format = 'newline_delimited', columns = {{{kinds}}}, filename = true)"
        if seeds
        else "",
        "scores": parquet(f"{folder}, {plain}", "experts/*/scores.parquet"),
    }


def _files(home: Home, *patterns: str) -> str:
    """The files of `patterns`, absolute, as DuckDB reads a list of texts."""
    paths = sorted(path.resolve().as_posix() for pattern in patterns for path in home.root.glob(pattern))
    return ", ".join("'" + path.replace("'", "''") + "'" for path in paths)


def why(home: Home, row_id: str) -> list[tuple[str, str]]:
    """What happened to one row, from its seed to its verdict and its replies, as (name, value) pairs.

    Raises:
        UserError: no row, or several, begin with `row_id`.
    """
    columns, rows = _named(home, CANDIDATE_SQL, [row_id])
    if len(rows) != 1:
        found = f"{len(rows)} rows begin" if rows else "no row begins"
        cure = 'dmoe query "SELECT row_id, instruction FROM candidates"'
        raise UserError(f"{row_id}: {found} with it; give one row's id\n  then find it: {cure}")
    row = dict(zip(columns, rows[0], strict=True))
    told = [(name, str(value)) for name, value in row.items() if value not in (None, "", [])]
    columns, rows = _named(home, REPLY_SQL, [row["row_id"]])
    return told + [(f"{arm} replied", f"{reply} ({tokens} tokens)") for arm, reply, tokens in rows]


def _named(home: Home, sql: str, values: list[str]) -> tuple[list[str], list[tuple[Any, ...]]]:
    result = connect(home).execute(sql, values)
    return [column[0] for column in result.description or []], result.fetchall()


CANDIDATE_SQL = """
SELECT c.row_id, c.expert, c.seed_id, s.instruction AS seed, s.source, s.licence, c.split, c.answer, c.teacher,
       c.sample, c.instruction, c.output, c.form, v.tokens, v.verdict, array_to_string(v.reasons, ', ') AS reasons,
       v.detail, l.instruction AS like_instruction
FROM candidates c
LEFT JOIN seeds s ON s.expert = c.expert AND s.id = c.seed_id
LEFT JOIN verdicts v ON v.row_id = c.row_id
LEFT JOIN candidates l ON l.row_id = v."like"
WHERE starts_with(c.row_id, ?) LIMIT 5
"""
REPLY_SQL = "SELECT arm, reply, tokens FROM scores WHERE row_id = ? AND panel = 'claim' ORDER BY arm"
