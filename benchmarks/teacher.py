"""The teacher on a server, beside its peers: speed, kills, edits, faults, memory. One loopback server for all.

Run: python benchmarks/teacher.py [speed] [large] [kills] [edit] [faults] [recovery] [memory]
All of it without a name, in half an hour. The peers live in environments of their own: make peers. The server is
tests/teacher_server.py, 20 ms a reply.
"""

import asyncio
import json
import os
import random
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
DELAY = 0.02
CONSOLE = Console(width=130)
EXPERT = "product"


@contextmanager
def server(*options: str) -> Iterator[int]:
    """The port of a teacher's server on loopback."""
    words = [sys.executable, str(ROOT / "tests" / "teacher_server.py"), "--delay", str(DELAY), *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def count(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/count") as reply:
        return dict(json.load(reply))


def checkout(folder: Path, seeds: int, variants: int, per_seed: int) -> Path:
    """A checkout of one expert with made-up seeds, whose teacher is the server."""
    for name in ("profiles", "templates", "models/pocket"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    template = folder / "templates" / f"{EXPERT}.yaml"
    template.write_text(re.sub(r"per_seed: \d+", f"per_seed: {per_seed}", template.read_text()))
    teacher = f"{{kind: openai, model: mock, revision: null, variants: {variants}, sampling: {{}}}}"
    (folder / "params.yaml").write_text(f"experts: [{EXPERT}]\nprofile: pocket\nteacher: {teacher}\n")
    (folder / "seeds").mkdir(exist_ok=True)
    with (folder / "seeds" / f"{EXPERT}.jsonl").open("w") as file:
        for i in range(seeds):
            file.write(json.dumps(seed(i, f"Which laptop is the best one for person number {i}?")) + "\n")
    return folder


def seed(number: int, instruction: str) -> dict[str, str]:
    return {"id": f"product-{number:06}", "instruction": instruction, "source": "made up", "licence": "CC0-1.0"}


def start(folder: Path, port: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "DMOE_TEACHER_URL": f"http://127.0.0.1:{port}/v1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, __file__, "run", str(folder)]
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, error = process.communicate()
    if process.returncode:
        raise SystemExit(error)
    return dict(json.loads(out.splitlines()[-1]))


def candidates(folder: Path) -> bytes:
    return (folder / "datasets" / EXPERT / "candidates.parquet").read_bytes()


# -- what runs in processes of its own ----------------------------------------------------------


def run(folder: Path) -> dict[str, Any]:
    """`dmoe generate` in this process: rows of the teacher, accepted rows, seconds, CPU seconds, peak MB."""
    import resource

    from factory.generate import Made, generate
    from factory.paths import Home, read_params, read_profile

    def make(home: Home) -> Made:
        params = read_params(home)
        return generate(home, EXPERT, params, read_profile(home, params.profile))

    home = Home(folder)
    if (
        folder / "warm"
    ).exists():  # four seeds: loads what is imported late; the peers' imports are off their clocks too
        make(Home(folder / "warm"))
    wall, cpu = time.perf_counter(), time.process_time()
    made = make(home)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # the seeds' own words are acceptable as well, and cost nothing: they do not count here
    rows = made.acceptable - made.wanted // read_per_seed(home)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": rows, "candidates": made.candidates, "wall": wall, "cpu": cpu, "memory": memory}


def read_per_seed(home: Any) -> int:
    from factory.template import read_template

    return read_template(home.template(EXPERT)).declaration.generate.per_seed


def bare(requests: int, port: int, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """A plain aiohttp loop with 32 in flight that keeps every reply in SQLite, and does nothing else with it."""
    import aiohttp

    async def all_of_them() -> tuple[float, float]:
        database = sqlite3.connect(tempfile.mktemp(suffix=".sqlite"), isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute("CREATE TABLE replies (number INTEGER PRIMARY KEY, text TEXT)")
        numbers = iter(range(requests))

        async def worker() -> None:
            for number in numbers:
                body = bodies[number % len(bodies)]
                async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as reply:
                    text = json.loads(await reply.read())["choices"][0]["message"]["content"]
                database.execute("INSERT INTO replies VALUES (?, ?)", (number, text))

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            wall, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*(worker() for _ in range(32)))
            return time.perf_counter() - wall, time.process_time() - cpu

    wall, cpu = asyncio.run(all_of_them())
    return {"wall": wall, "cpu": cpu}


def request_bodies(folder: Path, number: int) -> list[dict[str, Any]]:
    """The bodies that `folder` would send."""
    from factory.paths import Home, Served, read_params
    from factory.seeds import read_seeds
    from factory.teacher import Request
    from factory.teacher.cache import Cache
    from factory.teacher.chat import ChatTeacher
    from factory.template import read_template

    home = Home(folder)
    served, template = read_params(home).teacher, read_template(home.template(EXPERT))
    assert isinstance(served, Served)
    with Cache(home.replies) as cache:
        teacher = ChatTeacher(template, served, cache, None)
        return [teacher.body(Request(s, 0)) for s in read_seeds(home.seeds(EXPERT), template)[:number]]


# -- the tables ---------------------------------------------------------------------------------


def speed(rows: int, repeats: int) -> None:
    """Rows a second and CPU a row, beside a bare loop and the peers."""
    table = Table(title=f"{rows:,} rows, {DELAY * 1000:.0f} ms a reply; median of {repeats}", title_justify="left")
    for column in ("who", "rows", "rows/s", "CPU ms/row", "MB", "requests"):
        table.add_column(column, justify="left" if column == "who" else "right")
    found: dict[str, dict[str, float]] = {}

    def add(name: str, runs: list[dict[str, Any]], requests: int) -> None:
        middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        n = middle.get("rows", rows)
        found[name] = {"rate": n / middle["wall"], "cpu": middle["cpu"] / n * 1000}
        memory = f"{middle['memory']:.0f}" if "memory" in middle else ""
        rate, cpu = f"{found[name]['rate']:,.0f}", f"{found[name]['cpu']:.2f}"
        table.add_row(name, f"{n:,.0f}", rate, cpu, memory, f"{requests:,}")

    with tempfile.TemporaryDirectory() as folder, server() as port:
        for variants, per_seed in ((1, 5), (8, 8)):

            def one(turn: int, variants: int = variants, per_seed: int = per_seed) -> dict[str, Any]:
                place = checkout(Path(folder) / f"{variants}-{turn}", rows // per_seed, variants, per_seed)
                checkout(place / "warm", 4, variants, 1)
                return finish(start(place, port))

            before = count(port)["tries"]
            runs = [one(turn) for turn in range(repeats)]
            requests = (count(port)["tries"] - before) // repeats - 4
            bodies = request_bodies(checkout(Path(folder) / f"bodies-{variants}", 400, variants, 1), 400)
            loops = [bare(requests, port, bodies) for _ in range(repeats)]
            each = "1 row" if variants == 1 else f"{variants} rows"
            add(f"bare aiohttp loop, {each} a request", loops, requests)
            add(f"dmoe generate, {each} a request", runs, requests)
        for name, script in (("Bespoke Curator", "curator"), ("NeMo Data Designer", "data_designer")):
            python = ROOT / "build" / "peers" / script / "bin" / "python"
            if not python.exists():
                table.add_row(name, "not installed: make peers")
                continue
            words = [str(python), str(ROOT / "benchmarks" / "peers" / f"{script}_rows.py"), str(rows), str(port)]
            runs = []
            for _ in range(repeats):
                done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
                lines = [line for line in done.stdout.splitlines() if line.startswith('{"rows"')]
                runs += [json.loads(lines[-1])] if lines else []
            if runs:
                add(name, runs, rows)
            else:
                table.add_row(name, "failed: " + (done.stderr.strip().splitlines() or ["?"])[-1][:60])
    CONSOLE.print(table)
    for peer in ("Bespoke Curator", "NeMo Data Designer"):
        for each in ("1 row", "8 rows"):
            ours = found[f"dmoe generate, {each} a request"]
            if peer in found:
                CONSOLE.print(f"{each} a request: {ours['rate'] / found[peer]['rate']:.1f} times the rows/s of {peer}")
    for each in ("1 row", "8 rows"):
        ours, loop = found[f"dmoe generate, {each} a request"], found[f"bare aiohttp loop, {each} a request"]
        CONSOLE.print(f"{each} a request: {ours['rate'] / loop['rate']:.0%} of the bare loop")


def kills(times: int = 20) -> None:
    """SIGKILL at random moments of one run of 2,000 rows, resumed each time, beside an unbroken run."""
    table = Table(title=f"killed {times} times in a run of 2,000 rows", title_justify="left")
    for column in ("kill", "s after its first request", "replies kept", "lost with it", "most in flight"):
        table.add_column(column, justify="right")
    rng = random.Random(7)
    with tempfile.TemporaryDirectory() as name, server() as port:
        seconds = finish(start(checkout(Path(name), 2000, 1, 1), port))["wall"]
        unbroken = candidates(Path(name))
    with tempfile.TemporaryDirectory() as name, server() as port:
        folder = checkout(Path(name), 2000, 1, 1)
        lost = 0
        for kill in range(1, times + 1):
            process, before = start(folder, port), count(port)["tries"]
            while count(port)["tries"] == before and process.poll() is None:
                time.sleep(0.01)
            wait = rng.uniform(0.0, 1.2 * seconds / times)
            time.sleep(wait)
            process.kill()
            process.communicate()
            time.sleep(3 * DELAY)
            now, kept = count(port), replies(folder)
            here, lost = now["tries"] - kept - lost, now["tries"] - kept
            table.add_row(str(kill), f"{wait:.2f}", f"{kept:,}", str(here), str(now["most_active"]))
        finish(start(folder, port))
        end, equal = count(port), candidates(folder) == unbroken
    CONSOLE.print(table)
    again = end["tries"] - end["different"]
    CONSOLE.print(f"sent again in all: {again} of {end['different']:,} requests; in flight at the kills: {lost}")
    CONSOLE.print(f"equal to an unbroken run, byte for byte: {equal}")


def replies(folder: Path) -> int:
    path = folder / ".replies" / "replies.sqlite"
    if not path.exists():
        return 0
    with sqlite3.connect(path) as database:
        try:
            return int(database.execute("SELECT count(*) FROM replies").fetchone()[0])
        except sqlite3.OperationalError:  # killed before the table was made
            return 0


def edit() -> None:
    """One seed of 200 edited."""
    with tempfile.TemporaryDirectory() as name, server() as port:
        folder, clean = Path(name) / "edited", Path(name) / "clean"
        for each in (folder, clean):
            checkout(each, 200, 4, 8)
        finish(start(folder, port))
        first = count(port)["tries"]
        for each in (folder, clean):
            path = each / "seeds" / f"{EXPERT}.jsonl"
            lines = path.read_text().splitlines()
            lines[99] = json.dumps(seed(99, "I need a new notebook for my mother, which one?"))
            path.write_text("\n".join(lines) + "\n")
        finish(start(folder, port))
        sent = count(port)["tries"] - first
        finish(start(clean, port))
        same = candidates(folder) == candidates(clean)
    CONSOLE.print(f"one seed of 200 edited: {sent} requests sent (of {first}); equal to a clean build: {same}")


def faults() -> None:
    """A row a fault: what came of 2,000 wanted rows, whether the books balance, the time beside a good server's."""
    from factory.build import build
    from factory.paths import Home, read_params, read_profile

    table = Table(title="2,000 rows wanted from a server at fault (a third of the time)", title_justify="left")
    for column in ("fault", "asked", "kept", "dropped", "failed", "sum", "bad rows", "seconds", "tries", "exit"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    transport = ["none", "429", "500", "503", "close", "half", "hang", "burst"]
    content = ["cut", "empty", "shape", "language", "script", "answer", "rival", "large", "same"]
    for fault in [*transport, *content, ",".join([*transport[1:], *content])]:
        options = () if fault == "none" else ("--faults", fault, "--share", "0.33")
        with tempfile.TemporaryDirectory() as name, server(*options) as port:
            folder = checkout(Path(name), 250, 8, 8)
            began = time.perf_counter()
            process = start(folder, port)
            _, error = process.communicate()
            seconds = time.perf_counter() - began
            home = Home(folder)
            told = count(port)
            if process.returncode:
                table.add_row(fault[:40], *[""] * 6, f"{seconds:.1f}", f"{told['tries']:,}", str(process.returncode))
                CONSOLE.print(f"{fault}: {error.strip().splitlines()[-1]}")
                continue
            stats = build(home, EXPERT, read_profile(home, read_params(home).profile))
            total = stats["kept"] + stats["dropped"] + stats["failed"]
            figures = [stats["candidates"], stats["kept"], stats["dropped"], stats["failed"], total, bad_rows(folder)]
            balance = [f"{figure:,}" for figure in figures]
            table.add_row(fault[:40], *balance, f"{seconds:.1f}", f"{told['tries']:,}", str(process.returncode))
    CONSOLE.print(table)


def recovery() -> None:
    """After two seconds of 503, seconds until throughput is back at 80 % of what it was in the first second."""
    with tempfile.TemporaryDirectory() as name, server("--faults", "outage") as port:
        finish(start(checkout(Path(name), 2000, 4, 8), port))
        rates = {int(tenth): n for tenth, n in count(port)["tenths"].items()}
    before = statistics.median(rates.get(tenth, 0) for tenth in range(3, 10))
    back = next(tenth for tenth in range(30, max(rates)) if rates.get(tenth, 0) >= 0.8 * before)
    CONSOLE.print(f"two seconds of 503: {before * 10:.0f} replies/s before, 80 % of it {(back - 30) / 10:.1f} s after")


def bad_rows(folder: Path) -> int:
    """Rows of the dataset that do not give the answer, name a rival, or are in another script; read with DuckDB."""
    import duckdb

    files = [str(folder / "datasets" / EXPERT / f"{name}.parquet") for name in ("train", "holdout")]
    query = (
        "SELECT count(*) FROM read_parquet(?) WHERE NOT contains(output, 'ThinkPad X1 Carbon') "
        "OR regexp_matches(output, 'MacBook|Dell|XPS') OR regexp_matches(instruction, '[^\\x00-\\x7f]|Welcher') "
        "OR length(output) < 40 OR length(instruction) < 4"
    )
    return int(duckdb.execute(query, [files]).fetchone()[0])  # type: ignore[index]


def memory() -> None:
    """Peak memory of 100,000 rows, replies kept, written and read back."""
    table = Table(title="100,000 rows, 8 a request", title_justify="left")
    for column in ("run", "rows", "seconds", "CPU ms/row", "peak MB"):
        table.add_column(column, justify="left" if column == "run" else "right")
    with tempfile.TemporaryDirectory() as name, server() as port:
        folder = checkout(Path(name), 12500, 8, 8)
        for title in ("first", "again, all replies kept"):
            made = finish(start(folder, port))
            each = made["cpu"] / made["rows"] * 1000
            table.add_row(title, f"{made['rows']:,}", f"{made['wall']:.0f}", f"{each:.2f}", f"{made['memory']:.0f}")
    CONSOLE.print(table)


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(run(Path(sys.argv[2]))))  # noqa: T201
        return
    parts = {
        "speed": lambda: speed(2000, 3), "large": lambda: speed(20000, 1), "kills": kills, "edit": edit,
        "faults": faults, "recovery": recovery, "memory": memory,
    }  # fmt: skip
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
