"""What an edit makes run again: the stages whose own inputs changed, read from dvc.lock by DVC itself."""

import re
import shutil
import subprocess

import pytest

from factory.store import read_yaml

TRACKED = ("dvc.yaml", "dvc.lock", "params.yaml", "templates", "seeds", "profiles", "factory", "train", ".dvc/config")


@pytest.fixture
def stale(home, tmp_path):
    """Says which stages of a copy of the project have changed inputs; outputs need not be there."""
    from dvc.repo import Repo

    for name in TRACKED:
        source, target = home.root / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)

    def changed():
        with Repo(str(tmp_path)) as repo:
            return {stage.rsplit(":")[-1] for stage, entries in repo.status().items() if _modified(entries)}

    assert changed() == set(), "dvc.lock is not of this commit; run: dvc repro"
    return tmp_path, changed


def _modified(entries):
    for entry in entries:
        for place in entry.get("changed deps", {}).values() if isinstance(entry, dict) else ():
            states = place.values() if isinstance(place, dict) else [place]
            if any(state not in ("deleted",) for state in states):
                return True
    return False


def _edit(path, old, new):
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new, 1))


def stages(*names):
    return {f"{name}@{expert}" for name in names for expert in ("product", "medical", "legal")}


EDITS = {
    "a comment in a template": ("templates/product.yaml", "# Laptop advice", "# Advice", set()),
    "description": ("templates/product.yaml", "description: Laptop", "description: Good laptop", {"package@product"}),
    "route": ("templates/product.yaml", "prefer: precision", "prefer: recall", {"fit@product", "package@product"}),
    "market": ("templates/medical.yaml", "licence: CC-BY-4.0", "licence: CC0-1.0", {"package@medical"}),
    "gate": ("templates/product.yaml", "mention: 0.90", "mention: 0.91", {"gate@product"}),
    "dedup": (
        "templates/product.yaml", "dedup: {instruction: 90}", "dedup: {instruction: 85}",
        {"build@product"},
    ),
    "output.never": ("templates/product.yaml", "- as an AI", "- as a machine", {"build@product"}),
    "train": ("templates/legal.yaml", "rank: 16", "rank: 8", {"train@legal", "export@legal", "audit@legal"}),
    "one seed": ("seeds/legal.jsonl", "legal-0001", "legal-9001", {"generate@legal", "package@legal"}),
    "voices": ("templates/legal.yaml", "annoyed", "angry", {"generate@legal"}),
    "a rival": (
        "templates/product.yaml", "- Chromebook", "- Chromebox",
        {f"{s}@product" for s in ("generate", "build", "train", "export", "score", "package")},
    ),
    "a module of two stages": ("factory/dedup.py", "from", "\nfrom", stages("generate", "build")),
    "how a teacher is reached": ("factory/teacher/client.py", "import", "\nimport", set()),
    "how a teacher is asked": ("factory/teacher/chat.py", "import", "\nimport", stages("generate")),
    "the teacher": ("params.yaml", "kind: phrases", "kind: other", stages("generate")),
    "the trainer": ("train/sft.py", "from", "\nfrom", stages("train", "audit")),
    "the exporter": ("train/export.py", "from", "\nfrom", stages("export")),
    "what both GGUFs are written by": ("train/tensors.py", "from", "\nfrom", stages("export", "parity", "score")),
    "the base's converter": ("train/base_gguf.py", "from", "\nfrom", stages("parity", "score")),
    "the panel": ("train/panel.py", "from", "\nfrom", stages("train", "score", "audit")),
    "the probe": ("train/probe.py", "from", "\nfrom", stages("train")),
    "how rows are packed": ("train/packed.py", "from", "\nfrom", stages("train", "audit")),
    "the comparison's module": ("train/parity.py", "from", "\nfrom", stages("parity")),
    "the attacks": ("train/audit.py", "from", "\nfrom", stages("audit")),
    "the gate's module": ("train/gate.py", "from", "\nfrom", stages("gate")),
    "the command line": ("factory/cli.py", "import", "\nimport", set()),
    "the learning rate": ("profiles/pocket.yaml", "learning_rate: 0.0", "learning_rate: 0.1", stages("train", "audit")),
    "the base": (
        "profiles/pocket.yaml", "revision: ", "revision: x",
        stages("generate", "build", "train", "export", "parity", "score", "audit", "package"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_runs_again_what_depends_on_it_and_nothing_else(stale, name):
    root, changed = stale
    file, old, new, expected = EDITS[name]
    _edit(root / file, old, new)
    assert changed() == expected


def _keys_read(home):
    """Template key -> the stages that name it, or a part of it, in dvc.yaml."""
    read = {}
    for stage, declared in read_yaml(home.root / "dvc.yaml")["stages"].items():
        for params in declared.get("params", []):
            for file, keys in params.items() if isinstance(params, dict) else ():
                if file.startswith("templates/"):
                    for key in keys:
                        read.setdefault(key, set()).add(stage)
    return read


def test_the_template_reference_says_which_stages_a_key_runs_again(home):
    """Every row of docs/template.md's table that names keys of a template, against dvc.yaml."""
    page, read, checked = (home.root / "docs" / "template.md").read_text(), _keys_read(home), set()
    table = page.split("## What an edit makes run again")[1].split("That generate runs")[0]
    names = set(read_yaml(home.root / "dvc.yaml")["stages"])
    for edit, runs in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", table, re.MULTILINE):
        at_once = set(re.findall(r"[a-z]+", re.split(r";|, and so|, then", runs)[0])) & names
        for key in re.findall(r"`([a-z_.]+)`", edit):
            whole = key.partition(".")[0]  # a stage may read all of `output`
            if expected := read.get(key, set()) | read.get(whole, set()):
                assert at_once == expected, key
                checked.add(key)
    assert checked >= {"answers", "rivals", "dedup", "train", "gate", "route", "output.forms", "language"}
