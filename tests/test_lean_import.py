"""The command line starts without the heavy packages, so that `dmoe lint` and `dmoe --help` stay instant."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "numba", "peft", "trl", "vllm", "pandas", "duckdb", "openai", "aiohttp")
TOLD = f"print([name for name in {HEAVY} if sys.modules.get(name)])"


def loaded(code, cwd):
    """Which heavy packages a fresh interpreter has loaded after `code`."""
    code = f"import sys\n{code}\n{TOLD}"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def command(*words):
    call = "try: app()\nexcept SystemExit as end: assert not end.code"
    return f"from factory.cli import app\nsys.argv = {['dmoe', *words]}\n{call}"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["lint"], ["preview", "product"]], ids=" ".join)
def test_the_command_line_loads_no_heavy_package(words, checkout):
    assert loaded(command(*words), checkout.root) == "[]"


STAGES = (
    "train.sft",
    "train.audit",
    "train.score",
    "train.export",
    "train.base_gguf",
    "train.parity",
    "serve.gateway",
    "factory.query",
    "factory.leaks",
    "factory.card",
    "factory.publish",
    "factory.generate",
    "factory.replies",
    "factory.preview",
    "factory.diff",
)


@pytest.mark.parametrize("module", STAGES)
def test_a_stage_loads_no_heavy_package_before_it_runs(module, tmp_path):
    assert loaded(f"import {module}", tmp_path) == "[]"


def test_a_heavy_package_would_be_seen(tmp_path):
    assert loaded("import pandas", tmp_path) == "['pandas']"
