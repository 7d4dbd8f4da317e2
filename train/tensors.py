"""Weights on their way from safetensors to GGUF: one tensor at a time, so that memory holds a tensor, not a file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from factory.errors import UserError, relative

NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # numpy has no bfloat16


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a safetensors file: `start` is its first byte there."""

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Planned:
    """A tensor that a GGUF file is to hold: `make` reads its float values, `kind` names GGUF's type ("F32", "Q8_0")."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]
    source: str  # file and tensor, for an error


def stored(file: Path) -> list[Stored]:
    """The tensors of a safetensors file in order of name, from its header alone.

    Raises:
        UserError: there is no such file, it is damaged, or it holds a type other than floats.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):  # checks the header against the file's length; the values are not looked at
            pass
    except FileNotFoundError:
        raise UserError(f"{relative(file)}: there is no such file") from None
    except SafetensorError as error:
        raise UserError(f"{relative(file)}: damaged safetensors ({error})") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in NUMPY:
            raise UserError(f"{relative(file)}: tensor {name} is {entry['dtype']}, not F16, BF16 or F32")
    return [
        Stored(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in sorted(header.items())
    ]


def read(tensor: Stored) -> np.ndarray:
    """Its values, float16 or float32 in its shape; bfloat16 is the upper half of a float32 and becomes one."""
    count = int(np.prod(tensor.shape))
    values = np.fromfile(tensor.file, NUMPY[tensor.kind], count, offset=tensor.start)
    if tensor.kind == "BF16":
        values = values.astype(np.uint32)
        values <<= 16
        values = values.view(np.float32)
    return values.reshape(tensor.shape)


def write(writer: Any, tensors: Sequence[Planned]) -> None:
    """Writes the file of a GGUFWriter whose metadata is complete, and closes it.

    Raises:
        UserError: a tensor holds NaN or infinity, or does not fit into its type.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    for planned in tensors:
        kind = GGMLQuantizationType[planned.kind]
        size = int(np.prod(quant_shape_to_byte_shape(planned.shape, kind)))
        writer.add_tensor_info(planned.name, planned.shape, np.float32, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for planned in tensors:
            writer.write_tensor_data(_encoded(planned))
    finally:
        writer.close()


def _encoded(planned: Planned) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind, values = GGMLQuantizationType[planned.kind], planned.make()
    with np.errstate(all="ignore"):  # what overflows is found and told by name
        made: np.ndarray = quantize(np.ascontiguousarray(values), kind)
        if np.isfinite(dequantize(made, kind)).all():
            return made
    if np.isfinite(values).all():
        raise UserError(f"{planned.source} does not fit into {planned.kind.lower()}; use a wider type")
    raise UserError(f"{planned.source} holds NaN or infinity; train again at a lower rate")
