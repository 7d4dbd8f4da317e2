"""The replies that were paid for: content-addressed, kept for ever, one SQLite file.

The key is a hash of all that a reply depends on, so an equal request is never sent twice, by
whomever and whenever. Concurrency, time-outs and the server's address are no part of it. A reply is
committed before it counts: a kill costs the requests in flight. The journal is synced at
checkpoints alone, so a power cut may cost the last seconds' replies as well, never the file.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Self

from factory.errors import UserError, relative


@dataclass(frozen=True)
class Kept:
    """One kept reply, as the server sent it."""

    key: str
    expert: str
    seed_id: str
    model: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


COLUMNS = [f"{f.name} {'INTEGER' if f.type is int else 'TEXT'} NOT NULL" for f in fields(Kept)]
NAMES = ", ".join(f.name for f in fields(Kept))
SLOTS = ", ".join("?" for _ in fields(Kept))
TABLE = f"CREATE TABLE IF NOT EXISTS replies ({', '.join(COLUMNS)}, hits INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (key))"


def key_of(parts: object) -> str:
    """SHA-256 of `parts` in canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Cache:
    """The replies of one checkout. Safe with several processes; one connection, one thread each.

    Raises:
        UserError: the file is damaged or may not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(TABLE)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{relative(path)}: cannot be used as a cache: {error}; move it away") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def get(self, key: str) -> Kept | None:
        """The reply kept under `key`."""
        row = self._db.execute(f"SELECT {NAMES} FROM replies WHERE key = ?", (key,)).fetchone()
        return Kept(*row) if row else None

    def put(self, replies: Iterable[Kept]) -> None:
        """Keeps replies, in one transaction; a key that is there already stays as it is."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(f"INSERT OR IGNORE INTO replies ({NAMES}) VALUES ({SLOTS})", map(astuple, replies))
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise UserError(f"{relative(self.path)}: a reply cannot be kept: {error}") from None

    def hit(self, keys: Iterable[str]) -> None:
        """Counts one more use of each of `keys`, in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("UPDATE replies SET hits = hits + 1 WHERE key = ?", [(key,) for key in keys])
        self._db.execute("COMMIT")

    def summary(self) -> list[tuple[str, str, int, int, int, int, int]]:
        """Per expert and model: replies, hits, prompt tokens, completion tokens, bytes of text."""
        return self._db.execute(
            "SELECT expert, model, count(*), sum(hits), sum(prompt_tokens), sum(completion_tokens), "
            "sum(length(CAST(text AS BLOB))) FROM replies GROUP BY expert, model ORDER BY expert, model"
        ).fetchall()

    def keys(self) -> dict[str, int]:
        """The keys of all replies, and the tokens that each has cost."""
        return dict(self._db.execute("SELECT key, prompt_tokens + completion_tokens FROM replies").fetchall())

    def remove(self, keys: Iterable[str]) -> None:
        """Removes replies for ever, and gives their room back to the disk."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("DELETE FROM replies WHERE key = ?", [(key,) for key in keys])
        self._db.execute("COMMIT")
        self._db.execute("VACUUM")
