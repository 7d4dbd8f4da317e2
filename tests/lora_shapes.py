"""Tiny bases of every architecture, and adapters for them out of numpy and a seed: no torch, the same bytes everywhere.

For tests/test_export.py, which holds our files against export_digests.json: digests of what llama.cpp's own converter
makes of the same adapters. To freeze them anew, with the folder that holds convert_lora_to_gguf.py and its version:
Run: python tests/lora_shapes.py FOLDER VERSION
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

DIGESTS = Path(__file__).with_name("export_digests.json")

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GQA = {"num_key_value_heads": 2, "head_dim": 16}
UNTIED = {"tie_word_embeddings": False}


def _config(architecture, model_type, **keys):
    return {**COMMON, "architectures": [architecture], "model_type": model_type, **keys}


def _multimodal():
    text = _config("Gemma3ForCausalLM", "gemma3_text", **GQA, sliding_window=32)
    del text["architectures"]
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14,
                          "num_attention_heads": 2, "intermediate_size": 32, "model_type": "siglip_vision_model"},
    }  # fmt: skip


# Every base: one with grouped keys and values and one without, tied and untied, and the odd ones.
BASES = {
    "qwen3": _config("Qwen3ForCausalLM", "qwen3", **{**GQA, "head_dim": 32}),
    "qwen3-untied": _config("Qwen3ForCausalLM", "qwen3", **{**GQA, "head_dim": 32}, **UNTIED),
    "qwen2": _config("Qwen2ForCausalLM", "qwen2", num_key_value_heads=2),
    "qwen2-untied": _config("Qwen2ForCausalLM", "qwen2", num_key_value_heads=4, **UNTIED),
    "llama": _config("LlamaForCausalLM", "llama", num_key_value_heads=4, **UNTIED),
    "llama-grouped": _config("LlamaForCausalLM", "llama", **GQA, **UNTIED),
    "smollm2": _config("LlamaForCausalLM", "llama", **GQA),
    "smollm3": _config("SmolLM3ForCausalLM", "smollm3", num_key_value_heads=2),
    "mistral": _config("MistralForCausalLM", "mistral", **GQA, **UNTIED),
    "gemma": _config("GemmaForCausalLM", "gemma", **{**GQA, "num_key_value_heads": 1}),
    "gemma2": _config("Gemma2ForCausalLM", "gemma2", **GQA, sliding_window=32),
    "gemma3": _config("Gemma3ForCausalLM", "gemma3_text", **GQA, sliding_window=32),
    "gemma3-vision": _multimodal(),
    "phi2": _config("PhiForCausalLM", "phi", intermediate_size=256, num_key_value_heads=4, **UNTIED),
    "phi3": _config("Phi3ForCausalLM", "phi3", num_key_value_heads=2, **UNTIED),
    "phi3-tied": _config("Phi3ForCausalLM", "phi3", num_key_value_heads=4),
}


def layers(base):
    """Name in the base -> (rows, columns) of every linear layer that PEFT would adapt; untied, lm_head too."""
    config = base.get("text_config", base)
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    q, kv = heads * size, config["num_key_value_heads"] * size
    inside = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    if config["model_type"] == "phi3":
        inside = {"self_attn.qkv_proj": (q + 2 * kv, hidden), "self_attn.o_proj": (hidden, q),
                  "mlp.gate_up_proj": (2 * inner, hidden), "mlp.down_proj": (hidden, inner)}  # fmt: skip
    if config["model_type"] == "phi":
        inside = {**{k: v for k, v in inside.items() if "attn" in k and "o_proj" not in k},
                  "self_attn.dense": (hidden, q), "mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}  # fmt: skip
    prefix = "model.language_model.layers" if "text_config" in base else "model.layers"
    found = {f"{prefix}.{i}.{n}": s for i in range(config["num_hidden_layers"]) for n, s in inside.items()}
    return found if config["tie_word_embeddings"] else {**found, "lm_head": (config["vocab_size"], hidden)}


def matrices(base, rank=4, seed=0):
    """PEFT's name -> float32 values of every A and B; RandomState's stream is promised never to change."""
    made, random = {}, np.random.RandomState(seed)
    for name, (rows, columns) in sorted(layers(base).items()):
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            made[f"base_model.model.{name}.lora_{side}.weight"] = random.standard_normal(shape).astype(np.float32) / 8
    return made


def write_safetensors(path, values, kind="F32"):
    """Writes float32 arrays as F32, F16 or BF16 (cut off, not rounded)."""
    header, data = {}, b""
    for name, array in values.items():
        if kind == "BF16":
            raw = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            raw = array.astype({"F32": np.float32, "F16": np.float16}[kind]).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_adapter(folder, base, rank=4, kind="F32", seed=0, **config):
    """A PEFT folder, and beside it its base's: a config.json alone."""
    for path in (folder / "adapter", folder / "base"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(base))
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "init_lora_weights": True}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    write_safetensors(folder / "adapter" / "adapter_model.safetensors", matrices(base, rank, seed), kind)
    return folder / "adapter"


# base, rank, type in safetensors, type in GGUF. With rank 32 B's rows can be q8_0 too; with 4 they become f16.
CASES = [(base, 4, kind, "f32") for base in BASES for kind in ("F32", "F16", "BF16")] + [
    (base, rank, kind, outtype)
    for base in ("llama-grouped", "phi3")
    for kind, rank in (("F32", 32), ("F16", 32), ("BF16", 32), ("BF16", 4))
    for outtype in ("f16", "bf16", "q8_0")
]


def case_name(case):
    return "{} rank {} {} to {}".format(*case)


def digest(file):
    """SHA-256 over the tensors of a GGUF file in order of name: name, type, shape, bytes."""
    from gguf import GGUFReader

    found = hashlib.sha256()
    for tensor in sorted(GGUFReader(file).tensors, key=lambda tensor: tensor.name):
        found.update(f"{tensor.name} {tensor.tensor_type.name} {tensor.shape.tolist()}\n".encode())
        found.update(tensor.data.tobytes())
    return found.hexdigest()


# All cases in one process, since upstream's script takes seconds to load.
UPSTREAM = """
import json, runpy, sys
folder, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, folder)
for job in jobs:
    sys.argv = ["convert_lora_to_gguf.py", *job]
    runpy.run_path(folder + "/convert_lora_to_gguf.py", run_name="__main__")
"""


def upstream_digests(llama_cpp, folder):
    """Case -> digest of what the converter in the folder `llama_cpp` writes; works in `folder`."""
    jobs, files = [], {}
    for case in CASES:
        base, rank, kind, outtype = case
        adapter = write_adapter(folder / case_name(case), BASES[base], rank, kind)
        files[case_name(case)] = adapter.parent / "upstream.gguf"
        jobs.append(["--base", str(adapter.parent / "base"), "--outfile", str(adapter.parent / "upstream.gguf"),
                     "--outtype", outtype, str(adapter)])  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-c", UPSTREAM, str(llama_cpp), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return {name: digest(file) for name, file in files.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        found = {"upstream": sys.argv[2], "digests": upstream_digests(Path(sys.argv[1]), Path(work))}
    DIGESTS.write_text(json.dumps(found, indent=1) + "\n")
