"""GGUF files read by our own strict code: metadata and tensor infos, never more of it in memory than the file holds.

For files of strangers, before llama.cpp sees them, and for what a base is: its architecture, shapes, tokenizer.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from factory.errors import UserError, relative, shown

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
LARGEST_HEADER = 256 << 20  # bytes; of a base with a large vocabulary
TOKENIZER = ("model", "pre", "tokens", "merges")  # what decides which numbers a text becomes
SAMPLES, SAMPLE = 256, 4096  # blocks, bytes


@dataclass(frozen=True)
class Tensor:
    """One tensor's info: `shape` as GGUF counts (columns first), `kind` a ggml type, `offset` from the data's start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """The header of one file; `data` is where its tensors' bytes start."""

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: list[Tensor]
    data: int
    alignment: int


class _Reader:
    """The first bytes of a file, at most `most` of them."""

    def __init__(self, stream: BinaryIO, most: int, where: str) -> None:
        self.stream, self.left, self.where, self.done = stream, most, where, 0

    def take(self, count: int) -> bytes:
        data = self.stream.read(count) if count <= self.left else b""
        if len(data) < count:
            raise UserError(f"{self.where}: its GGUF header is cut off, or larger than is allowed; get it again")
        self.left, self.done = self.left - count, self.done + count
        return data

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise UserError(f"{self.where}: GGUF metadata of an unknown type, {kind}")
        item, count = self.number("I"), self.number("Q")
        if item == TEXT:
            return [self.text() for _ in range(count)]
        if item not in NUMBERS:
            raise UserError(f"{self.where}: GGUF metadata: a list of an unknown type, {item}")
        width = struct.calcsize(NUMBERS[item])
        data = self.take(count * width)  # refused before a list of this length is made
        return list(struct.unpack(f"<{len(data) // width}{NUMBERS[item]}", data))


def read_gguf(path: Path, most: int = LARGEST_HEADER, where: str = "") -> Gguf:
    """The header of a little-endian GGUF file of version 2 or 3; `most` bytes of it are read. Errors call it `where`.

    Raises:
        UserError: it cannot be read, is no GGUF file, is cut off, or names anything twice.
    """
    where = where or relative(path)
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            reader = _Reader(stream, min(most, size), where)
            if reader.take(4) != b"GGUF" or reader.number("I") not in (2, 3):
                raise UserError(f"{where}: is not a GGUF file of version 2 or 3; make it again")
            count, keys = reader.number("Q"), reader.number("Q")
            metadata = _metadata(reader, keys)
            tensors = _tensors(reader, count)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 4096 or alignment & (alignment - 1):
        raise UserError(f"{where}: general.alignment: {shown(alignment)} is no power of two from 8 to 4096")
    return Gguf(path, size, metadata, tensors, reader.done + -reader.done % alignment, alignment)


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = reader.text()
        if key in found:
            raise UserError(f"{reader.where}: GGUF metadata: {shown(key)} is there twice")
        found[key] = reader.value(reader.number("I"))
    return found


def _tensors(reader: _Reader, count: int) -> list[Tensor]:
    found: dict[str, Tensor] = {}
    for _ in range(count):
        name, dimensions = reader.text(), reader.number("I")
        if name in found or not 1 <= dimensions <= 4:
            raise UserError(f"{reader.where}: tensor {shown(name)} is there twice, or has {dimensions} dimensions")
        shape = tuple(reader.number("Q") for _ in range(dimensions))
        found[name] = Tensor(name, shape, reader.number("I"), reader.number("Q"))
    return list(found.values())


@dataclass(frozen=True)
class Base:
    """What an adapter must fit, and what it was measured on. Hashes are SHA-256, as hex."""

    file: str
    architecture: str
    tokenizer: str
    chat_template: str
    weights: str  # of all tensors' infos and of blocks from all over the file
    shapes: dict[str, tuple[int, ...]]

    def facts(self) -> dict[str, str]:
        """What a manifest tells of it."""
        return {key: value for key, value in vars(self).items() if key != "shapes"}


def read_base(path: Path) -> Base:
    """What a base's GGUF file says of itself.

    Raises:
        UserError: see read_gguf; or it names no architecture.
    """
    found = read_gguf(path)
    architecture = found.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise UserError(f"{relative(path)}: general.architecture is missing; get the base's GGUF again")
    tokenizer = [found.metadata.get(f"tokenizer.ggml.{key}") for key in TOKENIZER]
    template = found.metadata.get("tokenizer.chat_template")
    shapes = {tensor.name: tensor.shape for tensor in found.tensors}
    return Base(path.name, architecture, _hash(tokenizer), _hash(template), _sampled(found), shapes)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _sampled(found: Gguf) -> str:
    """A hash of a file of any size in a blink; not meant to stand against somebody who picks the blocks."""
    digest = hashlib.sha256(repr(sorted(map(repr, found.tensors))).encode())
    with found.path.open("rb") as stream:
        for i in range(SAMPLES):
            stream.seek(found.data + (found.size - found.data) * i // SAMPLES)
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
