"""A package's files, out of a tar or a folder that a stranger made: which may be there, how large, whether all are.

Nothing here is trusted and nothing native looks at it. The tar is read by our own code: a package needs names, sizes
and bytes. Whatever else a tar can hold (links, devices, sparse files, extended headers) is refused, not interpreted.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from factory.errors import UserError, relative, shown

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SUMS, SIGNATURE, PUBLISHER = "SHA256SUMS", "signature.json", "publisher.pub"
LARGEST = {  # every file that a package may hold, and the most bytes of it
    "README.md": MIB, "SHA256SUMS": 16 * KIB, "adapter.gguf": 4 * GIB, "adapter/README.md": MIB,
    "adapter/adapter_config.json": 64 * KIB, "adapter/adapter_model.safetensors": 4 * GIB, "audit.json": 4 * MIB,
    "eval.json": 4 * MIB, "gate.json": MIB, "manifest.json": 256 * KIB, "parity.json": MIB, "publisher.pub": 4 * KIB,
    "route.safetensors": 64 * MIB, "scores.parquet": 64 * MIB, "signature.json": 64 * KIB, "template.json": 512 * KIB,
}  # fmt: skip
OPTIONAL = {"adapter/README.md", "route.safetensors", SIGNATURE, PUBLISHER}
UNLISTED = {SUMS, SIGNATURE, PUBLISHER}  # a signature is of the sums too, so they cannot hold its own
OF_HUBS = {".git", ".gitattributes", ".cache"}  # what a clone or a download leaves in a folder; never copied
BLOCK, MOST_MEMBERS = 512, 64
KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
    b"S": "a sparse file", b"x": "an extended header", b"g": "an extended header", b"L": "an extended header",
    b"K": "an extended header",
}  # fmt: skip
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")
PROGRAMS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".py", ".so", ".sh")
PICKLED = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")  # pickle itself, and torch's zip of pickles


def copied(source: Path, into: Path) -> str | None:
    """Copies the files of the tar or folder `source` into the empty folder `into`; returns the folder's name in a tar.

    Raises:
        UserError: a name, kind or size that no package has, or it cannot be read.
    """
    where = relative(source)
    (into / "adapter").mkdir()
    try:
        if source.is_dir():
            _from_folder(source, into, where)
            return None
        with source.open("rb") as stream:
            return _from_tar(stream, into, where)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror or error}") from None


def _known(name: str, where: str) -> str:
    """The name of a file inside the package, if it is one of a package's."""
    if name in LARGEST:
        return name
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise UserError(f"{where}: {shown(name)} leads out of the package; do not use it")
    if name.lower().endswith(PROGRAMS):
        raise UserError(f"{where}: {shown(name)} can hold a program; a package is data only, do not use it")
    raise UserError(f"{where}: {shown(name)} is no file of a package; take it out, or do not use it")


# -- a folder -------------------------------------------------------------------------------------


def _from_folder(source: Path, into: Path, where: str) -> None:
    for folder in (source, source / "adapter"):
        with os.scandir(folder) as entries:
            for entry in entries:
                if folder == source and entry.name in OF_HUBS:
                    continue
                name = entry.name if folder == source else f"adapter/{entry.name}"
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISLNK(mode) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise UserError(f"{where}: {shown(name)} is a link or no plain file; put the file itself there")
                if not (name == "adapter" and stat.S_ISDIR(mode)):
                    _take_file(folder / entry.name, into / _known(name, where), LARGEST[name], f"{where}: {name}")


def _take_file(source: Path, target: Path, most: int, where: str) -> None:
    """Opened so that what was a plain file a moment ago cannot have become a link or a pipe."""
    with open(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise UserError(f"{where}: is no plain file, or larger than {most:,} bytes")
        _take(stream, target, found.st_size, where)


def _take(stream: BinaryIO, target: Path, size: int, where: str) -> None:
    with target.open("xb") as out:
        while size:
            block = stream.read(min(size, MIB))
            if not block:
                raise UserError(f"{where}: is cut off; get it again")
            size -= out.write(block)


# -- a tar ----------------------------------------------------------------------------------------


def _from_tar(stream: BinaryIO, into: Path, where: str) -> str:
    tops: set[str] = set()
    seen: set[str] = set()
    for full, kind, size in _entries(stream, where):
        top, _, name = full.partition("/")
        tops.add(top)
        if kind == b"5" and name in ("", "adapter", "adapter/") and not size:
            continue
        if kind not in (b"0", b"\0"):
            raise UserError(
                f"{where}: {shown(full)} is {KINDS.get(kind, 'no plain file')}; a package has plain files only"
            )
        if full.startswith("/") or top in ("..", ".", "") or len(tops) > 1:
            raise UserError(f"{where}: {shown(full)} leads out of the package's one folder; do not use it")
        if _known(name, where) in seen:
            raise UserError(f"{where}: {name} is there twice; do not use it")
        if size > LARGEST[name]:
            raise UserError(f"{where}: {name} has {size:,} bytes, more than the {LARGEST[name]:,} that it may have")
        seen.add(name)
        _take(stream, into / name, size, f"{where}: {name}")
        if any(stream.read(-size % BLOCK)):
            raise UserError(f"{where}: {name}: has data behind its end; do not use it")
    return "".join(tops)


def _entries(stream: BinaryIO, where: str) -> Iterator[tuple[str, bytes, int]]:
    """(name, kind, size) of each entry, the stream at its data; whoever asks reads that, and its padding."""
    for _ in range(MOST_MEMBERS):
        block = stream.read(BLOCK)
        if block.startswith(COMPRESSED):
            raise UserError(
                f"{where}: is compressed; a package is a plain tar\n  then run: unpack it, and give the tar"
            )
        if len(block) < BLOCK:
            raise UserError(f"{where}: the tar is cut off; get it again")
        if not any(block):
            return _refuse_rest(stream, where)
        yield _header(block, where)
    raise UserError(f"{where}: holds more than {MOST_MEMBERS} entries; no package does")


def _refuse_rest(stream: BinaryIO, where: str) -> None:
    while block := stream.read(MIB):
        if any(block):
            raise UserError(f"{where}: has data behind the tar's end; do not use it")


def _header(block: bytes, where: str) -> tuple[str, bytes, int]:
    digits, told = block[124:136].rstrip(b"\0 "), block[148:156].strip(b"\0 ")
    sound = all(re.fullmatch(rb"[0-7]{1,11}", number) for number in (digits, told))
    if block[257:262] != b"ustar" or not sound or int(told, 8) != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise UserError(f"{where}: is no package: neither a folder nor a sound tar")
    prefix = b"" if block[257:265] == b"ustar  \0" else block[345:500]  # GNU keeps times there
    parts = [part.partition(b"\0")[0] for part in (prefix, block[:100])]
    name = b"/".join(part for part in parts if part)
    return name.decode("ascii", "backslashreplace"), block[156:157], int(digits, 8)


# -- whole, and nothing else ------------------------------------------------------------------------


def check_sums(folder: Path, where: str) -> str:
    """Holds every file against SHA256SUMS; returns the SHA-256 of that file, which names the package.

    Raises:
        UserError: a file is missing, not listed, or another one.
    """
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if missing := sorted(LARGEST.keys() - OPTIONAL - there):
        raise UserError(f"{where}: {missing[0]} is missing; get the package again")
    data = (folder / SUMS).read_bytes()
    listed: dict[str, str] = {}
    for line in data.decode("ascii", "backslashreplace").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if not found or found[2] in listed:
            raise UserError(f"{where}: {SUMS}: {shown(line)} is no line of it, or there twice; get the package again")
        listed[found[2]] = found[1]
    if odd := sorted(listed.keys() ^ (there - UNLISTED)):
        what = "is listed and not there" if odd[0] in listed else "is not listed"
        raise UserError(f"{where}: {SUMS}: {shown(odd[0])} {what}; get the package again")
    for name, digest in sorted(listed.items()):
        _check_file(folder / name, digest, f"{where}: {name}")
    return hashlib.sha256(data).hexdigest()


def _check_file(path: Path, digest: str, where: str) -> None:
    with path.open("rb") as stream:
        if PICKLED.match(stream.read(4)):
            raise UserError(f"{where}: is a pickle or an archive, whatever its name; do not use it")
        stream.seek(0)
        if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
            raise UserError(f"{where}: is not the file that {SUMS} lists; get the package again")
