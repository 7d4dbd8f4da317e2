"""How long an export takes, and how much memory: ours beside llama.cpp's converter, on adapters of Qwen3-14B's shape.

The adapters are random, of all linear layers, in bfloat16; each run is a process of its own, from its start to its
end. Beside them the limit: a process that reads the adapter and writes as many bytes as the GGUF has. llama.cpp's
converter runs where DMOE_LLAMA_CPP names the folder that holds convert_lora_to_gguf.py.
Run: python benchmarks/export.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

BASE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 40, "hidden_size": 5120,
    "intermediate_size": 17408, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
LAYERS = {
    "self_attn.q_proj": (5120, 5120), "self_attn.k_proj": (1024, 5120), "self_attn.v_proj": (1024, 5120),
    "self_attn.o_proj": (5120, 5120), "mlp.gate_proj": (17408, 5120), "mlp.up_proj": (17408, 5120),
    "mlp.down_proj": (5120, 17408),
}  # fmt: skip
OURS = """
import json, sys
from pathlib import Path
from train.export import export_adapter
folder = Path(sys.argv[1])
export_adapter(folder, json.loads((folder.parent / "base" / "config.json").read_text()), Path(sys.argv[2]), {})
"""
LIMIT = """
import sys
with open(sys.argv[1], "rb") as source:
    while block := source.read(1 << 22):
        pass
left = int(sys.argv[3])
with open(sys.argv[2], "wb") as target:
    while left > 0:
        left -= target.write(bytes(min(left, 1 << 22)))
"""
UPSTREAM = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The kernel's own count; ru_maxrss would start from what this process held when it started the other.
PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write_adapter(folder: Path, rank: int) -> Path:
    """A PEFT folder of random bfloat16 matrices, and its base's config.json beside it."""
    shapes = {}
    for layer in range(BASE["num_hidden_layers"]):
        for name, (rows, columns) in LAYERS.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            shapes |= {f"{place}.lora_A.weight": (rank, columns), f"{place}.lora_B.weight": (rows, rank)}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    (folder / "adapter").mkdir(parents=True)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(BASE))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "base"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    text, random = json.dumps(header).encode(), np.random.default_rng(rank)
    with (folder / "adapter" / "adapter_model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for rows, columns in shapes.values():
            values = random.standard_normal((rows, columns), np.float32)
            stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return folder / "adapter"


def run(times: int, code: str, *arguments: object) -> tuple[float, float, float]:
    """Of several processes that run `code`: the least seconds, the least seconds of CPU, the largest peak in MB."""
    runs = []
    for _ in range(times):
        command = [sys.executable, "-W", "ignore", "-c", code + PEAK, *map(str, arguments)]
        start, before = time.perf_counter(), os.times()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds, after = time.perf_counter() - start, os.times()
        assert not done.returncode, done.stderr[-2000:]
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        runs.append((seconds, cpu, int(done.stdout.split()[-1]) * 1024 / 1e6))
    return min(r[0] for r in runs), min(r[1] for r in runs), max(r[2] for r in runs)


def measure(folder: Path, rank: int, upstream: str | None) -> dict[str, tuple[float, float, float]]:
    """Program -> what `run` says of it, for an adapter of this rank that is written to `folder`."""
    adapter, out = write_adapter(folder, rank), folder / "adapter.gguf"
    found = {"ours": run(3, OURS, adapter, out)}
    source, size = adapter / "adapter_model.safetensors", out.stat().st_size
    found["reading and writing the bytes"] = run(3, LIMIT, source, folder / "copy", size)
    if upstream:
        script, theirs = Path(upstream) / "convert_lora_to_gguf.py", folder / "upstream.gguf"
        found["llama.cpp"] = run(2, UPSTREAM, script, "--base", folder / "base", "--outfile", theirs, adapter)
    return found


def main() -> None:
    """Prints the table."""
    table = Table(title="an adapter of Qwen3-14B's shape, bfloat16 to f32 GGUF")
    for name in ("rank", "adapter, MB", "program", "s", "CPU s", "x ours", "peak, MB", "x ours", "x adapter"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for rank in (16, 64):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), rank, os.environ.get("DMOE_LLAMA_CPP"))
            size = (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6
        for name, (seconds, cpu, peak) in found.items():
            times, memories = cpu / found["ours"][1], peak / found["ours"][2]
            figures = (
                f"{seconds:.2f}",
                f"{cpu:.2f}",
                f"{times:.1f}",
                f"{peak:.0f}",
                f"{memories:.1f}",
                f"{peak / size:.2f}",
            )
            table.add_row(f"{rank}", f"{size:.0f}", name, *figures)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
