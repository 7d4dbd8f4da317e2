"""Whether a stranger's adapter is sound and fits the base: its GGUF, its PEFT folder, and that both are one adapter.

Pure Python and NumPy, one tensor in memory at a time. llama.cpp serves NaN weights and an infinite alpha with status
200, and one adapter that it cannot load refuses the whole server: so all that it would stumble over is found here.
"""

import json
import math
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from factory.errors import UserError, relative, shown
from factory.gguf_file import Base, Gguf, Tensor, read_gguf

LARGEST_HEADER, DEEPEST = 8 << 20, 24  # bytes; levels of JSON
# ggml type -> values in a block, bytes of a block, NumPy type
GGML: dict[int, tuple[int, int, Any]] = {
    0: (1, 4, np.float32), 1: (1, 2, np.float16), 30: (1, 2, np.uint16), 8: (32, 34, np.uint8),
}  # fmt: skip
BF16, Q8_0 = 30, 8
SAFE: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.uint8,
}  # fmt: skip
ADAPTER_KEYS = {"adapter.type", "adapter.lora.alpha", "adapter.lora.task_name"}
# PEFT's name of a layer -> llama.cpp's
LAYERS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_qkv", "o_proj": "attn_output",
    "dense": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "gate_up_proj": "ffn_up", "fc1": "ffn_up", "fc2": "ffn_down",
}  # fmt: skip
# What an adapter_config.json may say. Any other key that says anything may change what the adapter does, or what PEFT
# imports (auto_mapping names a Python module).
PLAIN_KEYS = {
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "bias", "target_modules", "layers_to_transform",
    "init_lora_weights", "qalora_group_size", "megatron_core",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: `start` is its first byte there, `kind` is safetensors' name of its type."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int


def read_strict(path: Path, where: str) -> Any:
    """JSON of a stranger: UTF-8, no name twice, no NaN or infinity, no deep nesting.

    Raises:
        UserError: it is not; told with `where`.
    """
    return parse_strict(path.read_bytes(), where)


def parse_strict(data: bytes, where: str) -> Any:
    """The same of bytes that are there already."""
    # A string that is never closed is taken to the end at once: trying again from each quote in it would take hours.
    bare = re.sub(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', b"", data, flags=re.DOTALL)
    depths = accumulate(1 if mark in b"[{" else -1 for mark in re.findall(rb"[][{}]", bare))
    if max(depths, default=0) > DEEPEST:
        raise UserError(f"{where}: JSON nested more than {DEEPEST} levels deep; no package's is")
    try:
        return json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where}: not sound JSON: {reason[:100]}; get the package again") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


# -- the GGUF ----------------------------------------------------------------------------------------


def check_gguf(path: Path, base: Base, rank: int, alpha: float, where: str) -> Gguf:
    """An adapter that llama.cpp can load onto `base`, of exactly this rank and alpha, all of its weights finite.

    Raises:
        UserError: the first thing that is wrong.
    """
    found = read_gguf(path, LARGEST_HEADER, where)
    _check_metadata(found.metadata, base, alpha, where)
    _check_layout(found, where)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    for tensor in found.tensors:
        _check_place(tensor, tensors, base, rank, where)
    for tensor in found.tensors:
        if not np.isfinite(gguf_values(found, tensor)).all():
            raise UserError(
                f"{where}: tensor {shown(tensor.name)} holds NaN or infinity; the publisher must train again"
            )
    return found


def _check_metadata(metadata: dict[str, Any], base: Base, alpha: float, where: str) -> None:
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": base.architecture}
    for key, value in wanted.items():
        if metadata.get(key) != value:
            raise UserError(f"{where}: {key} is {shown(metadata.get(key))}, where the base here needs {value!r}")
    for key in metadata:
        if key not in ADAPTER_KEYS and not key.startswith(("general.", "dmoe.")):
            raise UserError(f"{where}: carries {shown(key)}; an adapter has no such thing, do not use it")
    told = metadata.get("adapter.lora.alpha")
    if type(told) is not float or not math.isfinite(told) or told <= 0 or told != alpha:
        raise UserError(
            f"{where}: adapter.lora.alpha is {shown(told)}; it must be above 0, and the manifest's {alpha:g}"
        )


def _check_layout(found: Gguf, where: str) -> None:
    """Tensors one behind the other, in the file's order, as llama.cpp wants them: no gap, no overlap, no rest."""
    end = 0
    for tensor in found.tensors:
        if tensor.kind not in GGML:
            raise UserError(
                f"{where}: tensor {shown(tensor.name)} is of type {tensor.kind}; adapters are F32, F16, BF16, Q8_0"
            )
        block, width, _ = GGML[tensor.kind]
        if tensor.offset != end or len(tensor.shape) != 2 or min(tensor.shape) < 1 or tensor.shape[0] % block:
            raise UserError(f"{where}: tensor {shown(tensor.name)} does not lie where it must, or is no matrix")
        last = end + math.prod(tensor.shape) // block * width
        end = last + -last % found.alignment
    if not found.tensors or found.size not in (found.data + last, found.data + end):
        raise UserError(f"{where}: has {found.size:,} bytes, not those of its tensors; get the package again")


def _check_place(tensor: Tensor, tensors: dict[str, Tensor], base: Base, rank: int, where: str) -> None:
    told = f"{where}: tensor {shown(tensor.name)}"
    stem, _, side = tensor.name.rpartition(".lora_")
    if "norm" in stem or "token_embd" in stem:
        raise UserError(f"{told} is of a norm or the token embeddings; an adapter changes linear layers only")
    shape = base.shapes.get(stem, ())
    if side not in ("a", "b") or len(shape) != 2:
        raise UserError(f"{told} has no linear layer in the base here ({base.file})")
    if f"{stem}.lora_{'b' if side == 'a' else 'a'}" not in tensors:
        raise UserError(f"{told} has no partner; get the package again")
    wanted = (shape[0], rank) if side == "a" else (rank, shape[1])
    if tensor.shape != wanted:
        raise UserError(f"{told} has shape {list(tensor.shape)}, where base and rank need {list(wanted)}")


def gguf_values(found: Gguf, tensor: Tensor) -> np.ndarray:
    """Its values as float32 or float16, flat: row by row."""
    block, width, kind = GGML[tensor.kind]
    count = math.prod(tensor.shape) // block * width // np.dtype(kind).itemsize
    raw = np.fromfile(found.path, kind, count, offset=found.data + tensor.offset)
    if tensor.kind == Q8_0:
        blocks = raw.reshape(-1, width)
        with np.errstate(all="ignore"):  # what is not finite is told by name
            raw = (blocks[:, :2].view(np.float16) * blocks[:, 2:].view(np.int8).astype(np.float32)).ravel()
    return _widened(raw, tensor.kind == BF16)


def _widened(raw: np.ndarray, bfloat: bool) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32) if bfloat else raw


# -- safetensors and PEFT ------------------------------------------------------------------------------


def read_safetensors(path: Path, where: str | None = None) -> list[Stored]:
    """The tensors of a safetensors file, its header checked to the last byte, by our own code.

    Raises:
        UserError: the header is not sound, or its tensors do not fill the file without gap or overlap.
    """
    where, size = where or relative(path), path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(LARGEST_HEADER, size - 8):
            raise UserError(f"{where}: its safetensors header is cut off or too large; get the package again")
        header = parse_strict(stream.read(length), where)
    if not isinstance(header, dict):
        raise UserError(f"{where}: its safetensors header is no mapping; get the package again")
    header.pop("__metadata__", None)
    found = [_stored(name, entry, 8 + length, where) for name, entry in header.items()]
    end = 8 + length
    for tensor in sorted(found, key=lambda tensor: (tensor.start, math.prod(tensor.shape))):
        if tensor.start != end:
            raise UserError(f"{where}: tensor {shown(tensor.name)} does not lie where it must")
        end += math.prod(tensor.shape) * np.dtype(SAFE[tensor.kind]).itemsize
    if end != size:
        raise UserError(f"{where}: has {size:,} bytes, not those of its tensors; get the package again")
    return found


def _stored(name: str, entry: Any, start: int, where: str) -> Stored:
    told = f"{where}: tensor {shown(name)}: its entry in the header is wrong; get the package again"
    if not isinstance(entry, dict) or len(name) > 200 or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(told)
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > 8 or any(type(n) is not int or n < 0 for n in numbers):
            raise UserError(told)
    if not isinstance(kind, str) or kind not in SAFE or len(offsets) != 2:
        raise UserError(told)
    if offsets[1] - offsets[0] != math.prod(shape) * np.dtype(SAFE[kind]).itemsize:
        raise UserError(told)
    return Stored(name, kind, tuple(shape), start + offsets[0])


def safe_values(path: Path, tensor: Stored) -> np.ndarray:
    """Its values, flat; bfloat16 as float32."""
    raw = np.fromfile(path, SAFE[tensor.kind], math.prod(tensor.shape), offset=tensor.start)
    return _widened(raw, tensor.kind == "BF16")


def check_finite(path: Path, where: str) -> list[Stored]:
    """The tensors of a sound safetensors file whose values are all finite.

    Raises:
        UserError: they are not; see read_safetensors.
    """
    found = read_safetensors(path, where)
    for tensor in found:
        if not np.isfinite(safe_values(path, tensor)).all():
            raise UserError(
                f"{where}: tensor {shown(tensor.name)} holds NaN or infinity; the publisher must train again"
            )
    return found


def check_peft(folder: Path, gguf: Gguf, rank: int, alpha: float, targets: list[str], where: str) -> None:
    """A PEFT folder that is plain LoRA, and the same adapter as `gguf`.

    Raises:
        UserError: the first thing that is wrong.
    """
    _check_config(folder / "adapter_config.json", rank, alpha, targets, f"{where}: adapter/adapter_config.json")
    path, where = folder / "adapter_model.safetensors", f"{where}: adapter/adapter_model.safetensors"
    found = check_finite(path, where)
    if len(found) != len(gguf.tensors):
        raise UserError(
            f"{where}: has {len(found)} tensors, adapter.gguf has {len(gguf.tensors)}; get the package again"
        )
    stored = {_gguf_name(tensor, where): tensor for tensor in found}
    tensors = {tensor.name: tensor for tensor in gguf.tensors}
    if len(stored) < len(found):
        raise UserError(f"{where}: two of its tensors are of one layer; do not use it")
    if odd := sorted(stored.keys() ^ tensors.keys()):
        raise UserError(f"{where}: {shown(odd[0])} is in it or in adapter.gguf, not in both; get the package again")
    for name, tensor in tensors.items():
        if stored[name].shape != tensor.shape[::-1]:
            raise UserError(f"{where}: {shown(name)} has another shape in adapter.gguf; get the package again")
        # B may be scaled and put into another order in GGUF (rsLoRA, Llama's q and k); A never is.
        if name.endswith(".lora_a") and not _alike(safe_values(path, stored[name]), gguf_values(gguf, tensor)):
            raise UserError(f"{where}: {shown(name)} has other values in adapter.gguf; get the package again")


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether they differ by no more than the rounding of the coarsest type, Q8_0."""
    with np.errstate(over="ignore"):
        return bool(np.abs(one.astype(np.float32) - other).max() <= 0.01 * np.abs(one).max())


def _gguf_name(tensor: Stored, where: str) -> str:
    """llama.cpp's name of PEFT's base_model.model.(...)layers.0.(...)q_proj.lora_A.weight, or of lm_head's."""
    *path, layer, side, last = ["", "", "", *tensor.name.split(".")]
    if last == "weight" and side in ("lora_A", "lora_B") and tensor.kind in ("F32", "F16", "BF16"):
        number = path[path.index("layers") + 1 :][:1] if "layers" in path else []
        if layer in LAYERS and number and re.fullmatch(r"[0-9]{1,4}", number[0]):
            return f"blk.{int(number[0])}.{LAYERS[layer]}.weight.{side.lower()}"
        if layer == "lm_head":
            return f"output.weight.{side.lower()}"
    raise UserError(f"{where}: tensor {shown(tensor.name)} is no LoRA matrix of a linear layer; do not use it")


def _check_config(path: Path, rank: int, alpha: float, targets: list[str], where: str) -> None:
    config = read_strict(path, where)
    if not isinstance(config, dict):
        raise UserError(f"{where}: must be a mapping")
    for key, value in config.items():
        if value and key not in PLAIN_KEYS:
            raise UserError(f"{where}: {shown(key)}: {shown(value)} is not plain LoRA; do not use it")
    wanted = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"}
    for key, value in wanted.items():
        if config.get(key) != value or isinstance(config[key], bool):
            raise UserError(f"{where}: {key} is {shown(config.get(key))}, not {value!r} as the manifest says")
    named = config.get("target_modules")
    if not isinstance(named, list) or sorted(map(str, named)) != sorted(targets):
        raise UserError(f"{where}: target_modules are not those of the manifest")
