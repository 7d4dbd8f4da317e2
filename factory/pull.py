"""`dmoe pull-request`: takes a reviewer's pull request as data, and refuses one that holds anything else.

.github/workflows/review.yml runs it in a checkout of the base, whose code alone runs. What the pull request
says is read from git's objects: no path, link or attribute of it is followed.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from factory.errors import UserError
from factory.paths import Home, read_params
from factory.store import whole

LARGEST = 1 << 20
GONE, PLAIN = "000000", "100644"  # git's modes: no file, a file that cannot be run
ALLOWED = re.compile(r"(?:templates/([a-z][a-z0-9_]*)\.yaml|seeds/([a-z][a-z0-9_]*)\.jsonl|params\.yaml)")


@dataclass(frozen=True)
class Change:
    """A path that a pull request adds, edits or removes."""

    path: str
    mode: str
    blob: str


def take(home: Home, repo: Path) -> list[str]:
    """Writes what HEAD of `repo`, a merge commit, changes on its first parent into `home`, a checkout of that parent.

    Returns the experts whose template or seeds changed. `home` is to be thrown away where it fails.

    Raises:
        UserError: the pull request changes anything but templates, seeds and the experts of params.yaml.
    """
    changes = list(_changes(repo))
    if wrong := [f"  {ascii(change.path)}: {why}" for change in changes if (why := _refusal(repo, change))]:
        more = [f"  ... and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        head = "the pull request holds more than templates, seeds and experts; see docs/reviewing.md, The pull request"
        raise UserError("\n".join([head, *wrong[:20], *more]))
    before = read_params(home)
    for change in changes:
        _write(home.root / change.path, repo, change)
    after = read_params(home)
    if replace(after, experts=before.experts) != before:
        raise UserError("params.yaml: a reviewer's pull request changes `experts` alone; undo the rest")
    named = {name for c in changes if (match := ALLOWED.fullmatch(c.path)) for name in match.groups() if name}
    return [name for name in after.experts if name in named]


def _git(repo: Path, *words: str) -> bytes:
    done = subprocess.run(["git", "-C", str(repo), *words], capture_output=True)
    if done.returncode:
        raise UserError(f"git {words[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _changes(repo: Path) -> Iterator[Change]:
    raw = _git(repo, "diff", "--raw", "-z", "--no-renames", "--no-abbrev", "HEAD^1", "HEAD")
    parts = raw.decode("utf-8", "surrogateescape").split("\0")
    for told, path in zip(parts[::2], parts[1::2], strict=False):
        _, mode, _, blob, _ = told.split()
        yield Change(path, mode, blob)


def _refusal(repo: Path, change: Change) -> str:
    """Why a change is not taken; "" where it is."""
    if not ALLOWED.fullmatch(change.path):
        return "is no template, no seeds file and not params.yaml"
    if change.mode == GONE:
        return "may not be removed" if change.path == "params.yaml" else ""
    if change.mode != PLAIN:
        return "is a link, a submodule or a program, not a plain file"
    size = int(_git(repo, "cat-file", "-s", change.blob))
    return f"has {size:,} bytes; {LARGEST:,} are the most" if size > LARGEST else ""


def _write(path: Path, repo: Path, change: Change) -> None:
    if change.mode == GONE:
        path.unlink()
        return
    with whole(path) as temporary:
        temporary.write_bytes(_git(repo, "cat-file", "blob", change.blob))
