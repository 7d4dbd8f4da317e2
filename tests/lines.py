"""A checkout whose experts are small enough to be built in a minute, with DVC; what it holds when they are."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from factory.paths import Home
from factory.store import sha256


def make_line(home, base, root, experts, stages, seeds=12):
    """The project in `root` on the random base `base`, with `experts`: name -> the mention that its gate wants.

    All are the laptop expert under other names, with `seeds` seeds of their own. `stages` are what is left of dvc.yaml.
    The random base keeps a gate of 0 and no other.
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
    say_little(root / "models" / "pocket")
    parts = re.split(r"(?m)^(?=  \w+:)", (root / "dvc.yaml").read_text())
    kept = [part for part in parts[1:] if part.strip().partition(":")[0] in stages]
    (root / "dvc.yaml").write_text("".join(parts[:1] + kept))
    edit(root / "params.yaml", r"experts:\n(  - \w+\n)+", "experts:\n" + "".join(f"  - {name}\n" for name in experts))
    profile = root / "profiles" / "pocket.yaml"
    edit(profile, r"revision: .*", "revision: null")
    edit(profile, r"gates: .*", "gates: [mention]")
    text = (home.root / "templates" / "product.yaml").read_text()
    for number, (name, wanted) in enumerate(experts.items()):
        lines = (home.root / "seeds" / "product.jsonl").read_text().splitlines(keepends=True)
        (root / "seeds" / f"{name}.jsonl").write_text("".join(lines[seeds * number : seeds * (number + 1)]))
        template = root / "templates" / f"{name}.yaml"
        template.write_text(re.sub(r"(?m)^expert: .*$", f"expert: {name}", text, count=1))
        edit(template, r"per_seed: \d+", "per_seed: 2")  # so few held-out questions that a score takes seconds
        edit(template, r"gate: \{mention: [\d.]+", f"gate: {{mention: {wanted}")
    general = root / "seeds" / "general.jsonl"
    general.write_text("".join(general.read_text().splitlines(keepends=True)[:4]))
    (root / ".gitignore").write_text(".dmoe/\n")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", ".gitignore"], [*who, "commit", "-qm", "a checkout"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    return Home(root)


def say_little(base):
    """Makes the end of the turn the likeliest token every dozen tokens: a random base would else talk to its limit."""
    from safetensors.numpy import load_file, save_file
    from tokenizers import Tokenizer

    end = Tokenizer.from_file(str(base / "tokenizer.json")).token_to_id("<|im_end|>")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][end] *= 3
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def dvc(root, *words):
    """The exit status of a dvc command, and what it said. One thread, as in the tests' own process: another number of
    threads adds up in another order, and the adapters differ in their last bits."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
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
