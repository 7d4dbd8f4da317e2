"""Stage export: PEFT adapter -> GGUF adapter.

Reads experts/<expert>/adapter/, the base's config.json and, for their hashes, train.parquet and the template; writes
experts/<expert>/adapter.gguf. llama.cpp knows one alpha, and divides it by the rank of each pair: plain LoRA is written
as it is, byte for byte what llama.cpp's own converter writes; rsLoRA and alphas of single layers are folded into B.
What GGUF cannot carry is refused by name, because llama.cpp would drop it without a word.
The scores are not in this file: they are measured on it. The manifest holds them beside this file's hash.
Run: dmoe export <expert>
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from factory.errors import UserError, relative, shown
from factory.paths import Home, Profile
from factory.store import need, read_json, sha256, whole
from factory.template import read_template
from train.base import refuse_mixture
from train.tensors import Planned, Stored, read, stored, write

# model_type of the base's config.json -> llama.cpp's architecture (gguf.MODEL_ARCH). Those in PERMUTED keep the rows
# of q and k in another order there: the two halves of each head interleaved.
ARCHITECTURES = {
    "qwen3": "QWEN3",
    "qwen2": "QWEN2",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "smollm3": "SMOLLM3",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3": "GEMMA3",
    "gemma3_text": "GEMMA3",
    "phi": "PHI2",
    "phi3": "PHI3",
}
PERMUTED = ("llama", "mistral", "smollm3")
Outtype = Literal["f32", "f16", "bf16", "q8_0"]

# The template's keys whose hash the file carries: what the expert says and how it was trained. How its rows were chosen
# (generate, dedup, output.never) is not among them: the rows themselves are, by their own hash.
TEMPLATE_KEYS: Any = {"answers": True, "rivals": True, "output": {"tokens", "must", "forms", "slots"}, "train": True}

# What an adapter_config.json may hold that LoRA in GGUF cannot: key -> the cure.
NOT_CARRIED = {
    "use_dora": "train with use_dora=False",
    "use_qalora": "train with use_qalora=False",
    "use_bdlora": "train without it",
    "lora_bias": "train with lora_bias=False",
    "fan_in_fan_out": "train on a base with plain linear layers",
    "modules_to_save": "train without modules_to_save",
    "trainable_token_indices": "train without trainable_token_indices",
    "target_parameters": "name modules, not parameters",
    "layer_replication": "train without layer_replication",
    "alora_invocation_tokens": "train an adapter that is always on",
    "arrow_config": "train without arrow",
    "kasa_config": "train without KaSA",
    "velora_config": "train without VeLoRA",
    "monteclora_config": "train without MonteCLoRA",
}
# What it may hold that GGUF carries, or that changes nothing in how an adapter is applied. Any other key is of a PEFT
# that did not exist when this was written.
CARRIED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying"),
}
# The other starts (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take out of the base's weights what they put into the adapter.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def export(home: Home, expert: str, profile: Profile) -> None:
    """Writes experts/<expert>/adapter.gguf.

    Raises:
        UserError: the adapter or the base cannot be carried by GGUF; see export_adapter.
    """
    metadata = {
        "general.name": expert,
        "adapter.lora.task_name": expert,
        "dmoe.base_model": profile.model,
        "dmoe.dataset_sha256": sha256(home.dataset(expert, "train.parquet")),
        "dmoe.template_sha256": template_hash(home.template(expert)),
    }
    adapter = home.expert(expert, "adapter")
    export_adapter(adapter, base_config(home, profile), home.expert(expert, "adapter.gguf"), metadata)


def base_config(home: Home, profile: Profile) -> dict[str, Any]:
    """The base's config.json as it stands; transformers would add its defaults, but loads torch first.

    Raises:
        UserError: neither in the base's folder nor to be had from the hub.
    """
    if folder := profile.model_path(home):
        path = folder / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(profile.model, "config.json", revision=profile.revision))
        except (OSError, ValueError) as error:
            where, why = relative(home.profile(profile.name)), str(error).splitlines()[0]
            raise UserError(
                f"{where}: base.model: the config.json of {profile.model!r} cannot be had ({why})"
            ) from None
    config: dict[str, Any] = read_json(path)
    return config


def template_hash(path: Path) -> str:
    """SHA-256 of TEMPLATE_KEYS as canonical JSON: a comment, or a value written otherwise, changes nothing."""
    keys = read_template(path).declaration.model_dump(mode="json", include=TEMPLATE_KEYS)
    text = json.dumps(keys, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def export_adapter(
    adapter: Path, base_config: dict[str, Any], out: Path, metadata: dict[str, str], outtype: Outtype = "f32"
) -> None:
    """Writes a PEFT LoRA folder as a GGUF adapter; memory holds one tensor at a time.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        base_config: the base's config.json.
        out: the GGUF file; there only when it is complete.
        metadata: further string keys; `adapter.lora.task_name` is the expert's name.
        outtype: the type of all matrices; of q8_0, rows that are no multiple of 32 (B's, at rank 16) become f16.

    Raises:
        UserError: the adapter holds something that GGUF's LoRA cannot carry, or is damaged, or the base is of an
            architecture whose adapters are not written here.
    """
    from gguf import GGML_QUANT_VERSION, MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys

    path = need(adapter / "adapter_config.json", "dmoe train")
    where, config = relative(path), read_json(path)
    refuse_mixture(base_config, "base model")
    architecture = MODEL_ARCH_NAMES[MODEL_ARCH[_architecture(base_config)]]
    refuse_adapter(config, where)
    try:
        planned = _planned(adapter / "adapter_model.safetensors", config, base_config, outtype)
    except KeyError as error:
        raise UserError(f"base model: its config.json lacks {error}; get the file again") from None
    with whole(out) as temporary:
        writer = GGUFWriter(temporary, architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
        for key, value in metadata.items():
            writer.add_string(key, value)
        if outtype == "q8_0":
            writer.add_quantization_version(GGML_QUANT_VERSION)
        write(writer, planned)


def _architecture(base: dict[str, Any]) -> str:
    kind = base.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"base model: model_type {shown(kind)} cannot be exported, only {known}")
    return ARCHITECTURES[kind]


def refuse_adapter(config: dict[str, Any], where: str) -> None:
    """Refuses, by name, what an adapter_config.json asks for and GGUF's LoRA cannot carry.

    Raises:
        UserError: the first such key, its value and the cure.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type: {shown(config.get('peft_type'))} is not LoRA; GGUF carries plain LoRA only"
        )
    for key, value in config.items():
        if value and key in NOT_CARRIED:
            raise UserError(f"{where}: {key}: {shown(value)} cannot be carried by GGUF; {NOT_CARRIED[key]}")
        if value and key not in CARRIED:
            raise UserError(f"{where}: {key}: {shown(value)} is not known here, so it may be lost; train without it")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias: {shown(config['bias'])} cannot be carried by GGUF; train with bias='none'")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise UserError(
            f"{where}: init_lora_weights: {shown(config['init_lora_weights'])} changes the base too; train with true"
        )
    _refuse_numbers(config, where)


def _refuse_numbers(config: dict[str, Any], where: str) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}: {key}: {shown(pattern)} is no pattern ({error})") from None
    for key, rank in {"r": config.get("r"), **(config.get("rank_pattern") or {})}.items():
        if not isinstance(rank, int) or rank < 1:
            raise UserError(f"{where}: {key}: {shown(rank)} is no rank; train the adapter again")
    for key, alpha in {"lora_alpha": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}.items():
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise UserError(f"{where}: {key}: {shown(alpha)} is no alpha; write the one it was trained with")
    if config["lora_alpha"] == 0:
        raise UserError(f"{where}: lora_alpha: 0 is read by llama.cpp as scale 1; give it a value above 0")


def _planned(file: Path, config: dict[str, Any], base: dict[str, Any], outtype: Outtype) -> list[Planned]:
    """The GGUF's tensors in order of name: `<layer>.weight.lora_a` [rank, in] and `.lora_b` [out, rank], in pairs."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    if not file.exists():
        raise UserError(f"{relative(file)}: there is no such file; train the adapter first")
    names = get_tensor_name_map(MODEL_ARCH[_architecture(base)], _text(base)["num_hidden_layers"])
    planned = [_plan(tensor, config, base, names, outtype) for tensor in stored(file)]
    stems = [{p.name.removesuffix(side) for p in planned if p.name.endswith(side)} for side in (".lora_a", ".lora_b")]
    if not planned or stems[0] != stems[1]:
        raise UserError(
            f"{relative(file)}: the LoRA matrices are not in pairs {sorted(stems[0] ^ stems[1])[:3]}; train again"
        )
    return sorted(planned, key=lambda planned: planned.name)


def _text(base: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that tells of the language model; a multimodal base has it one level down."""
    text: dict[str, Any] = base.get("text_config") or base
    return text


def _plan(tensor: Stored, config: dict[str, Any], base: dict[str, Any], names: Any, outtype: Outtype) -> Planned:
    where = f"{relative(tensor.file)}: tensor {tensor.name}"
    module, _, side = tensor.name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    if side not in ("lora_A", "lora_B"):
        raise UserError(f"{where} is no LoRA matrix of a linear layer; GGUF cannot carry it")
    target = _target(module, names, _text(base), relative(tensor.file))
    rank = _matched(config.get("rank_pattern"), module, config["r"])
    if len(tensor.shape) != 2 or tensor.shape[side == "lora_B"] != rank:
        raise UserError(f"{where} has shape {list(tensor.shape)}, not rank {rank}")
    kind = "F16" if outtype == "q8_0" and tensor.shape[1] % 32 else outtype.upper()
    factor, heads = (1.0, 0) if side == "lora_A" else (_factor(config, module, rank), _heads(module, tensor, base))
    return Planned(f"{target}.{side.lower()}", tensor.shape, kind, lambda: _values(tensor, factor, heads), where)


def _values(tensor: Stored, factor: float, heads: int) -> np.ndarray:
    values = read(tensor)
    if factor != 1:
        values = values.astype(np.float32) * np.float32(factor)
    return _interleaved(values, heads) if heads else values


def _target(module: str, names: Any, base: dict[str, Any], where: str) -> str:
    """llama.cpp's name of the weight of a linear layer: model.layers.0.mlp.up_proj -> blk.0.ffn_up.weight."""
    target = names.get_name(f"{module.replace('language_model.', '')}.weight", try_suffixes=(".weight",))
    if target == "output.weight" and base.get("tie_word_embeddings", True):
        raise UserError(f"{where}: {module} is tied to the embeddings; llama.cpp cannot tell them apart; train without")
    if target is None or target.startswith("token_embd") or "norm" in target:
        raise UserError(f"{where}: {module} cannot carry an adapter in llama.cpp; train linear layers only")
    return str(target)


def _matched(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """What PEFT takes for a module: the value of the first pattern that matches the end of its name, else `default`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _factor(config: dict[str, Any], module: str, rank: int) -> float:
    """What B is multiplied by: PEFT's scale of this module over lora_alpha / rank, which is llama.cpp's."""
    alpha = _matched(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1))


def _heads(module: str, tensor: Stored, base: dict[str, Any]) -> int:
    """Heads among which the rows of this B are put into llama.cpp's order; 0 where the order is the same."""
    kind = module.rpartition(".")[2]
    if base["model_type"] not in PERMUTED or kind not in ("q_proj", "k_proj"):
        return 0
    heads = int((kind == "k_proj" and base.get("num_key_value_heads")) or base["num_attention_heads"])
    size = int(base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"])
    if tensor.shape[0] != heads * size:
        raise UserError(
            f"{relative(tensor.file)}: tensor {tensor.name} has {tensor.shape[0]} rows, where the base's config.json "
            f"has {heads} heads of {size}; name the base that it was trained on"
        )
    return heads


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    rows, rank = values.shape
    return values.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)
