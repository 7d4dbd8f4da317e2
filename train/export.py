"""Stage export: PEFT adapter -> GGUF adapter, and, where none is named, base folder -> GGUF base.

Reads experts/<expert>/adapter/ and the base's config.json; writes experts/<expert>/adapter.gguf.
Tensors are written as they are: llama.cpp scales by alpha / rank, as plain LoRA does. What GGUF
cannot carry is refused by name, because llama.cpp would drop it without a word.
Run: dmoe export <expert>
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from factory.errors import UserError, relative, shown
from factory.paths import Home, Profile, folder_revision
from factory.store import once, read_json, read_text, sha256, whole
from train.base import read_config, refuse_mixture

ARCHITECTURE = "qwen3"
# llama.cpp names the rule `qwen2` and has it built in; any other rule would split words differently there.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VISIBLE = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# What an adapter_config.json may hold that plain LoRA in GGUF cannot: key -> the cure.
NOT_CARRIED = {
    "use_dora": "train with use_dora=False",
    "use_rslora": "train with use_rslora=False and alpha multiplied by the root of the rank",
    "use_qalora": "train with use_qalora=False",
    "use_bdlora": "train without it",
    "lora_bias": "train with lora_bias=False",
    "fan_in_fan_out": "train on a base with plain linear layers",
    "modules_to_save": "train without modules_to_save",
    "trainable_token_indices": "train without trainable_token_indices",
    "target_parameters": "name modules, not parameters",
    "layer_replication": "train without layer_replication",
    "alpha_pattern": "give all layers one alpha",
    "rank_pattern": "give all layers one rank",
    "alora_invocation_tokens": "train an adapter that is always on",
    "arrow_config": "train without arrow",
    "kasa_config": "train without KaSA",
    "velora_config": "train without VeLoRA",
    "monteclora_config": "train without MonteCLoRA",
}
PLAIN_STARTS = (True, False, "gaussian")  # the others (PiSSA, OLoRA, ...) change the base's own weights


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
    }
    adapter = home.expert(expert, "adapter")
    export_adapter(adapter, read_config(home, profile), home.expert(expert, "adapter.gguf"), metadata)


def base_gguf(home: Home, profile: Profile) -> Path:
    """The GGUF of the base: the file that the profile names, else one made from its folder and kept in .dmoe.

    Raises:
        UserError: the named file is missing, or the base is on the hub and no file is named.
    """
    where = relative(home.profile(profile.name))
    if profile.gguf:
        path = home.root / profile.gguf
        if not path.exists():
            raise UserError(f"{where}: base.gguf: there is no {profile.gguf}; download the base's GGUF to it")
        return path
    folder = profile.model_path(home)
    if not folder:
        raise UserError(f"{where}: base.gguf: is missing; a hub model needs the GGUF file that is to be served")
    return once(home.work / f"base-{folder_revision(folder)}.gguf", lambda path: export_base(folder, path))


def export_base(model: Path, out: Path, matrices: str = "F16") -> None:
    """Writes the GGUF of a local Qwen3-architecture folder: float16 matrices (or F32), float32 norms.

    Args:
        model: folder with config.json, tokenizer.json and safetensors.
        out: the GGUF file; there only when it is complete.

    Raises:
        UserError: another architecture, a mixture of experts, another tokenizer, or a missing file.
    """
    from gguf import GGUFWriter

    config = read_json(model / "config.json")
    _refuse_base(config, relative(model / "config.json"))
    with whole(out) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_name(model.name)
        try:
            _add_hyperparameters(writer, config, matrices)
            _add_tokenizer(writer, model, config)
        except KeyError as error:
            raise UserError(f"{relative(model)}: its config or tokenizer lacks {error}; get the files again") from None
        _add_weights(writer, model, config, matrices)
        _finish(writer)


def _refuse_base(config: dict[str, Any], where: str) -> None:
    refuse_mixture(config, where)
    kind, cure = config.get("model_type"), "name the base's own GGUF file in profiles/<name>.yaml: base.gguf"
    if kind != ARCHITECTURE:
        raise UserError(f"{where}: model_type: {shown(kind)} is not converted here, only {ARCHITECTURE}; {cure}")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    odd = {
        "attention_bias": config.get("attention_bias"),
        "use_sliding_window": config.get("use_sliding_window"),
        "quantization_config": config.get("quantization_config"),
        "rope_type": None if scaling.get("rope_type", "default") == "default" else scaling["rope_type"],
        "hidden_act": None if config.get("hidden_act") == "silu" else config.get("hidden_act"),
    }
    for key, value in odd.items():
        if value:
            raise UserError(f"{where}: {key}: {shown(value)} is not converted here; {cure}")


def _add_hyperparameters(writer: Any, config: dict[str, Any], matrices: str) -> None:
    from gguf import LlamaFileType

    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}  # transformers 5; before, rope_theta stood at the top
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config["rope_theta"]))
    writer.add_file_type(LlamaFileType.ALL_F32 if matrices == "F32" else LlamaFileType.MOSTLY_F16)


def _add_tokenizer(writer: Any, model: Path, config: dict[str, Any]) -> None:
    from gguf import TokenType

    tokenizer, settings = read_json(model / "tokenizer.json"), read_json(model / "tokenizer_config.json")
    where = relative(model / "tokenizer.json")
    if tokenizer["model"]["type"] != "BPE" or QWEN2_SPLIT not in _patterns(tokenizer["pre_tokenizer"]):
        raise UserError(
            f"{where}: not byte-level BPE with Qwen2's pre-tokenizer; name the base's GGUF in its profile: base.gguf"
        )
    size = config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = text, TokenType.NORMAL
    added = {entry["content"]: entry for entry in tokenizer["added_tokens"]}
    for text, entry in added.items():
        # Reasoning and tool marks must be seen in the text, or llama.cpp cannot take them out of the reply.
        control = entry["special"] and text not in VISIBLE
        tokens[entry["id"]], types[entry["id"]] = text, TokenType.CONTROL if control else TokenType.USER_DEFINED
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(added[_content(settings["eos_token"])]["id"])
    writer.add_pad_token_id(added[_content(settings["pad_token"])]["id"])
    template = model / "chat_template.jinja"
    writer.add_chat_template(read_text(template) if template.exists() else settings["chat_template"])


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _patterns(pre_tokenizer: dict[str, Any]) -> list[str]:
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [part["pattern"]["Regex"] for part in parts if "Regex" in part.get("pattern", {})]


def _add_weights(writer: Any, model: Path, config: dict[str, Any], matrices: str) -> None:
    files = sorted(model.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{relative(model)}: holds no model*.safetensors")
    names, seen = _tensor_names(config), set()
    for file in files:
        for name, values in tensors(file):
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            target = names.get_name(name, try_suffixes=(".weight",))
            if target is None:
                raise UserError(f"{relative(file)}: tensor {name} has no place in a {ARCHITECTURE} GGUF")
            kind: Any = np.float16 if values.ndim > 1 and matrices == "F16" else np.float32
            if not np.isfinite(narrow := values.astype(kind)).all():
                raise UserError(f"{relative(file)}: tensor {name} does not fit into {kind.__name__} (or is not finite)")
            writer.add_tensor(target, narrow)
            seen.add(name)
    wanted = 2 + 11 * config["num_hidden_layers"] + (not config.get("tie_word_embeddings"))
    if len(seen) != wanted:
        raise UserError(f"{relative(model)}: {len(seen)} tensors where {wanted} were expected; files are missing")


def export_adapter(adapter: Path, base_config: dict[str, Any], out: Path, metadata: dict[str, str]) -> None:
    """Writes a PEFT LoRA folder as a GGUF adapter (float32), tensor for tensor.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        base_config: the base's config.json.
        out: the GGUF file; there only when it is complete.
        metadata: further string keys; `adapter.lora.task_name` is the expert's name.

    Raises:
        UserError: the adapter holds something that GGUF's LoRA cannot carry, or is damaged.
    """
    from gguf import GGUFType, GGUFWriter, Keys

    where, config = relative(adapter / "adapter_config.json"), read_json(adapter / "adapter_config.json")
    refuse_mixture(base_config, "base model")
    if base_config.get("model_type") != ARCHITECTURE:
        raise UserError(
            f"base model: model_type {shown(base_config.get('model_type'))} cannot be exported, only {ARCHITECTURE}"
        )
    refuse_adapter(config, where)
    pairs = _pairs(adapter / "adapter_model.safetensors", config["r"], base_config)
    with whole(out) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
        for key, value in metadata.items():
            writer.add_string(key, value)
        for name, values in sorted(pairs.items()):
            writer.add_tensor(name, values)
        _finish(writer)


def refuse_adapter(config: dict[str, Any], where: str) -> None:
    """Refuses, by name, what an adapter_config.json asks for and GGUF's LoRA cannot carry.

    Raises:
        UserError: the first such key, its value and the cure.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type: {shown(config.get('peft_type'))} is not LoRA; GGUF carries plain LoRA only"
        )
    for key, cure in NOT_CARRIED.items():
        if config.get(key):
            raise UserError(f"{where}: {key}: {shown(config[key])} cannot be carried by GGUF; {cure}")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise UserError(f"{where}: r: {shown(config.get('r'))} is no rank; train the adapter again")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias: {shown(config['bias'])} cannot be carried by GGUF; train with bias='none'")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise UserError(
            f"{where}: init_lora_weights: {shown(config['init_lora_weights'])} changes the base too; train with true"
        )
    if not config.get("lora_alpha"):
        raise UserError(f"{where}: lora_alpha: 0 is read by llama.cpp as scale 1; give it a value above 0")


def _pairs(file: Path, rank: int, base_config: dict[str, Any]) -> dict[str, np.ndarray]:
    """GGUF name -> float32 [rank, in] or [out, rank], checked to be whole, finite and in pairs."""
    if not file.exists():
        raise UserError(f"{relative(file)}: there is no such file; train the adapter first")
    names, found = _tensor_names(base_config), {}
    for name, values in tensors(file):
        module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if side not in ("lora_A", "lora_B"):
            raise UserError(
                f"{relative(file)}: tensor {name} is no LoRA matrix of a linear layer; GGUF cannot carry it"
            )
        target = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if target is None or target.startswith(("output", "token_embd")) or "norm" in target:
            raise UserError(
                f"{relative(file)}: {module} cannot carry an adapter in llama.cpp; train linear layers only"
            )
        if values.ndim != 2 or values.shape[side == "lora_B"] != rank:
            raise UserError(f"{relative(file)}: tensor {name} has shape {list(values.shape)}, not rank {rank}")
        if not np.isfinite(values).all():
            raise UserError(f"{relative(file)}: tensor {name} holds NaN or infinity; train again at a lower rate")
        found[f"{target}.{side.lower()}"] = values.astype(np.float32)
    stems = [{n.rpartition(".")[0] for n in found if n.endswith(side)} for side in ("lora_a", "lora_b")]
    if not found or stems[0] != stems[1]:
        raise UserError(
            f"{relative(file)}: the LoRA matrices are not in pairs {sorted(stems[0] ^ stems[1])[:3]}; train again"
        )
    return found


def _tensor_names(config: dict[str, Any]) -> Any:
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH.QWEN3, config["num_hidden_layers"])


def tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of each tensor of a safetensors file, in order of name; bfloat16 becomes float32.

    Raises:
        UserError: the file is damaged or holds a type other than floats.
    """
    from safetensors import SafetensorError, deserialize

    try:
        raw: Any = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise UserError(f"{relative(file)}: damaged safetensors ({error})") from None
    for name, entry in sorted(raw, key=lambda pair: str(pair[0])):
        kind, data = entry["dtype"], entry["data"]
        if kind == "BF16":  # numpy has no bfloat16: it is the upper half of a float32
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif kind in ("F16", "F32"):
            values = np.frombuffer(data, np.float16 if kind == "F16" else np.float32)
        else:
            raise UserError(f"{relative(file)}: tensor {name} is {kind}, not F16, BF16 or F32")
        yield name, values.reshape(entry["shape"])


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
