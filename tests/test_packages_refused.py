"""Packages of people who mean harm, or whose disk was full: each refused with one line before native code sees it."""

import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import package_shapes as packages
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from package_shapes import edit, first, regguf, reheader, resafe

from factory.errors import UserError
from factory.gguf_file import read_base, read_gguf
from serve.adapter_check import check_finite, check_gguf, parse_strict
from serve.package_check import opened
from serve.package_files import copied

ROOT = Path(__file__).parents[1]
MANIFEST, WEIGHTS, CONFIG = "manifest.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_adapters, tiny_ggufs, tiny_gguf):
    folder = tmp_path_factory.mktemp("good") / "red"
    return packages.make(folder, "red", tiny_adapters[0], tiny_ggufs[0], tiny_gguf)


@pytest.fixture(scope="module")
def base(tiny_gguf):
    return read_base(tiny_gguf)


# -- how each is spoiled ----------------------------------------------------------------------------------


def member(name, kind=tarfile.REGTYPE, data=b"x", link="", **pax):
    """Adds an entry to a tar, whatever its name and kind."""

    def add(tar):
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
        entry.pax_headers = pax
        tar.format = tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT
        tar.addfile(entry, io.BytesIO(data))

    return add


def bytes_of(change):
    """Changes the bytes of the finished tar."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def many(tar):
    for _ in range(70):
        member("red_expert/adapter/", tarfile.DIRTYPE)(tar)


def huge(data):
    """A header that says 7 GiB of adapter.gguf, checksum and all."""
    header = bytearray(data[:512])
    header[:100] = b"red_expert/adapter.gguf".ljust(100, b"\0")
    header[124:136] = b"70000000000\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + data


def zipped(data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("red.tar", data)
    return out.getvalue()


TARS = {  # name -> (what is added to the tar, what is done to its bytes, what is told)
    "a path that climbs out": (member("red_expert/../../evil"), None, "leads out of the package"),
    "a folder that climbs out": (member("../evil"), None, "leads out of the package"),
    "an absolute path": (member("/etc/passwd"), None, "leads out of the package"),
    "a backslash": (member("red_expert/..\\evil"), None, "leads out of the package"),
    "a symbolic link": (member("red_expert/README.md", tarfile.SYMTYPE, link="/etc/passwd"), None, "a symbolic link"),
    "a hard link": (member("red_expert/README.md", tarfile.LNKTYPE, link="x"), None, "a hard link"),
    "a device": (member("red_expert/README.md", tarfile.CHRTYPE), None, "is a device"),
    "a pipe": (member("red_expert/README.md", tarfile.FIFOTYPE), None, "is a pipe"),
    "an extended header": (member("red_expert/README.md", path="/etc/passwd"), None, "an extended header"),
    "a name twice": (member("red_expert/README.md"), None, "README.md is there twice"),
    "another folder": (member("blue_expert/README.md"), None, "leads out of the package's one folder"),
    "a name in other case": (member("red_expert/readme.md"), None, "is no file of a package"),
    "a name too long": (member("red_expert/" + "a" * 90 + "/" + "b" * 90), None, "is no file of a package"),
    "a folder of its own": (member("red_expert/evil/", tarfile.DIRTYPE), None, "no plain file|plain files only"),
    "a large text": (member("red_expert/adapter/README.md", data=bytes(2 << 20)), None, "more than the 1,048,576"),
    "too many entries": (many, None, "more than 64 entries"),
    "a bomb": (None, huge, "has 7,516,192,768 bytes, more than"),
    "compressed": (None, gzip.compress, "is compressed"),
    "a zip": (None, zipped, "is compressed"),
    "cut off inside a file": (None, lambda data: data[:9_000], "is cut off"),
    "cut off between files": (None, lambda data: data[: data.rindex(b"red_expert/scores.parquet")], "is cut off"),
    "empty": (None, lambda data: b"", "is cut off"),
    "no tar": (None, lambda data: b"GGUF" * 1000, "neither a folder nor a sound tar"),
    "a wrong checksum": (None, lambda data: data[:5] + b"X" + data[6:], "neither a folder nor a sound tar"),
    "data behind the end": (None, lambda data: data + b"x" * 512, "data behind the tar's end"),
}


def patched(file, change):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def manifest(**changes):
    return lambda folder: edit(folder, MANIFEST, **changes)


def config(**changes):
    return lambda folder: edit(folder, CONFIG, **changes)


def gguf(value, side="a"):
    """One value of the first A or B of the GGUF becomes `value`."""

    def spoil(folder):
        name, values = first(folder, side)
        values[-1, -1] = value
        regguf(folder, **{name: values})

    return spoil


def metadata(**keys):
    return lambda folder: regguf(folder, {key.replace("__", "."): value for key, value in keys.items()})


def tensor(name, shape=(4, 64)):
    return lambda folder: regguf(folder, **{name: np.ones(shape, np.float32)})


def first_info(change):
    """Changes the first tensor's info in the GGUF: (dimensions, shape, kind, offset) as packed numbers."""

    def spoil(data):
        name = b"blk.0.attn_k.weight.lora_a"
        at = data.index(name) + len(name)
        return data[:at] + change(data[at : at + 4 + 16 + 4 + 8]) + data[at + 32 :]

    return patched("adapter.gguf", spoil)


def without_first(folder):
    regguf(folder, **{first(folder)[0]: None})


def linked(file):
    def spoil(folder):
        (folder / file).rename(folder.parent / f"{folder.name}-{Path(file).name}")
        (folder / file).symlink_to(folder.parent / f"{folder.name}-{Path(file).name}")

    return spoil


def weights(value):
    def change(values):
        next(iter(values.values()))[0, 0] = value

    return lambda folder: resafe(folder, change)


def entry(**keys):
    return lambda folder: reheader(
        folder, lambda header: next(v for k, v in header.items() if k[0] != "_").update(keys)
    )


def overlap(folder):
    def change(header):
        last = max((v for k, v in header.items() if k[0] != "_"), key=lambda entry: entry["data_offsets"])
        last["data_offsets"] = [offset - 4 for offset in last["data_offsets"]]

    reheader(folder, change)


def unlisted(folder):
    packages.seal(folder)
    (folder / "adapter" / "README.md").write_text("hello")


def twice(folder):
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text() + sums.read_text())


def sums(line):
    return lambda folder: (folder / "SHA256SUMS").write_text((folder / "SHA256SUMS").read_text() + line)


def forged(folder):
    packages.seal(folder)
    key = folder.parent / "forger.pem"
    for words in (["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key],
                  ["ec", "-in", key, "-pubout", "-out", folder / "publisher.pub"]):  # fmt: skip
        subprocess.run(["openssl", *words], check=True, capture_output=True)
    (folder / "signature.json").write_text("{}")


def route(folder):
    packages.write_safetensors(folder / "route.safetensors", {"prototypes": np.full((2, 3), np.nan, np.float32)})


def template(folder):
    edit(folder, "template.json", expert="blue")


SEALED = {  # name -> (what is done to the folder before its sums are made anew, what is told)
    "a file of its own": (lambda f: (f / "notes.txt").write_text("x"), "'notes.txt' is no file of a package"),
    "a program": (lambda f: (f / "adapter" / "run.py").write_text("x"), "can hold a program"),
    "a pickle by name": (lambda f: (f / "adapter" / "adapter_model.bin").write_text("x"), "can hold a program"),
    "a pickle by content": (patched("adapter.gguf", lambda data: b"\x80\x04" + data), "adapter.gguf: is a pickle"),
    "torch's zip of pickles": (patched(WEIGHTS, zipped), "is a pickle or an archive"),
    "a linked file": (linked("README.md"), "is a link or no plain file"),
    "a linked folder": (linked("adapter"), "is a link or no plain file"),
    "a pipe in a folder": (lambda f: os.mkfifo(f / "gate.json.new"), "is a link or no plain file"),
    "a file missing": (lambda f: (f / "audit.json").unlink(), "audit.json is missing"),
    "the manifest is no JSON": (patched(MANIFEST, lambda data: data[:-9]), "not sound JSON"),
    "the manifest is no text": (patched(MANIFEST, lambda data: b"\xff" + data), "not sound JSON"),
    "the manifest is a list": (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json: it: "),
    "a key twice": (patched(MANIFEST, lambda data: data[:-1] + b', "rank": 4}'), "a name is there twice"),
    "NaN in the manifest": (manifest(recommended_scale=float("nan")), "NaN is not finite"),
    "an infinite scale": (patched(MANIFEST, lambda d: d.replace(b'scale": 1.0', b'scale": 1e999')), "is not finite"),
    "a number of many digits": (
        patched(MANIFEST, lambda d: d.replace(b'scale": 1.0', b'scale": ' + b"9" * 10**5)), "not sound JSON",
    ),
    "a manifest of many levels": (patched(MANIFEST, lambda d: b"[" * 10**5 + b"]" * 10**5), "nested more than 24"),
    "no scale": (manifest(recommended_scale=0), "recommended_scale"),
    "a scale beyond reason": (manifest(recommended_scale=100), "recommended_scale"),
    "a negative scale": (manifest(recommended_scale=-1.0), "recommended_scale"),
    "an unknown key": (manifest(run="rm -rf /"), "run: Extra inputs"),
    "a key missing": (manifest(keywords=None), "keywords: Field required"),
    "a key of another type": (manifest(keywords="red"), "keywords: Input should be a valid list"),
    "a rank that is a boolean": (manifest(rank=True), "rank: Input should be a valid integer"),
    "a name of a version": (manifest(name="red@next"), "name: String should match"),
    "the base's own name": (manifest(name="base"), "is taken by the gateway"),
    "the router's own name": (manifest(name="auto"), "is taken by the gateway"),
    "an id that climbs out": (manifest(lora_id="../red"), "lora_id: String should match"),
    "another adapter file": (manifest(adapter_file="../../adapter.gguf"), "adapter_file: Input should be"),
    "letters that move the cursor": (manifest(description="\x1b[2Jgood"), "holds control characters"),
    "an older schema": (manifest(schema=1), "schema: 1, not 2"),
    "scores that were not measured": (
        lambda f: edit(f, "eval.json", expert={**packages.ARM, "n": 999}), "other scores than eval.json",
    ),
    "another rank in the manifest": (manifest(rank=8), "has shape"),
    "another alpha in the manifest": (manifest(alpha=16), "adapter.lora.alpha is 8.0"),
    "other targets in the manifest": (manifest(targets=["q_proj"]), "target_modules are not those"),
    "NaN weights": (gguf(np.nan), "holds NaN or infinity"),
    "infinite weights": (gguf(np.inf, "b"), "holds NaN or infinity"),
    "infinite alpha": (metadata(adapter__lora__alpha=float("inf")), "adapter.lora.alpha is inf"),
    "alpha 0": (metadata(adapter__lora__alpha=0.0), "adapter.lora.alpha is 0.0"),
    "no alpha": (metadata(adapter__lora__alpha=None), "adapter.lora.alpha is None"),
    "alpha that is no float": (metadata(adapter__lora__alpha=8), "adapter.lora.alpha is 8;"),
    "another architecture": (metadata(general__architecture="llama"), "general.architecture is 'llama'"),
    "a whole model": (metadata(general__type="model"), "general.type is 'model'"),
    "a control vector": (metadata(adapter__type="control"), "adapter.type is 'control'"),
    "a tokenizer": (metadata(tokenizer__chat_template="x"), "carries 'tokenizer.chat_template'"),
    "a prompt of its own": (metadata(adapter__lora__prompt_prefix="x"), "carries 'adapter.lora.prompt_prefix'"),
    "an odd alignment": (metadata(general__alignment=24), "is no power of two"),
    "a norm": (tensor("blk.0.attn_norm.weight.lora_a"), "is of a norm or the token embeddings"),
    "the token embeddings": (tensor("token_embd.weight.lora_a"), "is of a norm or the token embeddings"),
    "a layer that the base lacks": (tensor("blk.7.attn_q.weight.lora_a"), "has no linear layer in the base"),
    "a tensor that is no LoRA": (tensor("blk.0.attn_q.weight"), "has no linear layer in the base"),
    "a matrix alone": (without_first, "has no partner"),
    "another shape": (tensor("blk.0.attn_k.weight.lora_a", (4, 32)), "has shape [32, 4]"),
    "another rank": (tensor("blk.0.attn_k.weight.lora_a", (3, 64)), "has shape [64, 3]"),
    "three dimensions": (tensor("blk.0.attn_k.weight.lora_a", (2, 4, 64)), "or is no matrix"),
    "doubles": (lambda f: regguf(f, **{first(f)[0]: first(f)[1].astype(np.float64)}), "is of type 28"),
    "a header cut off": (patched("adapter.gguf", lambda data: data[:300]), "header is cut off"),
    "weights cut off": (patched("adapter.gguf", lambda data: data[:-64]), "not those of its tensors"),
    "weights behind the end": (patched("adapter.gguf", lambda data: data + b"x"), "not those of its tensors"),
    "no GGUF": (patched("adapter.gguf", lambda d: b"GGML" + d[4:]), "is not a GGUF file"),
    "a GGUF of another version": (patched("adapter.gguf", lambda d: d[:4] + b"\1" + d[5:]), "is not a GGUF file"),
    "2^63 tensors": (patched("adapter.gguf", lambda d: d[:8] + b"\xff" * 8 + d[16:]), "adapter.gguf"),
    "2^63 keys": (patched("adapter.gguf", lambda d: d[:16] + b"\xff" * 8 + d[24:]), "adapter.gguf"),
    "a text of 2^63 letters": (patched("adapter.gguf", lambda d: d[:24] + b"\xff" * 8 + d[32:]), "header is cut off"),
    "a list of 2^61 numbers": (
        patched("adapter.gguf", lambda d: d.replace(struct.pack("<If", 6, 8.0), struct.pack("<IIQ", 9, 4, 2**61))),
        "header is cut off",
    ),
    "dimensions that overflow": (
        first_info(lambda i: i[:4] + struct.pack("<QQ", 2**63, 2**63) + i[20:]), "does not lie where it must",
    ),
    "no dimension": (first_info(lambda i: b"\0" * 4 + i[4:]), "has 0 dimensions"),
    "tensors that overlap": (first_info(lambda i: i[:24] + struct.pack("<Q", 32)), "does not lie where it must"),
    "an offset out of the file": (first_info(lambda i: i[:24] + b"\xff" * 8), "does not lie where it must"),
    "a tensor twice": (patched("adapter.gguf", lambda d: d.replace(b"blk.1.attn_k", b"blk.0.attn_k")), "there twice"),
    "NaN in the PEFT weights": (weights(np.nan), "holds NaN or infinity"),
    "other values in the PEFT weights": (weights(9.0), "has other values in adapter.gguf"),
    "a PEFT matrix missing": (lambda f: resafe(f, lambda v: v.pop(min(v))), "has 27 tensors, adapter.gguf has 28"),
    "a PEFT tensor that is no LoRA": (
        lambda f: resafe(f, lambda v: v.update({"base_model.model.lm_head.weight": v.pop(min(v))})),
        "is no LoRA matrix",
    ),
    "a PEFT matrix of another layer": (
        lambda f: resafe(f, lambda v: v.update({min(v).replace("layers.0", "layers.9"): v.pop(min(v))})), "not in both",
    ),
    "a PEFT matrix twice": (
        lambda f: resafe(f, lambda v: v.update({max(v).replace("model.model", "model.m"): v.pop(min(v))})),
        "two of its tensors are of one layer",
    ),
    "a safetensors header of 2^63 bytes": (patched(WEIGHTS, lambda d: b"\xff" * 8 + d[8:]), "cut off or too large"),
    "a safetensors header that is no JSON": (patched(WEIGHTS, lambda d: d[:8] + b"x" + d[9:]), "not sound JSON"),
    "safetensors that overlap": (overlap, "does not lie where it must"),
    "a negative shape": (entry(shape=[-4, -64]), "entry in the header is wrong"),
    "a shape that overflows": (entry(shape=[2**62, 2**62]), "entry in the header is wrong"),
    "a type that is none": (entry(dtype="OBJECT"), "entry in the header is wrong"),
    "safetensors cut off": (patched(WEIGHTS, lambda d: d[:-4]), "not those of its tensors"),
    "DoRA": (config(use_dora=True), "'use_dora': True is not plain LoRA"),
    "a module for PEFT to import": (config(auto_mapping={"parent_library": "os"}), "'auto_mapping'"),
    "another rank for PEFT": (config(r=8), "r is 8, not 4"),
    "another alpha for PEFT": (config(lora_alpha=800), "lora_alpha is 800"),
    "biases": (config(bias="all"), "bias is 'all'"),
    "NaN prototypes": (route, "route.safetensors: tensor 'prototypes' holds NaN"),
    "a template of another expert": (template, "is of another expert"),
    "a template with code": (lambda f: edit(f, "template.json", hook="os.system"), "hook: Extra inputs"),
    "scores that are no parquet": (lambda f: (f / "scores.parquet").write_text("x" * 20), "is no parquet file"),
    "a card that is no text": (lambda f: (f / "README.md").write_bytes(b"\xff\xfe"), "is no text in UTF-8"),
}  # fmt: skip
OPEN = {  # the same, but the sums stay as they were
    "a hash that does not fit": (lambda f: (f / "README.md").write_text("x"), "is not the file that SHA256SUMS lists"),
    "a file that is not listed": (unlisted, "'adapter/README.md' is not listed"),
    "sums twice": (twice, "or there twice"),
    "sums of what is not there": (sums("0" * 64 + "  adapter/README.md\n"), "is listed and not there"),
    "sums that climb out": (sums("0" * 64 + "  ../../etc/passwd\n"), "is listed and not there"),
    "no sums": (lambda f: (f / "SHA256SUMS").write_text("hello"), "is no line of it"),
    "a forged signature": (forged, "the signature is forged or broken"),
}
FOREIGN = {"tokenizer": "tokenizer", "chat_template": "chat template", "architecture": "architecture"}
CASES = {name: told for name, (*_, told) in {**TARS, **SEALED, **OPEN}.items()}
CASES |= {f"a base with another {key}": f"for a base with another {told}" for key, told in FOREIGN.items()}

# One process for all, since a start takes a second: each package is judged, then what is loaded is looked at.
JUDGE = """
import json, sys
from pathlib import Path
from factory.errors import UserError
from factory.gguf_file import read_base
from serve.package_check import opened
from serve.signing import signer
base, found = read_base(Path(sys.argv[1])), {}
for name, path in json.load(sys.stdin).items():
    try:
        with opened(Path(path), base) as package:
            found[name] = "sound, " + str(signer(package.folder, Path("none"), path))
    except UserError as error:
        found[name] = str(error)
    except Exception as error:
        found[name] = "crash: " + repr(error)
native = [m for m in ("xllamacpp", "safetensors", "pyarrow", "torch", "gguf", "pandas") if m in sys.modules]
print(json.dumps([found, native]))
"""


@pytest.fixture(scope="module")
def judged(good, base, tiny_gguf, tmp_path_factory):
    """Name of a case -> what verifying it says; and which native loaders were loaded by then."""
    work, paths = tmp_path_factory.mktemp("bad"), {"sound": good}
    paths["sound tar"] = packages.pack(good, work / "sound.tar", "red_expert")
    for i, (name, (add, change, _)) in enumerate(TARS.items()):
        paths[name] = packages.pack(good, work / f"{i}.tar", "red_expert", add or (lambda tar: None))
        if change:
            bytes_of(change)(paths[name])
    foreign = {f"a base with another {key}": (manifest(base={**base.facts(), key: "0" * 64}), "") for key in FOREIGN}
    for i, (name, (spoil, _)) in enumerate({**SEALED, **OPEN, **foreign}.items()):
        paths[name] = shutil.copytree(good, work / f"folder-{i}")
        spoil(paths[name])
        if name not in OPEN:
            packages.seal(paths[name])
    told = json.dumps({name: str(path) for name, path in paths.items()})
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", JUDGE, str(tiny_gguf)]
    done = subprocess.run(command, input=told, capture_output=True, text=True, env=env, cwd=work)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_package_is_refused_with_one_line(judged, name):
    told = judged[0][name]
    assert re.search(CASES[name].replace("[", r"\["), told), told
    assert "crash" not in told and len(told.splitlines()[0]) < 400 and len(told.splitlines()) <= 2


def test_the_same_package_unspoilt_is_sound_and_nothing_native_was_loaded(judged):
    found, native = judged
    assert found["sound"] == found["sound tar"] == "sound, unsigned" and native == [] and len(CASES) >= 40


# -- cut and bent anywhere -----------------------------------------------------------------------------------

ANYWHERE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bent(data, draw):
    """A copy of `data`, cut, with bytes changed, or with bytes put in, somewhere."""
    data = bytearray(data)
    at = draw(st.integers(0, len(data) - 1))
    how = draw(st.sampled_from(("cut", "change", "put in", "numbers")))
    if how == "cut":
        return bytes(data[:at])
    if how == "numbers":
        at -= at % 4
        data[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\x80", b"\xff" * 4]))
    elif how == "change":
        data[at] ^= draw(st.integers(1, 255))
    else:
        data[at:at] = draw(st.binary(min_size=1, max_size=40))
    return bytes(data)


@ANYWHERE
@given(st.data())
def test_a_gguf_bent_anywhere_is_refused_or_an_adapter_of_the_same_shape(good, base, tmp_path, data):
    path, whole = tmp_path / "bent.gguf", (good / "adapter.gguf").read_bytes()
    header = read_gguf(good / "adapter.gguf").data
    path.write_bytes(
        bent(whole[:header], data.draw) + whole[header:] if data.draw(st.booleans()) else bent(whole, data.draw)
    )
    try:
        found = check_gguf(path, base, 4, 8.0, "x")
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert {t.name: t.shape for t in found.tensors} == {
            t.name: t.shape for t in read_gguf(good / "adapter.gguf").tensors
        }


@ANYWHERE
@given(st.data())
def test_safetensors_bent_anywhere_are_refused_or_floats(good, tmp_path, data):
    path, whole = tmp_path / "bent.safetensors", (good / WEIGHTS).read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(bent(whole[:length], data.draw) + whole[length:])
    try:
        assert check_finite(path, "x")
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@ANYWHERE
@given(st.data())
def test_a_tar_bent_anywhere_is_refused_or_unpacks_to_known_files(good, tmp_path, data):
    whole = packages.pack(good, tmp_path / "whole.tar", "red_expert").read_bytes()
    path, into = tmp_path / "bent.tar", tmp_path / "into"
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    path.write_bytes(bent(whole, data.draw))
    try:
        copied(path, into)
    except UserError as error:
        assert len(str(error).splitlines()) <= 2
    there = {str(p.relative_to(into)) for p in into.rglob("*") if p.is_file()}
    assert there <= packages.NAMES


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.text(alphabet='{}[]":,\\\\0123456789eE+-. ntfNaI', max_size=200).map(str.encode))
def test_any_bytes_are_refused_or_json_that_python_reads_alike(data):
    try:
        value = parse_strict(data, "x")
    except UserError:
        return
    assert json.loads(data) == value


@pytest.mark.parametrize("piece", [b'\\"', b'"', b"[]", b'{"', b"\\", b'"\\'])
def test_json_made_to_be_slow_is_refused_at_once(piece):
    """A reader that tries again from each quote would be here for hours."""
    with pytest.raises(UserError):
        parse_strict(b'"' + piece * 1_000_000, "x")


def test_one_bit_of_a_package_is_told(good, base, tmp_path):
    """Of every file: SHA256SUMS holds them all, and a bit of SHA256SUMS itself shows too."""
    for file in [path for path in sorted(good.rglob("*")) if path.is_file()]:
        copy = shutil.copytree(good, tmp_path / "copy")
        data = bytearray((copy / file.relative_to(good)).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / file.relative_to(good)).write_bytes(data)
        with pytest.raises(UserError), opened(copy, base):
            pass
        shutil.rmtree(copy)
