"""Fifty experts at once: `dmoe repro-all` beside one `dvc repro` an expert, and `dvc repro` with nothing to do.

A checkout of its own on the pocket base: the laptop expert under fifty names, about forty rows each, from the seeds to
the GGUF file (generate, build, train, export). The single runs are `dvc repro export@NAME`, one after the other, of
some of the experts; all would take as many times longer. Their adapters are compared, byte for byte.
Run: python benchmarks/many.py [EXPERTS, 50] [SINGLE RUNS, 10]   (ten minutes)
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from factory.paths import find_home
from factory.progress import track
from factory.store import sha256

STAGES = ("generate", "build", "train", "export")
SEEDS, PER_SEED = 14, 4  # of an expert: about forty rows to train on


def edit(path: Path, pattern: str, new: str) -> None:
    path.write_text(re.sub(pattern, new, path.read_text(), count=1))


def checkout(root: Path, names: list[str], stages: Sequence[str] = STAGES) -> None:
    """The project with `names` for experts, and of dvc.yaml the `stages`."""
    home = find_home().root
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
        (shutil.copytree if (home / name).is_dir() else shutil.copy)(home / name, root / name)
    shutil.copytree(home / "models" / "pocket", root / "models" / "pocket")
    parts = re.split(r"(?m)^(?=  \w+:)", (root / "dvc.yaml").read_text())
    (root / "dvc.yaml").write_text(parts[0] + "".join(p for p in parts[1:] if p.strip().partition(":")[0] in stages))
    edit(root / "params.yaml", r"experts:\n(  - \w+\n)+", "experts:\n" + "".join(f"  - {name}\n" for name in names))
    template = (home / "templates" / "product.yaml").read_text()
    template = re.sub(r"per_seed: \d+", f"per_seed: {PER_SEED}", template, count=1)
    seeds = (home / "seeds" / "product.jsonl").read_text().splitlines(keepends=True)
    for i, name in enumerate(names):
        (root / "templates" / f"{name}.yaml").write_text(
            re.sub(r"(?m)^expert: .*$", f"expert: {name}", template, count=1)
        )
        some = [seeds[(SEEDS * i + k) % len(seeds)] for k in range(SEEDS)]
        (root / "seeds" / f"{name}.jsonl").write_text("".join(some))
    (root / ".gitignore").write_text(".dmoe/\n")
    who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for words in (["init", "-q"], ["add", ".gitignore"], [*who, "commit", "-qm", "a checkout"]):
        subprocess.run(["git", *words], cwd=root, check=True)


def seconds(root: Path, *words: str) -> float:
    """How long a command takes there; it must end well."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    began = time.perf_counter()
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - began


def main(count: int, singles: int) -> None:
    names = [f"expert_{i:02}" for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        alone, together = Path(folder) / "alone", Path(folder) / "together"
        for root in (alone, together):
            checkout(root, names)
        each = [seconds(alone, "dvc", "repro", f"export@{n}") for n in track(names[:singles], "single runs", singles)]
        whole = seconds(together, "dmoe", "repro-all")
        nothing = sorted(seconds(together, "dvc", "repro") for _ in range(3))[1]
        file = "adapter/adapter_model.safetensors"
        pairs = [[root / "experts" / name / file for root in (alone, together)] for name in names[:singles]]
        same = sum(sha256(a) == sha256(b) for a, b in pairs)
    single = sum(each) / singles * count
    table = Table("what", "seconds", "an expert", "times faster", title=f"{count} experts, seeds to GGUF, pocket base")
    table.add_row(
        f"single runs ({singles} of {count}, times {count / singles:g})", f"{single:.0f}", f"{single / count:.1f}", "1"
    )
    table.add_row("dmoe repro-all", f"{whole:.0f}", f"{whole / count:.1f}", f"{single / whole:.1f}")
    table.add_row("dvc repro, nothing changed", f"{nothing:.1f}", "", "")
    Console().print(table)
    Console().print(f"adapters equal byte for byte: {same} of {singles}")


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*(given + [50, 10][len(given) :]))
