"""Bespoke Curator on N prompts of one server. Usage: curator_rows.py N PORT; prints one line of JSON.

Nothing of the reply is validated: that part of the work is spared it.
"""

import json
import os
import resource
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

count, port = int(sys.argv[1]), sys.argv[2]
tables = Path(find_spec("litellm").origin).parent / "litellm_core_utils" / "tokenizers"  # it wants them offline
os.environ.update(
    TELEMETRY_ENABLED="false", CURATOR_DISABLE_RICH_DISPLAY="1", HF_HUB_OFFLINE="1",
    LITELLM_LOCAL_MODEL_COST_MAP="True", OPENAI_API_KEY="none", TIKTOKEN_CACHE_DIR=str(tables),
    CURATOR_CACHE_DIR=tempfile.mkdtemp(),
)  # fmt: skip
from bespokelabs import curator  # noqa: E402
from datasets import Dataset  # noqa: E402


class Rows(curator.LLM):
    """One prompt, one reply, one row."""

    def prompt(self, row):
        return row["instruction"]

    def parse(self, row, response):
        return {"instruction": row["instruction"], "output": response}


prompts = [{"instruction": f"Which laptop is the best one for person number {i}?"} for i in range(count)]
limits = {"max_requests_per_minute": 10**6, "max_tokens_per_minute": 10**9, "max_concurrent_requests": 32}
server = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "max_retries": 2, "require_all_responses": True}
rows = Rows(model_name="mock", backend="openai", backend_params={**server, **limits})
began, cpu = time.perf_counter(), time.process_time()
made = len(rows(Dataset.from_list(prompts)).dataset)
cpu, wall = time.process_time() - cpu, time.perf_counter() - began
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"rows": made, "wall": wall, "cpu": cpu, "memory": memory}))  # noqa: T201
