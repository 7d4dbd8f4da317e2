"""`dmoe query` and `dmoe why`: DuckDB over everything the factory has made, read-only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import Problem, Problems, UserError, relative
from factory.paths import Home
from factory.schema import CANDIDATES, ROWS, SCORES, VERDICTS
from factory.store import read_text

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

VIEWS = ("candidates", "verdicts", "rows", "seeds", "scores")


def connect(home: Home) -> duckdb.DuckDBPyConnection:
    """An in-memory database with one view a table, of all experts, that can neither write nor read a file."""
    import duckdb

    connection = duckdb.connect(":memory:")
    for name, table in _tables(home).items():
        connection.register(name, table)
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


def _seeds(home: Home) -> pa.Table:
    import pyarrow as pa

    columns = ("expert", "id", "instruction", "answer", "source", "licence")
    rows = []
    for path in sorted(home.general.parent.glob("*.jsonl")):
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                rows.append({"answer": "default", **_seed(path, number, line), "expert": path.stem})
    return pa.Table.from_pylist(
        [{c: row.get(c) for c in columns} for row in rows], pa.schema([(c, pa.string()) for c in columns])
    )


def _seed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        seed: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise Problems([Problem(relative(path), number, "", f"not JSON: {error.msg}")]) from None
    return seed


def query(home: Home, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(column names, rows) of one SQL statement.

    Raises:
        UserError: DuckDB's own first line about what is wrong with it.
    """
    import duckdb

    try:
        result = connect(home).execute(sql)
        if result is None:  # what DuckDB returns for no statement at all
            raise UserError(f"query: there is no statement\n  tables are {', '.join(VIEWS)}")
        return [column[0] for column in result.description or []], result.fetchall()
    except duckdb.Error as error:
        first = str(error).split("\n\n")[0].strip().replace("\n", " ")
        raise UserError(f"query: {first}\n  tables are {', '.join(VIEWS)}") from None


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
REPLY_SQL = "SELECT arm, reply, tokens FROM scores WHERE row_id = ? ORDER BY arm"
