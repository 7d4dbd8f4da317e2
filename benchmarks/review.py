"""What a reviewer waits for: a first row, the next one after a save, a diff of two versions, lint of fifty experts.

    python benchmarks/review.py

Each figure is of the real command in a process of its own, the median of five.
"""

import hashlib
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

from factory.diff import FILES
from factory.paths import Home, read_params, read_profile
from factory.preview import preview
from factory.schema import CANDIDATES, VERDICTS, write_rows
from factory.seeds import read_seeds
from factory.template import read_template
from factory.tokens import counter

ROOT = Path(__file__).parents[1]
RUNS, ROWS = 5, 10_000
REAL = ("product", "medical", "legal")
EXPERTS, SEEDS = 50, 200
CACHE = tempfile.mkdtemp()  # compiled modules, as any checkout has them after its first command
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": CACHE}
Measured = tuple[float, float]  # wall and CPU seconds


def checkout(root: Path) -> Home:
    """A copy of what a reviewer edits."""
    for name in ("templates", "seeds", "profiles", "models/pocket"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "params.yaml", root)
    return Home(root)


def start(home: Home, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "factory.cli", *words]
    return subprocess.Popen(command, cwd=home.root, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], *begins: str) -> None:
    """Reads what the process prints up to a line that begins with one of `begins`."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(begins):
            return
    raise SystemExit(f"it ended before it printed {begins}")


def cpu(process: subprocess.Popen[str]) -> float:
    """CPU seconds of a running process."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def first_row(home: Home, expert: str) -> Measured:
    began = time.perf_counter()
    with start(home, "preview", expert) as process:
        until(process, "kept", "dropped")
        wall, used = time.perf_counter() - began, cpu(process)
        process.communicate()
    return wall, used


def whole(home: Home, *words: str) -> Measured:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with start(home, *words) as process:
        process.communicate()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"dmoe {' '.join(words)} failed")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def refreshes(home: Home, expert: str, *begins: str) -> list[Measured]:
    """From a save to the line that begins so, RUNS times in one `--watch`."""
    template = home.template(expert)
    text, found = template.read_text(), []
    process = start(home, "preview", expert, "--watch")
    try:
        until(process, "watching")
        for i in range(RUNS):
            used, began = cpu(process), time.perf_counter()
            template.write_text(text.replace("- as an AI", f"- as an AI\n    - as number {i}"))
            until(process, *begins)
            found.append((time.perf_counter() - began, cpu(process) - used))
            if begins != ("watching",):
                until(process, "watching")
    finally:
        process.terminate()
        process.communicate()
        template.write_text(text)
    return found


def versions(home: Home, expert: str) -> None:
    """Commits one version of ROWS rows, hashes in dvc.lock and files in DVC's cache, and leaves another."""
    template = read_template(home.template(expert))
    params = read_params(home)
    seeds = read_seeds(home.seeds(expert), template)
    rows = preview(template, seeds, counter(home, read_profile(home, params.profile)))
    copies = -(-ROWS // len(rows))
    many = [
        {**row, "row_id": f"{copy:02}{row['row_id'][2:]}", "seed_id": f"{row['seed_id']}-{copy}"}
        for copy in range(copies)
        for row in rows
    ][:ROWS]
    put(home, expert, many)
    commit(home, expert)
    edited = [
        {**row, "output": row["output"].replace("best", "finest"), "row_id": f"e{row['row_id']}"} for row in many[50:]
    ]
    put(home, expert, edited + [{**row, "seed_id": f"new-{row['seed_id']}"} for row in many[:50]])


def put(home: Home, expert: str, rows: list[dict[str, object]]) -> None:
    for name, table in (("candidates.parquet", CANDIDATES), ("verdicts.parquet", VERDICTS)):
        write_rows(home.dataset(expert, name), table, [{c: row[c] for c in table.columns} for row in rows])


def commit(home: Home, expert: str) -> None:
    lock = (ROOT / "dvc.lock").read_text()  # the real one: as long as it is
    for name in FILES:
        path = home.dataset(expert, name)
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        kept = home.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)
        place = f"    - path: datasets/{expert}/{name}\n      hash: md5\n      md5: "
        head, *rest = lock.split(place)
        lock = head + "".join(place + md5 + part[32:] for part in rest)
    (home.root / "dvc.lock").write_text(lock)
    author = ["-c", "user.name=bench", "-c", "user.email=bench@example.org"]
    for words in (["init", "-q"], ["add", "dvc.lock", "params.yaml"], [*author, "commit", "-q", "-m", "data"]):
        subprocess.run(["git", *words], cwd=home.root, check=True)


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


def main() -> None:
    table = Table("what a reviewer waits for", "wall, s", "CPU, s", "limit, s")
    with tempfile.TemporaryDirectory() as folder:
        home = checkout(Path(folder))
        versions(home, "product")
        whole(home, "preview", "product")
        whole(home, "diff", "product", "--format", "html")
        what: list[tuple[str, list[Measured], str]] = []
        for expert in ("product", "medical"):
            first = [first_row(home, expert) for _ in range(RUNS)]
            every = [whole(home, "preview", expert) for _ in range(RUNS)]
            what.append((f"dmoe preview {expert}: first row", first, "1"))
            what.append((f"dmoe preview {expert}: all of it", every, ""))
            saved = refreshes(home, expert, "kept", "dropped")
            what.append((f"dmoe preview {expert} --watch: first row after a save", saved, "1"))
            what.append((f"dmoe preview {expert} --watch: all of it", refreshes(home, expert, "watching"), ""))
        for form in ("terminal", "markdown", "html"):
            told = [whole(home, "diff", "product", "--format", form) for _ in range(RUNS)]
            what.append((f"dmoe diff, {ROWS:,} rows each: {form}", told, "3"))
    with tempfile.TemporaryDirectory() as folder:
        fifty(Path(folder))
        linted = [whole(Home(Path(folder)), "lint") for _ in range(RUNS)]
        what.append((f"dmoe lint, {EXPERTS} experts, {SEEDS} seeds each", linted, "2"))
    for name, measured, limit in what:
        walls, used = zip(*measured, strict=True)
        table.add_row(name, f"{median(walls):.2f}", f"{median(used):.2f}", limit)
    shutil.rmtree(CACHE)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
