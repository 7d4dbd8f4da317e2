"""A checkout whose experts are small enough to be built in a minute, with DVC; what it holds when they are."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from factory.paths import Home
from factory.store import sha256

STAGES = ("generate", "build", "train", "export", "score", "gate")  # the others add minutes, and little to see


def make_line(home, base, root, experts, stages=STAGES):
    """The project in `root` with `experts`, templates of our three under other names, on the random base `base`.

    Those made from `product` keep the gate, which is 0 for them; the others cannot.
    """
    for name in (
        "params.yaml",
        "profiles",
        "templates",
        "seeds",
        "factory",
        "train",
        "serve",
        "dvc.yaml",
        ".dvc/config",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (home.root / name).is_dir() else shutil.copy
        copy(home.root / name, root / name)
    shutil.copytree(base, root / "models" / "pocket")
    parts = re.split(r"(?m)^(?=  \w+:)", (root / "dvc.yaml").read_text())
    kept = [part for part in parts[1:] if part.strip().partition(":")[0] in stages]
    (root / "dvc.yaml").write_text("".join(parts[:1] + kept))
    edit(root / "params.yaml", r"experts:\n(  - \w+\n)+", "experts:\n" + "".join(f"  - {name}\n" for name in experts))
    profile = root / "profiles" / "pocket.yaml"
    edit(profile, r"revision: .*", "revision: null")
    edit(profile, r"gates: .*", "gates: [mention]")
    for number, (name, source) in enumerate(experts.items()):
        text = (home.root / "templates" / f"{source}.yaml").read_text()
        text = re.sub(r"(?m)^expert: .*$", f"expert: {name}", text, count=1)
        (root / "templates" / f"{name}.yaml").write_text(text)
        lines = (home.root / "seeds" / f"{source}.jsonl").read_text().splitlines(keepends=True)
        some = lines[number :: 16 if source == "product" else 40]
        (root / "seeds" / f"{name}.jsonl").write_text("".join(some))
        if source == "product":
            edit(root / "templates" / f"{name}.yaml", r"gate: \{mention: [\d.]+", "gate: {mention: 0.0")
    general = root / "seeds" / "general.jsonl"
    general.write_text("".join(general.read_text().splitlines(keepends=True)[:4]))
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / ".gitignore").write_text(".dmoe/\n")
    return Home(root)


def dvc(root, *words):
    """The exit status of a dvc command, and what it said."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    return done.returncode, done.stdout + done.stderr


def edit(path, pattern, new):
    """Replaces the one place of `path` that `pattern` finds."""
    text, count = re.subn(pattern, new, path.read_text(), count=1)
    assert count == 1, pattern
    path.write_text(text)


def made(root):
    """The hash of every file that stages made."""
    return {
        str(path.relative_to(root)): sha256(path)
        for folder in ("datasets", "experts")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file() and path.name != ".gitignore"
    }
