"""The base as GGUF: the file that the profile names, or one made from its folder (Qwen3 alone) and kept.

Run: by whoever needs it, first by `dmoe score <expert>`; it lies in .dmoe/
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from factory.errors import UserError, relative, shown
from factory.paths import Home, Profile, folder_revision
from factory.store import once, read_json, read_text, whole
from train.base import refuse_mixture
from train.tensors import Planned, Stored, read, stored, write

ARCHITECTURE = "qwen3"
# llama.cpp names the rule `qwen2` and has it built in; any other rule would split words differently there.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VISIBLE = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def base_gguf(home: Home, profile: Profile) -> Path:
    """The GGUF of the base: the file that the profile names, else one made from its folder and kept in .dmoe.

    Raises:
        UserError: the named file is missing, or the base is on the hub and no file is named.
    """
    where = relative(home.profile(profile.name))
    if profile.gguf:
        return _named(home, profile, "gguf", profile.gguf)
    folder = profile.model_path(home)
    if not folder:
        raise UserError(f"{where}: base.gguf: is missing; a hub model needs the GGUF file that is to be served")
    return once(home.work / f"base-{folder_revision(folder)}.gguf", lambda path: export_base(folder, path))


def full_gguf(home: Home, profile: Profile) -> Path | None:
    """The unquantised GGUF of a base whose named file is another: the profile's, else made from a local folder.

    Raises:
        UserError: the named file is missing.
    """
    if not profile.gguf:
        return None  # what is served is unquantised
    if profile.gguf_full:
        return _named(home, profile, "gguf_full", profile.gguf_full)
    return base_gguf(home, replace(profile, gguf=None)) if profile.model_path(home) else None


def _named(home: Home, profile: Profile, key: str, file: str) -> Path:
    path, where = home.root / file, relative(home.profile(profile.name))
    if not path.exists():
        raise UserError(f"{where}: base.{key}: there is no {file}; download the base's GGUF to it")
    return path


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
            weights = _weights(model, config, matrices)
        except KeyError as error:
            raise UserError(f"{relative(model)}: its config or tokenizer lacks {error}; get the files again") from None
        write(writer, weights)


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


def _weights(model: Path, config: dict[str, Any], matrices: str) -> list[Planned]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    files = sorted(model.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{relative(model)}: holds no model*.safetensors")
    names, tied = get_tensor_name_map(MODEL_ARCH.QWEN3, config["num_hidden_layers"]), config.get("tie_word_embeddings")
    found = [tensor for file in files for tensor in stored(file) if not (tied and tensor.name == "lm_head.weight")]
    wanted = 2 + 11 * config["num_hidden_layers"] + (not tied)
    if len({tensor.name for tensor in found}) != wanted:
        raise UserError(f"{relative(model)}: {len(found)} tensors where {wanted} were expected; files are missing")
    return [_planned(tensor, names.get_name(tensor.name, try_suffixes=(".weight",)), matrices) for tensor in found]


def _planned(tensor: Stored, target: str | None, matrices: str) -> Planned:
    source = f"{relative(tensor.file)}: tensor {tensor.name}"
    if target is None:
        raise UserError(f"{source} has no place in a {ARCHITECTURE} GGUF")
    kind = "F32" if len(tensor.shape) == 1 else matrices
    return Planned(target, tensor.shape, kind, lambda: read(tensor), source)
