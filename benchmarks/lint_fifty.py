"""`dmoe lint` on 50 experts with 200 seeds each: the whole command, as a reviewer waits for it.

    python benchmarks/lint_fifty.py

The experts are the real ones under other names, their seeds the real ones in other words. Limit: 2 s of wall time.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
REAL = ("product", "medical", "legal")
EXPERTS, SEEDS, RUNS, LIMIT = 50, 200, 5, 2.0


def fifty(root: Path) -> None:
    """A checkout at `root` with EXPERTS experts of SEEDS seeds, and the pocket base's tokenizer."""
    shutil.copytree(ROOT / "profiles", root / "profiles")
    pocket = root / "models" / "pocket"
    shutil.copytree(ROOT / "models" / "pocket", pocket, ignore=shutil.ignore_patterns("*.md", "topics"))
    for folder in ("templates", "seeds"):
        (root / folder).mkdir()
    shutil.copy(ROOT / "seeds" / "general.jsonl", root / "seeds")
    names = [f"e{i:02}{REAL[i % 3]}" for i in range(EXPERTS)]
    params = "experts: [" + ", ".join(names) + "]\nprofile: pocket\nteacher: {kind: phrases}\n"
    (root / "params.yaml").write_text(params)
    for name in names:
        real = name[3:]
        text = (ROOT / "templates" / f"{real}.yaml").read_text(encoding="utf-8")
        (root / "templates" / f"{name}.yaml").write_text(text.replace(f"expert: {real}", f"expert: {name}", 1))
        (root / "seeds" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, seeds(real, name))) + "\n")


def seeds(real: str, name: str) -> list[dict[str, object]]:
    """SEEDS of the real seeds, evenly over all answers, under ids of their own."""
    entries = [json.loads(line) for line in (ROOT / "seeds" / f"{real}.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [entries[i * len(entries) // SEEDS] for i in range(SEEDS)]
    return [{**entry, "id": entry["id"].replace(real, name)} for entry in chosen]


def measure(root: Path) -> tuple[float, float, str]:
    """Wall and CPU seconds of one run, and what it said."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "factory.cli", "lint"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, (done.stdout + done.stderr).strip()


def main() -> None:
    """Prints one table."""
    with tempfile.TemporaryDirectory() as folder:
        fifty(Path(folder))
        runs = [measure(Path(folder)) for _ in range(RUNS)]
    table = Table("dmoe lint", "wall s, median", "CPU s, median", "limit s", "kept")
    wall, cpu = (median(run[i] for run in runs) for i in (0, 1))
    rows = f"{EXPERTS} experts, {SEEDS} seeds each"
    table.add_row(rows, f"{wall:.2f}", f"{cpu:.2f}", f"{LIMIT:.1f}", "yes" if wall < LIMIT else "NO")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    Console().print(runs[0][2][-300:], markup=False)


if __name__ == "__main__":
    main()
