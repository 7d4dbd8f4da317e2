"""Reading and writing of files: whole or not at all, equal input to equal bytes, errors with a place."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import Problem, Problems, UserError, relative
from factory.yaml12 import parse_yaml

if TYPE_CHECKING:
    import pyarrow as pa


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place when the block ends well.

    The temporary is a file or a folder, whichever the block makes. A kill leaves the old artefact
    and perhaps a `.tmp-` beside it, which the next writer of the same artefact removes.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".tmp-{path.name}-*"):
            if not path.exists() and (stale / f"old-{path.name}").exists():  # killed between the two renames
                (stale / f"old-{path.name}").rename(path)
            _remove(stale)
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
        target, old = temporary / path.name, temporary / f"old-{path.name}"
        yield target
        if path.is_dir():
            path.rename(old)
        try:
            os.replace(target, path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    except OSError as error:
        raise UserError(f"{relative(path)}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary:
            _remove(temporary)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Writes JSON in key order with a newline at its end, so that diffs are small."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """UTF-8 text of a file that a person edits.

    Raises:
        UserError: the file is missing or not UTF-8, with the line where it goes wrong.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Problems([Problem(relative(path), 0, "", "there is no such file")]) from None
    except OSError as error:
        raise UserError(f"{relative(path)}: cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = Problem(relative(path), line, "", f"not UTF-8 at byte {error.start}; save it as UTF-8")
        raise Problems([problem]) from None


def read_yaml(path: Path) -> Any:
    """A YAML 1.2 file; see yaml12.parse_yaml."""
    return parse_yaml(read_text(path), relative(path))


def read_json(path: Path) -> Any:
    """A JSON file that a stage wrote."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{relative(path)}:{error.lineno}: not JSON: {error.msg}") from None


def write_parquet(path: Path, table: "pa.Table") -> None:
    """Writes one parquet file; equal tables give equal bytes (no time, no host, one thread)."""
    import pyarrow.parquet as pq

    with whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_statistics=True)


def need(path: Path, made_by: str) -> Path:
    """`path`, which must be there.

    Raises:
        UserError: it is not, and `made_by`, the command that makes it.
    """
    if not path.exists():
        raise UserError(f"{relative(path)}: there is no such file\n  then run: {made_by}")
    return path


def read_parquet(path: Path, made_by: str) -> "pa.Table":
    """One parquet file.

    Raises:
        UserError: the file is missing (and `made_by`, the command that makes it) or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    need(path, made_by)
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{relative(path)}: damaged parquet ({error})\n  then run: {made_by}") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files in order of name, as hex."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            if path.is_dir():
                digest.update(str(file.relative_to(path)).encode() + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by `make(temporary)` if it is not there yet."""
    if not path.exists():
        with whole(path) as temporary:
            make(temporary)
    return path
