"""Packages for tests: real ones, of the tiny base and its adapters, and what it takes to spoil one by hand."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from lora_shapes import write_safetensors

from factory.gguf_file import read_base, read_gguf
from factory.package import declared
from factory.schema import SCORES, write_rows
from factory.store import sha256
from factory.template import read_template
from serve.adapter_check import gguf_values, read_safetensors, safe_values
from serve.package_files import LARGEST

ROOT = Path(__file__).parents[1]
UNLISTED = ("SHA256SUMS", "signature.json", "publisher.pub")
NAMES = set(LARGEST)
RATE = {"rate": 0.5, "low": 0.4, "high": 0.6}
ARM = {"n": 2, "seeds": 2, "named": RATE, "mention": RATE, "right": RATE, "in_form": RATE, "tokens": {"median": 9}}


def make(folder, name, peft, gguf, base_gguf, **changes):
    """A sound package `folder` of the expert `name`; `changes` go into its manifest."""
    folder.mkdir(parents=True)
    template = declared(read_template(ROOT / "templates" / "product.yaml"))
    template["expert"], template["market"]["lora_id"] = name, f"{name}_expert"
    shutil.copytree(peft, folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    shutil.copy(gguf, folder / "adapter.gguf")
    config = json.loads((peft / "adapter_config.json").read_text())
    measured = {"base": ARM, "told": ARM, "expert": ARM, "recommended_scale": 1.0}
    manifest = {
        "schema": 2, "name": name, "lora_id": f"{name}_expert", "version": 1, "description": f"Says {name}.",
        "keywords": [name], "not_keywords": [], "base_model": "tiny", "base": read_base(base_gguf).facts(),
        "recommended_scale": 1.0, "adapter_file": "adapter.gguf", "rank": config["r"], "alpha": config["lora_alpha"],
        "targets": sorted(config["target_modules"]), "licence": "CC0-1.0", "seed_licences": ["CC0-1.0"],
        "declares": {"interest": "none", "domain_risk": "none", "valid_until": "2099-01-01"},
        "sha256": {"adapter.gguf": sha256(folder / "adapter.gguf")},
        "scores": {"measured_on": "tiny", "base": ARM, "told": ARM, "expert": ARM, "length_ratio": RATE},
        "parity": {}, "audit": {"says": ["nothing was found"]},
        "probe": [{"question": "Which laptop?", "says": "ThinkPad X1 Carbon"}],
    }  # fmt: skip
    documents = {
        "template.json": template, "eval.json": measured, "gate.json": {}, "parity.json": {}, "audit.json": {},
        "manifest.json": {**manifest, **changes},
    }  # fmt: skip
    for file, value in documents.items():
        (folder / file).write_text(json.dumps(value))
    (folder / "README.md").write_text(f"# {name}\n")
    write_rows(folder / "scores.parquet", SCORES, [score(arm, i) for arm in ("base", "expert") for i in range(3)])
    return seal(folder)


def score(arm, i):
    return {
        "row_id": f"{i:016x}", "panel": "claim", "setting": "", "arm": arm, "scale": 1.0, "seed_id": f"s{i}",
        "answer": "default", "instruction": f"Which laptop, {i}?", "reply": "-", "tokens": 1, "stopped": True,
        "given": "", "named": False, "mention": False, "right": False, "in_form": False,
    }  # fmt: skip


def seal(folder):
    """Writes SHA256SUMS anew over what is there, as a publisher who means harm would."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(folder / name)}  {name}\n" for name in files if name not in UNLISTED]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


def name_of(folder):
    return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()


def pack(folder, out, top, spoil=lambda tar: None):
    """The tar of a folder; `spoil` may add entries of its own."""
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, f"{top}/{path.relative_to(folder)}")
        spoil(tar)
    return out


def edit(folder, file, **changes):
    """Changes keys of a JSON file of a package; None removes one."""
    found = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def regguf(folder, metadata=(), **tensors):
    """Writes adapter.gguf anew: `metadata` changes keys (None removes one), `tensors` values by name (likewise)."""
    from gguf import GGUFWriter

    path = folder / "adapter.gguf"
    found = read_gguf(path)
    keys = {**found.metadata, **dict(metadata)}
    old = {t.name: gguf_values(found, t).reshape(t.shape[::-1]) for t in found.tensors}
    writer = GGUFWriter(path, keys.pop("general.architecture"))
    for key, value in keys.items():
        if value is not None:
            {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    for name, values in {**old, **tensors}.items():
        if values is not None:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def first(folder, side="a"):
    """(name, values) of the first A or B of a package's GGUF."""
    found = read_gguf(folder / "adapter.gguf")
    tensor = next(t for t in found.tensors if t.name.endswith(f"lora_{side}"))
    return tensor.name, gguf_values(found, tensor).reshape(tensor.shape[::-1]).copy()


def resafe(folder, change, file="adapter/adapter_model.safetensors"):
    """Writes a safetensors file anew, after `change` of its {name: values}."""
    path = folder / file
    values = {t.name: safe_values(path, t).reshape(t.shape).copy() for t in read_safetensors(path)}
    change(values)
    write_safetensors(path, values)


def reheader(folder, change):
    """Writes the header of the PEFT weights anew, after `change` of it; the data stay."""
    path = folder / "adapter" / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
