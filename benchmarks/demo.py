"""From a fresh clone to three experts: seconds and memory of `make demo`, and of what runs every day.

Run: python benchmarks/demo.py    (clones the last commit into a temporary folder; ten minutes)
"""

import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

LIMITS = {"make demo, fresh clone": ("12 min", "4 GB"), "make demo, again": ("seconds", ""),
          "dvc repro, nothing changed": ("10 s", ""),
          "dmoe --help": ("0.3 s", "")}  # fmt: skip


def measure(command: str, folder: Path) -> tuple[float, float]:
    """(seconds, peak GB of the largest process) of a shell command; it must succeed."""
    began = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    subprocess.run(command, shell=True, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def main() -> None:
    root = Path(__file__).parents[1]
    table = Table("what", "seconds", "peak memory so far (GB)", "limit")
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(root), str(clone)], check=True)
        commands = ("make demo", "make demo", ".venv/bin/dvc repro -q", ".venv/bin/dmoe --help")
        for name, command in zip(LIMITS, commands, strict=True):
            seconds, memory = measure(f"PATH=$PWD/.venv/bin:$PATH {command}", clone)
            table.add_row(name, f"{seconds:.1f}", f"{memory:.2f}", ", ".join(filter(None, LIMITS[name])))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
