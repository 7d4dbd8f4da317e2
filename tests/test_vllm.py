"""A real vLLM as the teacher: generate and build of one expert, structured output on. Run: make test-vllm

The teacher is the pocket base, which is too small to paraphrase: what it writes proves that every reply has
the template's shape, not that it is any good.
"""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from factory.build import build
from factory.paths import read_params, read_profile
from factory.schema import CANDIDATES, ROWS, read_rows
from factory.store import read_json
from factory.template import read_template

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("DMOE_VLLM", "")
SEEDS = 12
TEACHER = """
  kind: vllm
  model: models/pocket
  revision: null
  variants: 2
  sampling: {max_tokens: 600}
  serve: [--dtype, float32, --max-model-len, "2048", --enforce-eager]
"""

pytestmark = pytest.mark.skipif(not PYTHON or not shutil.which(PYTHON), reason="DMOE_VLLM names no Python with vllm")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout of one expert and few seeds after `dmoe generate`, run against a vLLM that it starts itself."""
    from factory.paths import Home

    root = tmp_path_factory.mktemp("vllm")
    for name in ("templates", "profiles", "models/pocket"):
        shutil.copytree(ROOT / name, root / name)
    template = root / "templates" / "product.yaml"  # closed slots: its own sentences are no reasons to buy a laptop
    template.write_text(re.sub(r"\n +ask: (what the person|one plain).*", "", template.read_text(encoding="utf-8")))
    seeds = (ROOT / "seeds" / "product.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "seeds").mkdir()
    (root / "seeds" / "product.jsonl").write_text("".join(seeds[:SEEDS]), encoding="utf-8")
    (root / "params.yaml").write_text(f"experts: [product]\nprofile: pocket\nteacher:{TEACHER}", encoding="utf-8")
    done = _generate(root, PYTHON)
    assert done.returncode == 0, done.stderr
    return Home(root)


def _generate(root, python):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DMOE_VLLM": str(Path(python).absolute())}
    command = [sys.executable, "-m", "factory.cli", "generate", "product"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_every_reply_of_vllm_is_of_the_schema_or_was_cut_off(made):
    rows = read_rows(made.dataset("product", "candidates.parquet"), CANDIDATES, "")
    # xgrammar lets a bare control character into a string, now and then: that is no JSON
    assert sum(row["failure"] == "schema" for row in rows) <= 0.1 * len(rows)
    assert {row["failure"] for row in rows} <= {"", "truncated", "schema"}
    replies = [
        json.loads(row["reply"], strict=False) for row in rows if row["reply"] and row["finish_reason"] == "stop"
    ]
    assert len(replies) >= SEEDS // 2
    for reply in replies:
        assert list(reply) == ["variants"] and len(reply["variants"]) == 2
        for variant in reply["variants"]:
            assert set(variant) >= {"instruction", "reason"} and 4 <= len(variant["instruction"]) <= 400
    assert sum(row["completion_tokens"] for row in rows) > 0


def test_build_keeps_rows_of_it_and_its_books_balance(made):
    stats = build(made, "product", read_profile(made, read_params(made).profile))
    assert stats["kept"] + stats["dropped"] + stats["failed"] == stats["candidates"]
    assert stats["kept"] == sum(stats["rows"].values()) > 0
    assert set(read_json(made.dataset("product", "stats.json"))["reasons"]) >= set(stats["reasons"])
    template = read_template(made.template("product"))
    for name in ("train", "holdout"):
        for row in read_rows(made.dataset("product", f"{name}.parquet"), ROWS, ""):
            assert template.in_form(row["output"], row["answer"]) and "ThinkPad X1 Carbon" in row["output"]


def test_a_second_run_needs_no_vllm_and_gives_the_same_bytes(made):
    path = made.dataset("product", "candidates.parquet")
    before = path.read_bytes()
    done = _generate(made.root, sys.executable)  # has no vllm, and would fail if it were started
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before


def test_its_key_is_in_no_file_and_no_process_of_it_is_left(made):
    log = (made.work / "logs" / "vllm.log").read_text(encoding="utf-8", errors="replace")
    assert "VLLM_API_KEY" not in log and "api_key='" not in log.replace("api_key=''", "")
    with sqlite3.connect(made.replies) as database:
        assert database.execute("SELECT count(*) FROM replies").fetchone()[0] >= SEEDS
    processes = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if _mine(p)]
    assert not [words for words in processes if str(made.root).encode() in words]


def _mine(path):
    try:
        return path.owner() and path.read_bytes()
    except OSError:
        return False
